/** Figures about a data set, for a dry run. Knows lengths and labels only. */

export interface LengthStatistics {
  readonly examples: number;
  /** Of all examples; `trained`: those that are learnt. */
  readonly tokens: number;
  readonly trained: number;
  readonly shortest: number;
  readonly mean: number;
  readonly median: number;
  readonly p95: number;
  readonly longest: number;
}

/** Figures of lengths. All zero where there are no examples. */
export function lengthStatistics(n: number, tokensOf: (i: number) => number, trainedOf: (i: number) => number): LengthStatistics {
  const lengths = new Uint32Array(n);
  let [tokens, trained] = [0, 0];
  for (let i = 0; i < n; i++) {
    lengths[i] = tokensOf(i);
    tokens += lengths[i];
    trained += trainedOf(i);
  }
  lengths.sort();
  /** The smallest length that so large a share of examples does not exceed. */
  const quantile = (share: number) => lengths[Math.max(0, Math.ceil(share * n) - 1)] ?? 0;
  return {
    examples: n,
    tokens,
    trained,
    shortest: quantile(0),
    mean: n === 0 ? 0 : tokens / n,
    median: quantile(0.5),
    p95: quantile(0.95),
    longest: quantile(1),
  };
}

export interface DataStatistics extends LengthStatistics {
  /** Rows that could not be used, examples that were cut, and that were left out because of their length. */
  readonly badRows: number;
  readonly truncated: number;
  readonly skipped: number;
  /** Rows of each class, in the order of their ids; null but for a classifier. */
  readonly labels: Readonly<Record<string, number>> | null;
  /** Sequences of the first epoch with packing, and which share of their room holds tokens; null without packing. */
  readonly packing: { readonly sequences: number; readonly filled: number } | null;
}
