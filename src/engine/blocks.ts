/** The KV cache's memory, handed out in blocks of tokens. Knows how many are free, not who asks (https://arxiv.org/abs/2309.06180). */

/** Tokens of a block. The kernels are compiled for the same number. */
export const BLOCK_TOKENS = 32;

export class Blocks {
  readonly count: number;
  readonly #free: number[];

  constructor(count: number) {
    this.count = count;
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i); // the lowest first, so that memory is touched late
  }

  get free(): number {
    return this.#free.length;
  }

  /** Grows `pages` until it covers `tokens`; false, and nothing changed, when there are too few free blocks. */
  cover(pages: number[], tokens: number): boolean {
    const wanted = Math.ceil(tokens / BLOCK_TOKENS) - pages.length;
    if (wanted > this.#free.length) return false;
    for (let i = 0; i < wanted; i++) pages.push(this.#free.pop() as number);
    return true;
  }

  /** Takes all of `pages` back. */
  release(pages: number[]): void {
    this.#free.push(...pages.splice(0).reverse());
  }
}
