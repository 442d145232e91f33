/**
 * Appends an AdamW step (https://arxiv.org/abs/1711.05101) to a graph of gradients, with moments in float32 or in 8 bits
 * (https://arxiv.org/abs/2110.02861).
 */
import { gradientName } from "../graph/backward.ts";
import { checked, type Graph, type Tensor } from "../graph/graph.ts";
import { ADAMW_RATES } from "../graph/ops/loss.ts";
import { DYNAMIC_BLOCK } from "../tensor/dynamic.ts";
import { elements, type Shape } from "../tensor/shape.ts";

/** The name of the state that holds the first (`m`) or second (`v`) moment of a parameter's gradient. */
export function momentName(parameter: string, which: "m" | "v"): string {
  return `${which}.${parameter}`;
}

/** The format of moments. */
export type MomentFormat = "f32" | "8bit";

/** A state that holds a moment, or a part of one. */
export interface MomentState {
  readonly name: string;
  readonly dtype: "f32" | "i32";
  readonly shape: readonly number[];
}

/** Parameters with fewer numbers, and embeddings, keep float32 moments, as bitsandbytes and transformers have it. */
const LEAST_IN_8_BITS = 4096;

/** The states of a parameter's moments, in the order of `adamw`'s or `adamw8bit`'s inputs. */
export function momentStates(name: string, shape: Shape, format: MomentFormat): MomentState[] {
  const n = elements(shape.map(Number));
  const moments = ["m", "v"] as const;
  if (format === "f32" || n < LEAST_IN_8_BITS || /(^|\.)embed_tokens\.weight$/.test(name))
    return moments.map((which) => ({ name: momentName(name, which), dtype: "f32", shape: shape.map(Number) }));
  return [
    ...moments.map((which): MomentState => ({ name: `${which}8.${name}`, dtype: "i32", shape: [Math.ceil(n / 4)] })),
    ...moments.map((which): MomentState => ({ name: `${which}8.scales.${name}`, dtype: "f32", shape: [Math.ceil(n / DYNAMIC_BLOCK)] })),
  ];
}

/** Whether a state holds codes, which are no numbers. */
export function holdsCodes(state: string): boolean {
  return /^[mv]8\.(?!scales\.)/.test(state);
}

/** The inputs with the rates of parameters that decay, and of those that do not. */
export const RATES = "rates";
export const PLAIN_RATES = "rates.plain";

/**
 * The graph followed by an update of every state that has a gradient; the rates are an input `rates` [7], as in `ADAMW_RATES`.
 * @param clip the largest global gradient norm: larger gradients are scaled down to it, and the norm before clipping becomes the
 * output `gradientNorm`; null: no clipping
 * @param decays whether weight decay applies to a parameter; the others' rates are an input `rates.plain` [7]. Default: to all
 * @param moments their format; default float32
 */
export function adamw(
  graph: Graph,
  trained: readonly string[],
  clip: number | null,
  decays: (parameter: string) => boolean = () => true,
  moments: MomentFormat = "f32",
): Graph {
  const next = graph.branch();
  for (const call of graph.calls) next.push(call);
  const states = new Map(graph.values.filter((t) => t.kind === "state").map((t) => [t.name as string, t]));
  const steps = trained.map((name) => {
    const [parameter, gradient] = [states.get(name), graph.outputs.get(gradientName(name))];
    if (!parameter || !gradient) throw new Error(`internal: adamw: '${name}' is not trained in this graph`);
    return { name, parameter, gradient };
  });
  update(next, steps, clip, decays, moments);
  return checked(next, "adamw");
}

/** A trained parameter and its gradient. */
export interface Trained {
  readonly name: string;
  /** A state. */
  readonly parameter: Tensor;
  readonly gradient: Tensor;
}

/** Appends the update of `steps` to `g`, as `adamw` describes it. */
export function update(
  g: Graph,
  steps: readonly Trained[],
  clip: number | null,
  decays: (parameter: string) => boolean = () => true,
  moments: MomentFormat = "f32",
): void {
  const given = new Map<string, Tensor>();
  const rates = (name: string): Tensor => {
    const label = decays(name) ? RATES : PLAIN_RATES;
    const input = given.get(label) ?? g.input(label, [ADAMW_RATES.length], "f32");
    given.set(label, input);
    return input;
  };
  let factor: Tensor | undefined;
  if (clip !== null) {
    const [norm] = g.call(
      "norm",
      steps.map((s) => s.gradient),
    );
    g.output("gradientNorm", norm);
    [factor] = g.call("clip", [norm], { max: clip });
  }
  for (const { name, parameter, gradient } of steps) {
    const held = momentStates(name, parameter.shape, moments).map((s) => g.state(s.name, s.shape, s.dtype));
    g.call(held.length > 2 ? "adamw8bit" : "adamw", [parameter, gradient, ...held, rates(name), factor]);
  }
}

export interface AdamwOptions {
  readonly learningRate: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
}

/** The input `rates` for step `step`, counted from 1. */
export function adamwRates(options: AdamwOptions, step: number): Float32Array {
  const all = { ...options, bias1: 1 - options.beta1 ** step, bias2: 1 - options.beta2 ** step };
  return Float32Array.from(ADAMW_RATES, (name) => all[name]);
}
