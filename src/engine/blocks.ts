/**
 * The KV cache's memory, handed out in blocks of tokens (https://arxiv.org/abs/2309.06180). Blocks may have several holders,
 * and full ones are remembered by what they hold after their last holder left, until their room is needed. Knows no requests.
 */
import { BLOCK_TOKENS } from "../backend/backend.ts";

export { BLOCK_TOKENS } from "../backend/backend.ts";

/** Where a chain of remembered blocks begins. */
export const ROOT = 0;

export class Blocks {
  readonly count: number;
  /** Blocks without holders that hold nothing worth keeping. */
  readonly #free: number[];
  /** Remembered blocks without holders, the least recently used first. */
  readonly #idle = new Set<number>();
  readonly #holders: Int32Array;
  /** Remembered blocks by the hash of what they hold. */
  readonly #found = new Map<number, number>();
  /** Of each block the entry that continues its chain, ROOT where it is not remembered; the entry before it; and its keys. */
  readonly #entries: Float64Array;
  readonly #parents: Float64Array;
  readonly #keys: Float64Array;
  /** Entries are numbered for good, so that what follows a forgotten block is never found again. */
  #last = ROOT;

  constructor(count: number) {
    this.count = count;
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i); // the lowest first, so that memory is touched late
    this.#holders = new Int32Array(count);
    this.#entries = new Float64Array(count);
    this.#parents = new Float64Array(count);
    this.#keys = new Float64Array(count * BLOCK_TOKENS);
  }

  /** Blocks that nobody holds. */
  get free(): number {
    return this.#free.length + this.#idle.size;
  }

  /** Of those, the ones that are remembered for their contents. */
  get idle(): number {
    return this.#idle.size;
  }

  /** Grows `pages` until it covers `tokens`; false, and nothing changed, when there are too few free blocks. */
  cover(pages: number[], tokens: number): boolean {
    const wanted = Math.ceil(tokens / BLOCK_TOKENS) - pages.length;
    if (wanted > this.free) return false;
    for (let i = 0; i < wanted; i++) {
      const block = this.#free.pop() ?? this.#evict();
      this.#holders[block] = 1;
      pages.push(block);
    }
    return true;
  }

  /** Gives all of `pages` back. Those that are remembered stay so, the later ones of a chain to go before the earlier. */
  release(pages: number[]): void {
    for (const block of pages.splice(0).reverse()) this.#leave(block);
  }

  /** The longest chain of remembered blocks that `keys` (one a token) begin with, at most `limit` blocks; the caller holds them from now on. */
  match(keys: readonly number[], limit: number): { pages: number[]; entry: number } {
    const pages: number[] = [];
    let entry = ROOT;
    while (pages.length < limit) {
      const from = pages.length * BLOCK_TOKENS;
      const block = this.#find(hashOf(entry, keys, from), entry, keys, from);
      if (block === undefined) break;
      this.#idle.delete(block);
      this.#holders[block]++;
      pages.push(block);
      entry = this.#entries[block];
    }
    return { pages, entry };
  }

  /**
   * Remembers the full block `pages[at]`, which holds the tokens with these keys, behind the chain of `entry`; gives the
   * chain's new entry. Where another block holds the same already, that one takes its place in `pages`.
   */
  remember(pages: number[], at: number, entry: number, keys: readonly number[]): number {
    const from = at * BLOCK_TOKENS;
    const block = pages[at];
    const hash = hashOf(entry, keys, from);
    const known = this.#find(hash, entry, keys, from);
    if (known !== undefined) {
      if (known !== block) {
        this.#idle.delete(known);
        this.#holders[known]++;
        pages[at] = known;
        this.#leave(block);
      }
      return this.#entries[known];
    }
    const other = this.#found.get(hash);
    if (other !== undefined) this.#forget(other); // the same hash by chance: the newer one stays
    this.#found.set(hash, block);
    this.#parents[block] = entry;
    for (let i = 0; i < BLOCK_TOKENS; i++) this.#keys[block * BLOCK_TOKENS + i] = keys[from + i];
    this.#entries[block] = ++this.#last;
    return this.#last;
  }

  /** Finds none of `pages` again: their contents are in doubt. Their holders keep them. */
  forget(pages: readonly number[]): void {
    for (const block of pages) if (this.#entries[block] !== ROOT) this.#forget(block);
  }

  #leave(block: number): void {
    if (--this.#holders[block] > 0) return;
    if (this.#entries[block] !== ROOT) this.#idle.add(block);
    else this.#free.push(block);
  }

  /** The block that holds tokens with these very keys behind `entry`: the hash only says where to look. */
  #find(hash: number, entry: number, keys: readonly number[], from: number): number | undefined {
    const block = this.#found.get(hash);
    if (block === undefined || this.#parents[block] !== entry) return undefined;
    const at = block * BLOCK_TOKENS;
    for (let i = 0; i < BLOCK_TOKENS; i++) if (this.#keys[at + i] !== keys[from + i]) return undefined;
    return block;
  }

  #forget(block: number): void {
    const at = block * BLOCK_TOKENS;
    this.#found.delete(hashOf(this.#parents[block], this.#keys, at));
    this.#entries[block] = ROOT;
    if (this.#idle.delete(block)) this.#free.push(block);
  }

  #evict(): number {
    const [block] = this.#idle;
    this.#forget(block);
    return this.#free.pop() as number;
  }
}

/** FNV-1a over the entry and the low 32 bits of a block's keys. */
function hashOf(entry: number, keys: ArrayLike<number>, from: number): number {
  let hash = 0x811c9dc5 ^ (entry % 2 ** 32);
  hash = Math.imul(hash ^ Math.floor(entry / 2 ** 32), 0x01000193);
  for (let i = from; i < from + BLOCK_TOKENS; i++) {
    hash = Math.imul(hash ^ keys[i], 0x01000193);
    hash ^= hash >>> 15;
  }
  return hash;
}
