/**
 * Decides which tokens of which sequences the next step computes: one token of everyone who is generating, then as much
 * of the waiting prompts as the step has room for, owners taking turns. When cache blocks run out, the youngest sequence
 * gives its own back and is computed again later; no token is lost. Computes nothing itself.
 */
import { BLOCK_TOKENS, type Blocks, ROOT } from "./blocks.ts";
import type { Sequence } from "./sequence.ts";

export interface BatchEntry {
  readonly sequence: Sequence;
  /** How many of its tokens this step computes, from `sequence.cached` on. */
  readonly count: number;
  /** True if they are its last, so that a new token follows. */
  readonly samples: boolean;
}

export interface SchedulerOptions {
  /** Rows of a step at most: longer prompts are computed in pieces. */
  readonly maxRows: number;
  /** Sequences that have blocks at the same time. */
  readonly maxSequences: number;
  /** Reuse blocks that hold the same beginning. */
  readonly prefixCache: boolean;
}

export class Scheduler {
  readonly #blocks: Blocks;
  readonly #options: SchedulerOptions;
  /** Sequences with blocks, in the order in which they got them. */
  readonly #running = new Set<Sequence>();
  /** The others by owner, in order of arrival. */
  readonly #waiting = new Map<string, Sequence[]>();
  /** Rows of prompts that each owner has had, beyond those of the owner who had least (https://dl.acm.org/doi/10.1145/75246.75248). */
  readonly #served = new Map<string, number>();
  /** Sequences that gave their blocks up. */
  preemptions = 0;

  constructor(blocks: Blocks, options: SchedulerOptions) {
    this.#blocks = blocks;
    this.#options = options;
  }

  get busy(): boolean {
    return this.#running.size > 0 || this.#waiting.size > 0;
  }

  get running(): number {
    return this.#running.size;
  }

