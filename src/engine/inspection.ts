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

/** @param pages blocks for all tokens @param maxRows tokens of one step at most */
export async function inspect(
  steps: Steps,
  programs: Programs,
  tokens: readonly number[],
  pages: readonly number[],
  maxRows: number,
  want: Wanted,
): Promise<Inspection> {
  const { config, mixtures } = programs;
  const { logits: wantLogits = true, hiddenStates: wantHidden = false, routing: wantRouting = false } = want;
  const purpose: Purpose = wantHidden ? "inspect" : wantRouting ? (wantLogits ? "logits+routing" : "routing") : "logits";
  const n = tokens.length;
  const [experts, chosen] = [config.moe?.experts ?? 0, config.moe?.chosen ?? 0];
  const logits = new Float32Array(wantLogits ? n * config.vocabSize : 0);
  const hiddenStates = wantHidden ? Array.from({ length: config.layers + 1 }, () => new Float32Array(n * config.hiddenSize)) : [];
  const routing = (wantHidden || wantRouting ? mixtures : []).map((layer) => ({
    layer,
    logits: new Float32Array(n * experts),
    experts: new Int32Array(n * chosen),
    weights: new Float32Array(n * chosen),
  }));
  for (let from = 0; from < n; from += maxRows) {
    const to = Math.min(n, from + maxRows);
    const part = <T extends Numbers>(all: T, width: number) => all.subarray(from * width, to * width) as T;
    const outputs: Numbers[] = purpose === "routing" ? [] : [wantLogits ? part(logits, config.vocabSize) : logits];
    outputs.push(...hiddenStates.map((h) => part(h, config.hiddenSize)));
    for (const r of routing) outputs.push(part(r.logits, experts), part(r.experts, chosen), part(r.weights, chosen));
    const picked = wantLogits ? Int32Array.from({ length: to - from }, (_, i) => i) : NOTHING;
    await steps.run(purpose, [{ ids: tokens.slice(from, to), start: from, pages }], picked, [], outputs);
  }
  return { logits, hiddenStates, routing: wantRouting ? routing : [] };
}

/** The mean over all positions of the hidden state after the final norm, [hidden]. */
export async function meanHidden(
  steps: Steps,
  config: ErnieConfig,
  tokens: readonly number[],
  pages: readonly number[],
  maxRows: number,
): Promise<Float32Array> {
  const { hiddenSize } = config;
  const sum = new Float64Array(hiddenSize);
  for (let from = 0; from < tokens.length; from += maxRows) {
    const ids = tokens.slice(from, from + maxRows);
    const states = new Float32Array(ids.length * hiddenSize);
    await steps.run("hidden", [{ ids, start: from, pages }], NOTHING, [], [states]);
    states.forEach((x, i) => {
      sum[i % hiddenSize] += x;
    });
  }
  return Float32Array.from(sum, (x) => x / tokens.length);
}
