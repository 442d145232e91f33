/**
 * Decides which tokens of which sequences the next step computes: one token of everyone who is generating, then as much
 * of the waiting prompts as the step has room for. When cache blocks run out, the youngest sequence gives its own back
 * and is computed again later; no token is lost.
 */
import type { Blocks } from "./blocks.ts";
import type { Sequence } from "./sequence.ts";

export interface BatchEntry {
  readonly sequence: Sequence;
  /** How many of its tokens this step computes, from `sequence.cached` on. */
  readonly count: number;
  /** True if they are its last, so that a new token follows. */
  readonly samples: boolean;
}

export class Scheduler {
  /** In order of arrival. */
  readonly #sequences: Sequence[] = [];
  readonly #blocks: Blocks;
  readonly #maxRows: number;

  /** @param maxRows rows of a step at most: longer prompts are computed in pieces */
  constructor(blocks: Blocks, maxRows: number) {
    this.#blocks = blocks;
    this.#maxRows = maxRows;
  }

  get busy(): boolean {
    return this.#sequences.length > 0;
  }

  add(sequence: Sequence): void {
    this.#sequences.push(sequence);
  }

  /** The next step; empty when everyone has gone. */
  next(): BatchEntry[] {
    for (const s of [...this.#sequences]) {
      if (s.aborted && !s.done) s.fail(s.request.signal?.reason);
      if (s.done) this.remove(s);
    }
    const pending = (s: Sequence) => s.tokens.length - s.cached;
    const generating = this.#sequences.filter((s) => s.cached > 0 && pending(s) === 1);
    const reading = this.#sequences.filter((s) => !generating.includes(s));
    const batch: BatchEntry[] = [];
    let room = this.#maxRows;
    for (const sequence of [...generating, ...reading]) {
      if (room === 0) break;
      const count = Math.min(pending(sequence), room);
      if (!this.#makeRoom(sequence, sequence.cached + count, batch)) continue;
      batch.push({ sequence, count, samples: count === pending(sequence) });
      room -= count;
    }
    return batch.filter((e) => e.sequence.pages.length > 0); // some may have been put off for the sake of older ones
  }

  /** Forgets a sequence and takes its blocks back. */
  remove(sequence: Sequence): void {
    this.#blocks.release(sequence.pages);
    const at = this.#sequences.indexOf(sequence);
    if (at >= 0) this.#sequences.splice(at, 1);
  }

  /** Gets blocks for `tokens` of a sequence, if need be from the youngest sequence that came after it. */
  #makeRoom(sequence: Sequence, tokens: number, batch: BatchEntry[]): boolean {
    while (!this.#blocks.cover(sequence.pages, tokens)) {
      const youngest = this.#sequences.findLast((s) => s.pages.length > 0);
      if (!youngest || this.#sequences.indexOf(youngest) <= this.#sequences.indexOf(sequence)) return false;
      this.#blocks.release(youngest.pages);
      youngest.cached = 0;
      const at = batch.findIndex((e) => e.sequence === youngest);
      if (at >= 0) batch.splice(at, 1);
    }
    return true;
  }
}
