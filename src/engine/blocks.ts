/**
 * Allocates the KV cache's memory in blocks of tokens (https://arxiv.org/abs/2309.06180). Blocks may have several holders. Full
 * ones stay in the prefix cache, found by their contents, after their last holder leaves until their memory is needed. Knows no requests.
 */
import { BLOCK_TOKENS } from "../backend/backend.ts";

export { BLOCK_TOKENS } from "../backend/backend.ts";

/** The entry where every chain of remembered blocks begins that the base model computed. Those of adapters begin at the largest numbers. */
export const ROOT = 0;

export class Blocks {
  readonly count: number;
  /** Blocks with neither holders nor remembered contents. */
  readonly #free: number[];
  /** Remembered blocks without holders, least recently used first. */
  readonly #idle = new Set<number>();
  readonly #holders: Int32Array;
  /** Remembered blocks by the hash of their contents. */
  readonly #found = new Map<number, number>();
  /** For each block: its entry in a chain, ROOT if not remembered; the entry before it; and its tokens' keys. */
  readonly #entries: Float64Array;
  readonly #parents: Float64Array;
  readonly #keys: Float64Array;
  /** Entry numbers are never reused, so successors of a forgotten block are never found again. */
  #last = ROOT;

  constructor(count: number) {
    this.count = count;
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i); // lowest first, so that memory is touched as late as possible
    this.#holders = new Int32Array(count);
    this.#entries = new Float64Array(count);
    this.#parents = new Float64Array(count);
    this.#keys = new Float64Array(count * BLOCK_TOKENS);
  }

  /** How many blocks have no holder and can be allocated. */
  get free(): number {
    return this.#free.length + this.#idle.size;
  }

  /** How many of those are remembered. */
  get idle(): number {
    return this.#idle.size;
  }

  /** Grows `pages` until it covers `tokens`. Returns false and changes nothing if there are too few free blocks. */
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

  /** Releases all of `pages`. Remembered ones stay so; the later blocks of a chain are evicted before the earlier. */
  release(pages: number[]): void {
    for (const block of pages.splice(0).reverse()) this.#leave(block);
  }

  /** The longest chain of remembered blocks from `root` on that is a prefix of `keys` (one per token), at most `limit` blocks. The caller now holds them. */
  match(keys: readonly number[], limit: number, root = ROOT): { pages: number[]; entry: number } {
    const pages: number[] = [];
    let entry = root;
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
   * Remembers the full block `pages[at]`, which holds the tokens with these keys, after `entry`, and returns the chain's new
   * entry. If another block already holds the same, it replaces this one in `pages`.
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
    if (other !== undefined) this.#forget(other); // a hash collision: keep the newer one
    this.#found.set(hash, block);
    this.#parents[block] = entry;
    for (let i = 0; i < BLOCK_TOKENS; i++) this.#keys[block * BLOCK_TOKENS + i] = keys[from + i];
    this.#entries[block] = ++this.#last;
    return this.#last;
  }

  /** Drops `pages` from the prefix cache because their contents may be wrong. Holders keep them. */
  forget(pages: readonly number[]): void {
    for (const block of pages) if (this.#entries[block] !== ROOT) this.#forget(block);
  }

  #leave(block: number): void {
    if (--this.#holders[block] > 0) return;
    if (this.#entries[block] !== ROOT) this.#idle.add(block);
    else this.#free.push(block);
  }

  /** The block that holds tokens with exactly these keys after `entry`; the hash only says where to look. */
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
