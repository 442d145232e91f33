/** The rows of a run in the order in which it takes them: a number of the epoch and a position give the same row every time. */
import { shuffled } from "./data/order.ts";
import { hash32 } from "./random.ts";

/** What a run needs of a data set; `Dataset` has it. */
export interface Rows<R> {
  readonly length: number;
  /** Tells one content from another; a run that goes on compares it. */
  readonly fingerprint: string;
  epoch(epoch: number, options?: { readonly shuffle?: boolean; readonly seed?: number }): EpochRows<R>;
}

export interface EpochRows<R> {
  readonly length: number;
  tokens(position: number): number;
  row(position: number): Promise<R>;
}

/** Rows at hand, or a data set that reads them from files. */
export type TrainingData<R> = readonly R[] | Rows<R>;

export interface OrderSettings {
  readonly seed: number;
  readonly shuffle: boolean;
  /** Rows of a step: with `grouped`, those of a step have similar lengths. */
  readonly rowsPerStep: number;
  readonly grouped: boolean;
}

/** @param lengthOfRow tokens of a row at hand */
export function rowsOf<R>(data: TrainingData<R>, name: string, lengthOfRow: (row: R) => number): Rows<R> {
  if (!Array.isArray(data)) {
    const rows = data as Rows<R>;
    if (typeof rows?.epoch !== "function") throw new RangeError(`${name} is neither an array of rows nor a data set`);
    if (rows.length === 0) throw new RangeError(`${name} is empty`);
    return rows;
  }
  const list = data as readonly R[];
  if (list.length === 0) throw new RangeError(`${name} is empty: at least one row is needed`);
  return {
    length: list.length,
    fingerprint: hash32(JSON.stringify(list.map((row) => [lengthOfRow(row), row]))).toString(16),
    epoch(epoch, { shuffle = true, seed = 0 } = {}) {
      const order = shuffle ? shuffled(list.length, seed, epoch) : Uint32Array.from(list.keys());
      return {
        length: list.length,
        tokens: (position) => lengthOfRow(list[order[position]]),
        row: async (position) => list[order[position]],
      };
    },
  };
}

/**
 * The rows of an epoch as a run takes them. With `grouped`, as transformers' sampler groups them by length: pieces of fifty steps, each
 * sorted from long to short, the longest row first.
 */
export function ordered<R>(rows: Rows<R>, epoch: number, { seed, shuffle, rowsPerStep, grouped }: OrderSettings): EpochRows<R> {
  const plain = rows.epoch(epoch, { shuffle, seed });
  if (!grouped) return plain;
  const order = Array.from({ length: plain.length }, (_, i) => i);
  const tokens = (i: number) => plain.tokens(i);
  const piece = Math.max(rowsPerStep, Math.min(50 * rowsPerStep, Math.ceil(plain.length / 4)));
  const pieces: number[][] = [];
  for (let at = 0; at < order.length; at += piece) pieces.push(order.slice(at, at + piece).sort((a, b) => tokens(b) - tokens(a) || a - b));
  const longest = pieces.reduce((best, p, i) => (tokens(p[0]) > tokens(pieces[best][0]) ? i : best), 0);
  [pieces[0][0], pieces[longest][0]] = [pieces[longest][0], pieces[0][0]];
  const sorted = pieces.flat();
  return { length: sorted.length, tokens: (p) => plain.tokens(sorted[p]), row: (p) => plain.row(sorted[p]) };
}
