/** Everything a model computes on the way from tokens to logits, of every position of one sequence. */
import type { Numbers } from "../backend/backend.ts";
import type { ErnieConfig } from "../model/config.ts";
import type { Programs, Purpose } from "./programs.ts";
import type { Steps } from "./steps.ts";

export interface Wanted {
  /** Default true. */
  readonly logits?: boolean;
  readonly hiddenStates?: boolean;
  readonly routing?: boolean;
}

export interface Inspection {
  /** [tokens, vocab]. Empty where they are not wanted. */
  readonly logits: Float32Array;
  /** [tokens, hidden] before each layer, then after the final norm. Empty unless asked for. */
  readonly hiddenStates: readonly Float32Array[];
  /** Of each mixture layer. Empty unless asked for. */
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

const NOTHING = new Int32Array();

/** @param pages blocks for all tokens @param rows tokens of the next step at most, asked for before each */
export async function inspect(
  steps: Steps,
  programs: Programs,
  tokens: readonly number[],
  pages: readonly number[],
  rows: () => number,
  want: Wanted,
): Promise<Inspection> {
  const { config, mixtures } = programs;
  const { logits: wantLogits = true, hiddenStates: wantHidden = false, routing: wantRouting = false } = want;
  const purpose: Purpose = { kind: "inspect", logits: wantLogits, hiddenStates: wantHidden, routing: wantRouting };
  const n = tokens.length;
  const [experts, chosen] = [config.moe?.experts ?? 0, config.moe?.chosen ?? 0];
  const logits = new Float32Array(wantLogits ? n * config.vocabSize : 0);
  const hiddenStates = wantHidden ? Array.from({ length: config.layers + 1 }, () => new Float32Array(n * config.hiddenSize)) : [];
  const routing = (wantRouting ? mixtures : []).map((layer) => ({
    layer,
    logits: new Float32Array(n * experts),
    experts: new Int32Array(n * chosen),
    weights: new Float32Array(n * chosen),
  }));
  let next = 0;
  while (next < n) {
    const from = next;
    const to = Math.min(n, from + rows());
    const part = <T extends Numbers>(all: T, width: number) => all.subarray(from * width, to * width) as T;
    const outputs: Numbers[] = hiddenStates.map((h) => part(h, config.hiddenSize));
    if (wantLogits) outputs.unshift(part(logits, config.vocabSize));
    for (const r of routing) outputs.push(part(r.logits, experts), part(r.experts, chosen), part(r.weights, chosen));
    const picked = wantLogits ? Int32Array.from({ length: to - from }, (_, i) => i) : NOTHING;
    await steps.run(purpose, [{ ids: tokens.slice(from, to), start: from, pages }], picked, [], outputs);
    next = to;
  }
  return { logits, hiddenStates, routing };
}

/** The mean over all positions of the hidden state after the final norm, [hidden]. */
export async function meanHidden(
  steps: Steps,
  config: ErnieConfig,
  tokens: readonly number[],
  pages: readonly number[],
  rows: () => number,
): Promise<Float32Array> {
  const { hiddenSize } = config;
  const sum = new Float64Array(hiddenSize);
  let from = 0;
  while (from < tokens.length) {
    const ids = tokens.slice(from, from + rows());
    const states = new Float32Array(ids.length * hiddenSize);
    await steps.run({ kind: "hidden" }, [{ ids, start: from, pages }], NOTHING, [], [states]);
    states.forEach((x, i) => {
      sum[i % hiddenSize] += x;
    });
    from += ids.length;
  }
  return Float32Array.from(sum, (x) => x / tokens.length);
}
