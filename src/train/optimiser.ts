/** Appends an AdamW step (https://arxiv.org/abs/1711.05101) to a graph of gradients. */
import { gradientName } from "../graph/backward.ts";
import { checked, type Graph, type Tensor } from "../graph/graph.ts";
import { ADAMW_RATES } from "../graph/ops/loss.ts";

/** The name of the state that holds the first (`m`) or second (`v`) moment of a parameter's gradient. */
export function momentName(parameter: string, which: "m" | "v"): string {
  return `${which}.${parameter}`;
}

/** The inputs with the rates of parameters that decay, and of those that do not. */
export const RATES = "rates";
export const PLAIN_RATES = "rates.plain";

/**
 * The graph followed by an update of every state that has a gradient; the rates are an input `rates` [7], as in `ADAMW_RATES`.
 * @param clip the largest global gradient norm: larger gradients are scaled down to it, and the norm before clipping becomes the
 * output `gradientNorm`; null: no clipping
 * @param decays whether weight decay applies to a parameter; the others' rates are an input `rates.plain` [7]. Default: to all
 */
export function adamw(
  graph: Graph,
  trained: readonly string[],
  clip: number | null,
  decays: (parameter: string) => boolean = () => true,
): Graph {
  const next = graph.branch();
  for (const call of graph.calls) next.push(call);
  const states = new Map(graph.values.filter((t) => t.kind === "state").map((t) => [t.name as string, t]));
  const steps = trained.map((name) => {
    const [parameter, gradient] = [states.get(name), graph.outputs.get(gradientName(name))];
    if (!parameter || !gradient) throw new Error(`internal: adamw: '${name}' is not trained in this graph`);
    return { name, parameter, gradient };
  });
  update(next, steps, clip, decays);
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
    const moment = (which: "m" | "v") => g.state(momentName(name, which), parameter.shape, "f32");
    g.call("adamw", [parameter, gradient, moment("m"), moment("v"), rates(name), factor]);
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
