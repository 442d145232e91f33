/** Everything a model computes between tokens and logits, for every position of one sequence. */
import type { Numbers } from "../backend/backend.ts";
import type { Model } from "../model/model.ts";
import { OUTPUTS } from "./programs.ts";
import type { Request } from "./sequence.ts";
import type { Steps } from "./steps.ts";

export interface Wanted {
  /** Default true. */
  readonly logits?: boolean;
  readonly hiddenStates?: boolean;
  readonly routing?: boolean;
}

export interface Inspection {
  /** [tokens, vocab], or [tokens, classes]. Empty if not requested. */
  readonly logits: Float32Array;
  /** [tokens, hidden] before each layer, then after the final norm. Empty unless requested. */
  readonly hiddenStates: readonly Float32Array[];
  /** One per mixture layer. Empty unless requested. */
  readonly routing: readonly RoutedLayer[];
}

export interface RoutedLayer {
  readonly layer: number;
  /** [tokens, experts] */
  readonly logits: Float32Array;
  /** [tokens, chosen], best first */
  readonly experts: Int32Array;
  /** [tokens, chosen] */
  readonly weights: Float32Array;
}

/** The error of a step whose results are NaN or infinite. */
export function notFinite(): Error {
  return new Error("the model computed numbers that are not finite: its weights are damaged; 'mixtape verify' names the tensor");
}

function checkFinite(values: Numbers): void {
  let zero = 0;
  for (let i = 0; i < values.length; i++) zero += values[i] * 0; // NaN as soon as one number is not finite
  if (zero !== 0) throw notFinite();
}

/** Who waits for the result. */
export interface Watch {
  /** Aborting it ends the work before the next step. */
  readonly signal?: Request["signal"];
  /** Called after each step with how many tokens have been computed; it must not throw. */
  readonly onPrompt?: (read: number) => void;
  /** The name of a loaded adapter. Default: the base model. */
  readonly adapter?: string;
}

/** The tokens of one text, and how they are computed. */
export interface Task {
  readonly tokens: readonly number[];
  /** Blocks for all tokens. */
  readonly pages: readonly number[];
  /** Returns the next step's row limit; called before each step. */
  readonly rows: () => number;
  readonly watch: Watch;
  /** Its place in the stack of adapters. */
  readonly adapter?: number;
}

export async function inspect(
  steps: Steps,
  model: Model,
  { tokens, pages, rows, watch, adapter }: Task,
  want: Wanted,
): Promise<Inspection> {
  const { logits: wantLogits = true, hiddenStates: wantHidden = false, routing: wantRouting = false } = want;
  const { layers, experts, chosen } = model.mixtures;
  const n = tokens.length;
  const width = model.classes ?? model.vocabSize;
  const logits = new Float32Array(wantLogits ? n * width : 0);
  const hiddenStates = wantHidden ? Array.from({ length: model.layers + 1 }, () => new Float32Array(n * model.hiddenSize)) : [];
  const routing = (wantRouting ? layers : []).map((layer) => ({
    layer,
    logits: new Float32Array(n * experts),
    experts: new Int32Array(n * chosen),
    weights: new Float32Array(n * chosen),
  }));
  let next = 0;
  while (next < n) {
    if (watch.signal?.aborted) throw watch.signal.reason;
    const from = next;
    const to = Math.min(n, from + rows());
    const part = (all: Numbers, each: number) => all.subarray(from * each, to * each);
    const outputs: Record<string, Numbers> = {};
    if (wantLogits) outputs[OUTPUTS.logits] = part(logits, width);
    hiddenStates.forEach((h, i) => {
      outputs[OUTPUTS.hidden(i)] = part(h, model.hiddenSize);
    });
    for (const r of routing) {
      const names = OUTPUTS.routing(r.layer);
      outputs[names.logits] = part(r.logits, experts);
      outputs[names.experts] = part(r.experts, chosen);
      outputs[names.weights] = part(r.weights, chosen);
    }
    const picked = Int32Array.from({ length: wantLogits ? to - from : 0 }, (_, i) => i);
    await steps.run([{ ids: tokens.slice(from, to), start: from, pages, adapter }], picked, null, outputs);
    watch.onPrompt?.(to);
    for (const values of Object.values(outputs)) checkFinite(values);
    next = to;
  }
  return { logits, hiddenStates, routing };
}

/** The mean over all positions of the hidden state after the final norm, [hidden]. */
export async function meanHidden(
  steps: Steps,
  { hiddenSize, layers }: Model,
  { tokens, pages, rows, watch, adapter }: Task,
): Promise<Float32Array> {
  const sum = new Float64Array(hiddenSize);
  let from = 0;
  while (from < tokens.length) {
    if (watch.signal?.aborted) throw watch.signal.reason;
    const ids = tokens.slice(from, from + rows());
    const states = new Float32Array(ids.length * hiddenSize);
    await steps.run([{ ids, start: from, pages, adapter }], new Int32Array(), null, { [OUTPUTS.hidden(layers)]: states });
    watch.onPrompt?.(from + ids.length);
    checkFinite(states);
    states.forEach((x, i) => {
      sum[i % hiddenSize] += x;
    });
    from += ids.length;
  }
  return Float32Array.from(sum, (x) => x / tokens.length);
}
