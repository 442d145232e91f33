/** In which order the examples of an epoch come, and which are packed together. Pure functions of lengths and seeds. */
import { Random } from "../random.ts";

/**
 * The numbers 0 to n - 1 in an order that depends on the seed and the epoch alone.
 * @param groups where groups begin whose members are read together: groups are put into random order, then the members of each
 */
export function shuffled(n: number, seed: number, epoch: number, groups: readonly number[] = [0]): Uint32Array {
  const random = new Random(seed, "epoch", epoch);
  const order = new Uint32Array(n);
  const starts = groups[0] === 0 ? groups : [0, ...groups];
  let at = 0;
  for (const g of random.shuffle(Uint32Array.from(starts.keys()))) {
    const [from, to] = [starts[g], starts[g + 1] ?? n];
    for (let i = from; i < to; i++) order[at + i - from] = i;
    random.shuffle(order.subarray(at, at + to - from));
    at += to - from;
  }
  return order;
}

/** Packed examples: pack p holds `order[starts[p]]` to `order[starts[p + 1] - 1]`. */
export interface Packing {
  readonly order: Uint32Array;
  /** One more than there are packs. */
  readonly starts: Uint32Array;
}

/**
 * Packs examples into sequences of at most `capacity` tokens: first-fit decreasing (https://en.wikipedia.org/wiki/First-fit-decreasing_bin_packing)
 * within each window of so many examples, so that the order stays random beyond it. Packs of a window come in the order of their first example.
 * @param lengthOf an example's tokens, at most `capacity`
 */
export function packed(order: Uint32Array, lengthOf: (example: number) => number, capacity: number, window: number): Packing {
  const packedOrder = new Uint32Array(order.length);
  const starts: number[] = [0];
  let at = 0;
  for (let from = 0; from < order.length; from += window) {
    const places = Array.from({ length: Math.min(window, order.length - from) }, (_, i) => from + i);
    const sizes = new Map(places.map((place) => [place, lengthOf(order[place])]));
    const size = (place: number) => sizes.get(place) ?? 0;
    places.sort((a, b) => size(b) - size(a) || a - b);
    const packs: number[][] = [];
    const tree = new FirstFit(places.length, capacity);
    for (const place of places) {
      const p = tree.take(size(place));
      packs[p] ??= [];
      packs[p].push(place);
    }
    for (const pack of packs) pack.sort((a, b) => a - b);
    packs.sort((a, b) => a[0] - b[0]);
    for (const pack of packs) {
      for (const place of pack) packedOrder[at++] = order[place];
      starts.push(at);
    }
  }
  return { order: packedOrder, starts: Uint32Array.from(starts) };
}

/** Finds the first of n equal bins that has room, in log n steps: a tree of the largest room below each node. */
class FirstFit {
  readonly #leaves: number;
  readonly #room: Float64Array;

  constructor(n: number, capacity: number) {
    this.#leaves = 2 ** Math.ceil(Math.log2(Math.max(1, n)));
    this.#room = new Float64Array(2 * this.#leaves).fill(capacity);
  }

  /** Puts `size` into the first bin that has room for it, and returns that bin. */
  take(size: number): number {
    let node = 1;
    while (node < this.#leaves) node = this.#room[2 * node] >= size ? 2 * node : 2 * node + 1;
    const bin = node - this.#leaves;
    this.#room[node] -= size;
    for (node >>= 1; node >= 1; node >>= 1) this.#room[node] = Math.max(this.#room[2 * node], this.#room[2 * node + 1]);
    return bin;
  }
}
