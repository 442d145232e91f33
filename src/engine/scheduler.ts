/**
 * Decides which tokens the next step computes: one for each sequence that is generating, then as many prompt tokens as fit.
 * Owners take turns: the one that has used the fewest rows goes first. Within an owner, turns alternate between the oldest
 * prompt and the one with the least left to compute. When blocks or slots run out, priority goes to each owner's oldest sequence,
 * then to each owner's second, and so on; the last in that order is preempted and recomputed later, without losing a token.
 * Computes nothing itself.
 */
import { BLOCK_TOKENS, type Blocks } from "./blocks.ts";
import type { Sequence } from "./sequence.ts";

export interface BatchEntry {
  readonly sequence: Sequence;
  /** How many of its tokens this step computes, from `sequence.cached` on. */
  readonly count: number;
  /** Whether they are its last tokens, so that the step samples a new one. */
  readonly samples: boolean;
}

export interface SchedulerOptions {
  /** The most rows in a step: longer prompts are computed in chunks. */
  readonly maxRows: number;
  /** The most sequences that hold blocks at once; capped at `maxRows`. */
  readonly maxSequences: number;
  /** Reuse blocks of sequences that share a prefix. */
  readonly prefixCache: boolean;
}

interface Owner {
  /** Running and waiting, in order of arrival. */
  sequences: Sequence[];
  /** Rows used, starting from the lowest count among the owners present at its arrival (https://dl.acm.org/doi/10.1145/75246.75248). */
  rows: number;
  /** Whether its next rows go to the prompt with the least left, rather than to the oldest. */
  shortest: boolean;
}

/** An owner's turn at a step's rows, and its prompts that are not fully computed. */
interface Turn {
  readonly owner: Owner;
  readers: Sequence[];
}

/** A request for blocks outside of any sequence. */
interface Reservation {
  readonly arrival: number;
  readonly tokens: number;
  resolve(pages: number[]): void;
  reject(reason: unknown): void;
}

export class Scheduler {
  readonly #blocks: Blocks;
  readonly #options: SchedulerOptions;
  readonly #owners = new Map<string, Owner>();
  /** Sequences that hold blocks, in the order in which they got them. */
  readonly #running = new Set<Sequence>();
  /** In order of arrival. */
  readonly #reservations: Reservation[] = [];
  #arrivals = 0;
  /** How often a sequence had to give up its blocks. */
  preemptions = 0;
  /** For the step being scheduled: whether places are numbered, and which sequences were preempted. */
  #ordered = false;
  readonly #gaveUp = new Set<Sequence>();

  constructor(blocks: Blocks, options: SchedulerOptions) {
    this.#blocks = blocks;
    this.#options = { ...options, maxSequences: Math.min(options.maxSequences, options.maxRows) };
  }

  get busy(): boolean {
    return this.#owners.size > 0 || this.#reservations.length > 0;
  }

  get running(): number {
    return this.#running.size;
  }

