/** Counts how often each layer's experts were used, with what weight, and how evenly. Only numbers. */
import type { RouterOutput } from "../api/model.ts";

/** Use of one layer's experts. A token takes a layer's `chosen` experts, so there are tokens * chosen slots. */
export interface LayerUse {
  /** Index of the decoder layer, from 0. */
  readonly layer: number;
  /** Slots of each expert. */
  readonly counts: readonly number[];
  /** Share of the slots of each expert; sums to 1. */
  readonly load: readonly number[];
  /** Mean weight of each expert where it was chosen; 0 for one that never was. */
  readonly mean_weights: readonly number[];
  /** Standard deviation of the load over its mean; 0 is perfectly even. */
  readonly variation: number;
  readonly max_load: number;
  /** Entropy of the load, in bits. */
  readonly entropy: number;
  /** 2^entropy: the number of experts that, used evenly, would have this entropy. */
  readonly effective_experts: number;
  readonly unused_experts: number;
}

/** Use by layer, of `experts` experts each. */
export function countExperts(layers: readonly RouterOutput[], experts: number): LayerUse[] {
  return layers.map(({ layer, experts: chosen, weights }) => {
    const counts = new Array<number>(experts).fill(0);
    const sums = new Array<number>(experts).fill(0);
    chosen.data.forEach((e, i) => {
      counts[e]++;
      sums[e] += weights.data[i];
    });
    const load = counts.map((n) => n / chosen.data.length);
    const mean = 1 / experts;
    const entropy = load.reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
    return {
      layer,
      counts,
      load,
      mean_weights: sums.map((sum, e) => (counts[e] ? sum / counts[e] : 0)),
      variation: Math.sqrt(load.reduce((sum, p) => sum + (p - mean) ** 2, 0) / experts) / mean,
      max_load: Math.max(...load),
      entropy,
      effective_experts: 2 ** entropy,
      unused_experts: counts.filter((n) => n === 0).length,
    };
  });
}

export interface TopExpert {
  readonly layer: number;
  readonly expert: number;
  readonly load: number;
}

/** The `n` experts with the largest share of their layer's slots. */
export function topExperts(layers: readonly LayerUse[], n: number): TopExpert[] {
  return layers
    .flatMap(({ layer, load }) => load.map((share, expert) => ({ layer, expert, load: share })))
    .sort((a, b) => b.load - a.load || a.layer - b.layer || a.expert - b.expert)
    .slice(0, n);
}

/** The experts that one token chose in one layer, best first. */
export interface Choice {
  readonly experts: readonly number[];
  readonly weights: readonly number[];
}

export function choiceOf({ experts, weights }: RouterOutput, token: number): Choice {
  const k = experts.dims[1];
  const part = <T extends Float32Array | Int32Array>(data: T) => [...data.subarray(token * k, (token + 1) * k)];
  return { experts: part(experts.data), weights: part(weights.data).map((w) => Math.round(w * 1e6) / 1e6) };
}
