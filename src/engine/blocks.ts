/**
 * The KV cache's memory, handed out in blocks of tokens (https://arxiv.org/abs/2309.06180). Blocks may have several holders,
 * and full ones are remembered by what they hold after their last holder left, until their room is needed. Knows no requests.
 */

/** Tokens of a block. The kernels are compiled for the same number. */
export const BLOCK_TOKENS = 32;

/** Where a chain of remembered blocks begins. */
export const ROOT = 0;

export class Blocks {
  readonly count: number;
  /** Blocks without holders that hold nothing worth keeping. */
  readonly #free: number[];
  /** Remembered blocks without holders, the least recently used first. */
  readonly #idle = new Set<number>();
  readonly #holders: Int32Array;
  /** Of each remembered block, the key that it is found by. */
  readonly #keys = new Map<number, string>();
  /** By the entry of the blocks before it and its own tokens: a block, and the entry that continues the chain. */
  readonly #remembered = new Map<string, { readonly block: number; readonly entry: number }>();
  /** Entries are numbered for good, so that what follows a forgotten block is never found again. */
  #entries = ROOT;

  constructor(count: number) {
    this.count = count;
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i); // the lowest first, so that memory is touched late
    this.#holders = new Int32Array(count);
  }

  /** Blocks that can be had: nobody holds them. */
  get free(): number {
    return this.#free.length + this.#idle.size;
  }

  /** Of those, the ones that are remembered. */
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
    for (const block of pages.splice(0).reverse()) {
      if (--this.#holders[block] > 0) continue;
      if (this.#keys.has(block)) this.#idle.add(block);
      else this.#free.push(block);
    }
  }

  /** The longest chain of remembered blocks that `tokens` begin with, at most `limit` blocks; the caller holds them from now on. */
  match(tokens: readonly number[], limit: number): { pages: number[]; entry: number } {
    const pages: number[] = [];
    let entry = ROOT;
    while (pages.length < limit) {
      const found = this.#remembered.get(keyOf(entry, tokens, pages.length * BLOCK_TOKENS));
      if (!found) break;
      this.#idle.delete(found.block);
      this.#holders[found.block]++;
      pages.push(found.block);
      entry = found.entry;
    }
    return { pages, entry };
  }

  /**
   * Remembers a full block that holds `tokens` from position `from` on, behind the chain of `entry`; gives the chain's new
   * entry. Where another block holds the same already, that one stays the remembered one.
   */
  remember(block: number, entry: number, tokens: readonly number[], from: number): number {
    const key = keyOf(entry, tokens, from);
    const known = this.#remembered.get(key);
    if (known) return known.entry;
    const made = ++this.#entries;
    this.#remembered.set(key, { block, entry: made });
    this.#keys.set(block, key);
    return made;
  }

  #evict(): number {
    const [block] = this.#idle;
    this.#idle.delete(block);
    this.#remembered.delete(this.#keys.get(block) as string);
    this.#keys.delete(block);
    return block;
  }
}

/** The ids themselves, not a hash of them: no two contents share a key. */
function keyOf(entry: number, tokens: readonly number[], from: number): string {
  return `${entry}:${tokens.slice(from, from + BLOCK_TOKENS).join()}`;
}