  get waiting(): number {
    let count = this.#reservations.length - this.#running.size;
    for (const { sequences } of this.#owners.values()) count += sequences.length;
    return count;
  }

  /** Whether a sequence that is running or waiting satisfies `test`. */
  some(test: (sequence: Sequence) => boolean): boolean {
    for (const { sequences } of this.#owners.values()) if (sequences.some(test)) return true;
    return false;
  }

  add(sequence: Sequence): void {
    sequence.arrival = this.#arrivals++;
    const owner = this.#owners.get(sequence.owner);
    if (owner) owner.sequences.push(sequence);
    else {
      // An idle owner earns no credit: it starts level with the owner that has used the fewest rows.
      let rows = Number.POSITIVE_INFINITY;
      for (const other of this.#owners.values()) rows = Math.min(rows, other.rows);
      this.#owners.set(sequence.owner, { sequences: [sequence], rows: Number.isFinite(rows) ? rows : 0, shortest: false });
    }
  }

  /**
   * Lends blocks for `tokens` outside of any sequence: synchronously if they are free, else as soon as they are. Later
   * sequences wait or are preempted. Return the blocks with `giveBack`.
   */
  reserve(tokens: number): number[] | Promise<number[]> {
    const pages: number[] = [];
    const arrival = this.#arrivals++;
    if (this.#reservations.length === 0 && this.#blocks.cover(pages, tokens)) return pages;
    return new Promise((resolve, reject) => {
      this.#reservations.push({ arrival, tokens, resolve, reject });
    });
  }

  giveBack(pages: number[]): void {
    this.#blocks.release(pages);
  }

  /**
   * The next step; empty when nothing is left to run, or everything waits for blocks that are held elsewhere. Call it only
   * between steps, because it reassigns blocks.
   * @param promptRows the most prompt rows while other sequences generate: bounds how long those wait for their next token
   */
  next(promptRows: number): BatchEntry[] {
    this.#ordered = false;
    this.#gaveUp.clear();
    this.#dropLeft();
    this.#lend();
    const batch = new Map<Sequence, BatchEntry>();
    let room = this.#options.maxRows;
    const take = (sequence: Sequence, owner: Owner, count: number) => {
      batch.set(sequence, { sequence, count, samples: count === pending(sequence) });
      owner.rows += count;
      room -= count;
    };
    for (const sequence of this.#running)
      if (generates(sequence) && this.#grow(sequence, batch)) take(sequence, this.#owners.get(sequence.owner) as Owner, 1);
    if (batch.size > 0) room = Math.min(room, promptRows);
    const turns = room > 0 ? this.#turns() : [];
    while (room > 0 && turns.length > 0) {
      const turn = turns.shift() as Turn;
      const sequence = this.#nextReader(turn, batch);
      if (!sequence) continue;
      take(sequence, turn.owner, Math.min(pending(sequence), room));
      if (turn.readers.length > 0) insert(turns, turn);
    }
    return [...batch.values()];
  }

  /** Adds the blocks that a step filled to the prefix cache. Call it only for steps that succeeded. */
  settle(sequence: Sequence, count: number): void {
    sequence.cached += count;
    if (!this.#options.prefixCache) return;
    for (; sequence.chained < Math.floor(sequence.cached / BLOCK_TOKENS); sequence.chained++)
      sequence.entry = this.#blocks.remember(sequence.pages, sequence.chained, sequence.entry, sequence.keys);
  }

  /** Removes a sequence and releases its blocks. */
  remove(sequence: Sequence): void {
    this.#running.delete(sequence);
    this.#blocks.release(sequence.pages);
    const owner = this.#owners.get(sequence.owner);
    const at = owner?.sequences.indexOf(sequence) ?? -1;
    if (owner && at >= 0) owner.sequences.splice(at, 1);
    if (owner?.sequences.length === 0) this.#owners.delete(sequence.owner);
  }

  /** Removes a sequence after a failed step. Its blocks may hold garbage, so the prefix cache drops them. */
  discard(sequence: Sequence): void {
    this.#blocks.forget(sequence.pages);
    this.remove(sequence);
  }

  /** Ends all running and waiting requests. */
  close(reason: unknown): void {
    for (const { sequences } of [...this.#owners.values()])
      for (const sequence of [...sequences]) {
        sequence.fail(reason);
        this.remove(sequence);
      }
    for (const reservation of this.#reservations.splice(0)) reservation.reject(reason);
  }

  #dropLeft(): void {
    for (const [name, owner] of this.#owners) {
      let left = false;
      for (const s of owner.sequences) {
        if (s.aborted && !s.done) s.fail(s.request.signal?.reason);
        if (!s.done) continue;
        left = true;
        this.#running.delete(s);
        this.#blocks.release(s.pages);
      }
      if (left) owner.sequences = owner.sequences.filter((s) => !s.done);
      if (owner.sequences.length === 0) this.#owners.delete(name);
    }
  }

  /** Serves reservations in order of arrival, preempting later sequences if necessary. */
  #lend(): void {
    for (let first = this.#reservations[0]; first; first = this.#reservations[0]) {
      const pages: number[] = [];
      while (!this.#blocks.cover(pages, first.tokens)) {
        let youngest: Sequence | null = null;
        for (const s of this.#running) if (s.arrival > (youngest ?? first).arrival) youngest = s;
        if (!youngest) return;
        this.#preempt(youngest);
      }
      this.#reservations.shift();
      first.resolve(pages);
    }
  }

  /** Owners with prompts to compute, the one that has used the fewest rows first. */
  #turns(): Turn[] {
    const turns: Turn[] = [];
    for (const owner of this.#owners.values()) {
      const readers = owner.sequences.filter((s) => !(this.#running.has(s) && generates(s)));
      if (readers.length > 0) turns.push({ owner, readers });
    }
    return turns.sort((a, b) => a.owner.rows - b.owner.rows);
  }

  /** The prompt that gets an owner's next rows; null if none has blocks or can get them. */
  #nextReader(turn: Turn, batch: Map<Sequence, BatchEntry>): Sequence | null {
    const { owner } = turn;
    while (turn.readers.length > 0) {
      // The oldest is admitted first, so that small prompts never take the room that a large one waits for.
      let at = 0;
      if (owner.shortest && this.#running.has(turn.readers[0]))
        for (let i = 1; i < turn.readers.length; i++) if (pending(turn.readers[i]) < pending(turn.readers[at])) at = i;
      const [sequence] = turn.readers.splice(at, 1);
      if (this.#running.has(sequence) || this.#admit(sequence, batch)) {
        owner.shortest = !owner.shortest;
        return sequence;
      }
      turn.readers = turn.readers.filter((s) => this.#running.has(s));
    }
    return null;
  }

  /** Admits a waiting sequence with blocks for all its tokens, preempting other owners' lower-priority sequences if necessary. */
  #admit(sequence: Sequence, batch: Map<Sequence, BatchEntry>): boolean {
    if (this.#gaveUp.has(sequence) || sequence.arrival > (this.#reservations[0]?.arrival ?? Number.POSITIVE_INFINITY)) return false;
    const { maxSequences, prefixCache } = this.#options;
    const limit = prefixCache ? Math.floor((sequence.tokens.length - 1) / BLOCK_TOKENS) : 0;
    const { pages, entry } = this.#blocks.match(sequence.keys, limit, sequence.root);
    const wanted = Math.ceil(sequence.tokens.length / BLOCK_TOKENS) - pages.length;
    const fits = (spare: number) => this.#running.size < maxSequences && wanted + spare <= this.#blocks.free;
    // Leave some blocks for sequences that generate, or the newcomer might be preempted at once.
    if (!fits(this.#running.size >> 2) && !this.#makeWay(sequence, wanted, fits, batch)) {
      this.#blocks.release(pages);
      return false;
    }
    sequence.start(pages, entry);
    this.#blocks.cover(sequence.pages, sequence.tokens.length);
    this.#running.add(sequence);
    return true;
  }

  /** Preempts other owners' sequences that rank after a newcomer; none if all of them together would not free enough. */
  #makeWay(newcomer: Sequence, wanted: number, fits: (spare: number) => boolean, batch: Map<Sequence, BatchEntry>): boolean {
    this.#order();
    const others = [...this.#running].filter((s) => s.owner !== newcomer.owner && comesAfter(s, newcomer));
    if (others.length === 0 || others.reduce((sum, s) => sum + s.pages.length, this.#blocks.free) < wanted) return false;
    others.sort((a, b) => (comesAfter(a, b) ? 1 : -1));
    while (!fits(0)) {
      const last = others.pop();
      if (!last) return false;
      this.#preempt(last, batch);
    }
    return true;
  }

  /** Gets the block that a sequence's next token needs, preempting a sequence that ranks after it if necessary. */
  #grow(sequence: Sequence, batch: Map<Sequence, BatchEntry>): boolean {
    while (!this.#blocks.cover(sequence.pages, sequence.cached + 1)) {
      this.#order();
      let last: Sequence = sequence;
      for (const s of this.#running) if (comesAfter(s, last)) last = s;
      if (last === sequence) return false;
      this.#preempt(last, batch);
    }
    return true;
  }

  #preempt(sequence: Sequence, batch?: Map<Sequence, BatchEntry>): void {
    this.#running.delete(sequence);
    this.#blocks.release(sequence.pages);
    sequence.start([], sequence.root);
    batch?.delete(sequence);
    this.#gaveUp.add(sequence);
    this.preemptions++;
  }

  /** Numbers each owner's sequences by age. At most once per step, and only when a sequence must be preempted. */
  #order(): void {
    if (this.#ordered) return;
    this.#ordered = true;
    for (const { sequences } of this.#owners.values())
      sequences.forEach((s, i) => {
        s.place = i;
      });
  }
}

/** How many tokens are not in the cache yet. */
function pending(s: Sequence): number {
  return s.tokens.length - s.cached;
}

function generates(s: Sequence): boolean {
  return s.cached > 0 && pending(s) === 1;
}

/** Whether `a` ranks after `b` and is preempted first. */
function comesAfter(a: Sequence, b: Sequence): boolean {
  return a.place === b.place ? a.arrival > b.arrival : a.place > b.place;
}

/** Inserts a turn, ordered by the rows that its owner has used, after its equals. */
function insert(turns: Turn[], turn: Turn): void {
  let [low, high] = [0, turns.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (turns[middle].owner.rows <= turn.owner.rows) low = middle + 1;
    else high = middle;
  }
  turns.splice(low, 0, turn);
}
