/** Shapes: fixed sizes, and symbolic sizes that are known only when a step runs. No data. */

/** A size that is known at run time: `times` x the value of `symbol` (for example, 6 expert slots for each of `rows` tokens). */
export interface SymbolicDim {
  readonly symbol: string;
  readonly times: number;
}

export type Dim = number | SymbolicDim;
export type Shape = readonly Dim[];

/** Values of symbols: those of one run, or the maximum values that a plan allocates for. */
export type SymbolValues = Readonly<Record<string, number>>;

/** A symbolic size: `times` x the value of `name`. */
export function symbol(name: string, times = 1): SymbolicDim {
  return { symbol: name, times };
}

/** Multiplies a size: `by` x `dim`. */
export function times(dim: Dim, by: number): Dim {
  return typeof dim === "number" ? dim * by : { symbol: dim.symbol, times: dim.times * by };
}

export function sameDim(a: Dim | undefined, b: Dim | undefined): boolean {
  if (a === undefined || b === undefined) return false;
  if (typeof a === "number" || typeof b === "number") return a === b;
  return a.symbol === b.symbol && a.times === b.times;
}

export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((d, i) => sameDim(d, b[i]));
}

/** Evaluates a size. Throws if its symbol has no value. */
export function sizeOf(dim: Dim, values: SymbolValues): number {
  if (typeof dim === "number") return dim;
  const value = values[dim.symbol];
  if (value === undefined) throw new Error(`internal: no value for the size '${dim.symbol}'`);
  return value * dim.times;
}

/** The number of elements of a shape. */
export function elements(shape: Shape, values: SymbolValues = {}): number {
  return shape.reduce<number>((n, d) => n * sizeOf(d, values), 1);
}

/** Formats a shape for error messages, for example `[rows,64]` or `[6*rows,1536]`. */
export function showShape(shape: Shape): string {
  return `[${shape.map((d) => (typeof d === "number" ? d : d.times === 1 ? d.symbol : `${d.times}*${d.symbol}`)).join(",")}]`;
}
