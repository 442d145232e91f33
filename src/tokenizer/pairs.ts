// A hash table from pairs of symbols to their merges. Symbols are signed 32-bit integers. Knows nothing of text.

/** Merges by pair. Uses open addressing in typed arrays, since a `Map` keyed by strings or doubles is several times slower. */
export class Pairs {
  private readonly mask: number;
  private readonly lefts: Int32Array;
  private readonly rights: Int32Array;
  private readonly ranks: Int32Array;
  private readonly results: Int32Array;

  /** Allocates space for up to `count` pairs. */
  constructor(count: number) {
    let capacity = 16;
    while (capacity < 2 * count) capacity *= 2;
    this.mask = capacity - 1;
    this.lefts = new Int32Array(capacity);
    this.rights = new Int32Array(capacity);
    this.ranks = new Int32Array(capacity).fill(-1);
    this.results = new Int32Array(capacity);
  }

  /** Sets the merge of a pair, replacing any earlier one. */
  set(left: number, right: number, rank: number, result: number): void {
    const slot = this.slot(left, right);
    this.lefts[slot] = left;
    this.rights[slot] = right;
    this.ranks[slot] = rank;
    this.results[slot] = result;
  }

  /** The slot of a pair, to pass to `rank` and `result`. */
  slot(left: number, right: number): number {
    let hash = Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b);
    hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d);
    let slot = (hash ^ (hash >>> 13)) & this.mask;
    while (this.ranks[slot] !== -1 && (this.lefts[slot] !== left || this.rights[slot] !== right)) slot = (slot + 1) & this.mask;
    return slot;
  }

  /** The rank of a merge: lower ranks merge first; -1 if the pair does not merge. */
  rank(slot: number): number {
    return this.ranks[slot] ?? -1;
  }

  result(slot: number): number {
    return this.results[slot] ?? 0;
  }
}
