/** Medians with their range, and how the benchmarks print them. */

export function quantile(list, q) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN;
}

export const median = (list) => quantile(list, 0.5);

/** The median, minimum and maximum. */
export function spread(list) {
  return { median: median(list), least: Math.min(...list), most: Math.max(...list) };
}

/** Prints one line: what was measured, its median and its range. */
export function report(what, list, unit, digits = 0) {
  const { median: middle, least, most } = spread(list);
  const text = (x) => x.toFixed(digits);
  console.log(`${what.padEnd(64)} ${text(middle).padStart(9)} ${unit}   (${text(least)} to ${text(most)})`);
}

/** The same for the ratio of two lists, taken round by round. */
export function reportRatio(what, list, other) {
  report(what, list.map((x, i) => x / other[i]), "x", 3); // biome-ignore format: a table
}
