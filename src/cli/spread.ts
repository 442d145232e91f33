/** Statistics of repeated measurements: the median, minimum and maximum. */

export interface Spread {
  readonly median: number;
  readonly least: number;
  readonly most: number;
  /** In the order of measurement. */
  readonly values: readonly number[];
}

export function spread(values: readonly number[]): Spread {
  const sorted = [...values].sort((a, b) => a - b);
  const [low, high] = [sorted[(sorted.length - 1) >> 1], sorted[sorted.length >> 1]];
  return { median: (low + high) / 2, least: sorted[0], most: sorted[sorted.length - 1], values };
}

/** For values measured in turns: the ratio of each pair, `second` to `first`. */
export function ratios(first: Spread, second: Spread): Spread {
  return spread(first.values.map((x, i) => second.values[i] / x));
}