  get waiting(): number {
    let count = 0;
    for (const queue of this.#waiting.values()) count += queue.length;
    return count;
  }

  add(sequence: Sequence): void {
    this.#enqueue(sequence, "last");
  }

  /**
   * The next step; empty when everyone has gone, or waits for blocks that others hold.
   * @param promptRows rows of prompts at most where others generate: bounds how long those wait for their next token
   */
  next(promptRows: number): BatchEntry[] {
    this.#dropLeft();
    const { maxRows } = this.#options;
    const batch = new Map<Sequence, BatchEntry>();
    const take = (sequence: Sequence, count: number) => {
      const pending = sequence.tokens.length - sequence.cached;
      batch.set(sequence, { sequence, count, samples: count === pending });
    };
    let room = maxRows;
    for (const sequence of this.#running) {
      if (room === 0) break;
      if (sequence.tokens.length - sequence.cached !== 1) continue;
      if (!this.#makeRoom(sequence, sequence.cached + 1, batch)) continue;
      take(sequence, 1);
      room--;
    }
    if (batch.size > 0) room = Math.min(room, promptRows);
    while (room > 0) {
      const sequence = this.#nextReader(batch);
      if (!sequence) break;
      const count = Math.min(sequence.tokens.length - sequence.cached, room);
      if (!this.#makeRoom(sequence, sequence.cached + count, batch)) break;
      take(sequence, count);
      this.#charge(sequence.owner, count);
      room -= count;
    }
    return [...batch.values()];
  }

  /** Remembers the blocks that a step filled, so that others may share them. Only of steps that went well. */
  settle(sequence: Sequence, count: number): void {
    sequence.cached += count;
    if (!this.#options.prefixCache) return;
    while (sequence.chained < Math.floor(sequence.cached / BLOCK_TOKENS)) {
      const block = sequence.pages[sequence.chained];
      sequence.entry = this.#blocks.remember(block, sequence.entry, sequence.tokens, sequence.chained * BLOCK_TOKENS);
      sequence.chained++;
    }
  }

  /** Forgets a sequence and takes its blocks back. */
  remove(sequence: Sequence): void {
    this.#running.delete(sequence);
    this.#blocks.release(sequence.pages);
    const queue = this.#waiting.get(sequence.owner);
    const at = queue?.indexOf(sequence) ?? -1;
    if (queue && at >= 0) queue.splice(at, 1);
    if (queue?.length === 0) this.#waiting.delete(sequence.owner);
    if (!this.busy) this.#served.clear();
  }

  #dropLeft(): void {
    const left: Sequence[] = [];
    for (const queue of [this.#running, ...this.#waiting.values()])
      for (const s of queue) {
        if (s.aborted && !s.done) s.fail(s.request.signal?.reason);
        if (s.done) left.push(s);
      }
    for (const s of left) this.remove(s);
  }

  /** Who reads its prompt next: a sequence that has begun, then one that waits, of the owner who had least so far. */
  #nextReader(batch: ReadonlyMap<Sequence, BatchEntry>): Sequence | null {
    let best: Sequence | null = null;
    for (const s of this.#running)
      if (!batch.has(s) && s.tokens.length > s.cached && (!best || this.#had(s.owner) < this.#had(best.owner))) best = s;
    if (this.#running.size >= this.#options.maxSequences) return best;
    let newcomer: Sequence | null = null;
    for (const [owner, [first]] of this.#waiting) if (!newcomer || this.#had(owner) < this.#had(newcomer.owner)) newcomer = first;
    if (!newcomer || (best && this.#had(best.owner) <= this.#had(newcomer.owner))) return best;
    // At least its next block must be free: a newcomer takes blocks from nobody.
    const prefix = this.#options.prefixCache ? Math.floor((newcomer.tokens.length - 1) / BLOCK_TOKENS) : 0;
    const { pages, entry } = this.#blocks.match(newcomer.tokens, prefix);
    const wanted = Math.min(newcomer.tokens.length, pages.length * BLOCK_TOKENS + this.#options.maxRows);
    if (Math.ceil(wanted / BLOCK_TOKENS) - pages.length > this.#blocks.free) {
      this.#blocks.release(pages);
      return best;
    }
    this.#dequeue(newcomer);
    newcomer.start(pages, entry);
    this.#running.add(newcomer);
    return newcomer;
  }

  /** Gets blocks for `tokens` of a sequence, if need be from the youngest sequence that came after it. */
  #makeRoom(sequence: Sequence, tokens: number, batch: Map<Sequence, BatchEntry>): boolean {
    while (!this.#blocks.cover(sequence.pages, tokens)) {
      let youngest: Sequence | null = null;
      for (const s of this.#running) youngest = s;
      if (!youngest || youngest === sequence) return false;
      this.#running.delete(youngest);
      this.#blocks.release(youngest.pages);
      youngest.start([], ROOT);
      batch.delete(youngest);
      this.#enqueue(youngest, "first");
      this.preemptions++;
    }
    return true;
  }

  #enqueue(sequence: Sequence, place: "first" | "last"): void {
    const { owner } = sequence;
    const queue = this.#waiting.get(owner);
    if (!queue) {
      // Who was away has no claim on the past: it starts level with whoever of those here had least.
      const here = new Set([...this.#waiting.keys(), ...[...this.#running].map((s) => s.owner)]);
      if (place === "last" && here.size > 0 && !here.has(owner))
        this.#served.set(owner, Math.max(this.#had(owner), Math.min(...[...here].map((o) => this.#had(o)))));
      this.#waiting.set(owner, [sequence]);
    } else if (place === "first") queue.unshift(sequence);
    else queue.push(sequence);
  }

  #dequeue(sequence: Sequence): void {
    const queue = this.#waiting.get(sequence.owner) as Sequence[];
    queue.shift();
    if (queue.length === 0) this.#waiting.delete(sequence.owner);
  }

  #had(owner: string): number {
    return this.#served.get(owner) ?? 0;
  }

  #charge(owner: string, rows: number): void {
    this.#served.set(owner, this.#had(owner) + rows);
  }
}
