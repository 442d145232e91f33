/**
 * Decides which tokens of which sequences the next step computes: one token of everyone who is generating, then as much of
 * the waiting prompts as the step has room for. Owners take turns, by the rows that each has had; so do, within an owner,
 * the oldest prompt and the one with least left. When blocks or places run out, each owner's oldest sequence comes before
 * anyone's second, and so on: the last in that order gives its blocks back and is computed again later; no token is lost.
 * Computes nothing itself.
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
  /** Sequences that have blocks at the same time; never more than there are rows. */
  readonly maxSequences: number;
  /** Reuse blocks that hold the same beginning. */
  readonly prefixCache: boolean;
}

interface Owner {
  /** In order of arrival, those that run and those that wait. */
  sequences: Sequence[];
  /** Rows that it has had, from where the owner who had least stood when it came (https://dl.acm.org/doi/10.1145/75246.75248). */
  rows: number;
  /** Whether its next rows are for the prompt with least left; else for the oldest. */
  shortest: boolean;
}

/** An owner's turn at a step's rows, and which of its prompts are still to be read. */
interface Turn {
  readonly owner: Owner;
  readers: Sequence[];
}

/** Someone who wants blocks for something that is no sequence. */
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
  /** Sequences with blocks, in the order in which they got them. */
  readonly #running = new Set<Sequence>();
  /** In order of arrival. */
  readonly #reservations: Reservation[] = [];
  #arrivals = 0;
  /** Sequences that gave their blocks up. */
  preemptions = 0;
  /** Of the step that is being made up: whether the order is known, and who has just given up. */
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

  add(sequence: Sequence): void {
    sequence.arrival = this.#arrivals++;
    const owner = this.#owners.get(sequence.owner);
    if (owner) owner.sequences.push(sequence);
    else {
      // A returning owner gets no credit for its absence: it starts level with the active owner that has used least.
      let rows = Number.POSITIVE_INFINITY;
      for (const other of this.#owners.values()) rows = Math.min(rows, other.rows);
      this.#owners.set(sequence.owner, { sequences: [sequence], rows: Number.isFinite(rows) ? rows : 0, shortest: false });
    }
  }

  /**
   * Lends blocks for `tokens` outside of any sequence, once there are enough: sequences that came later wait, or give theirs
   * back. At once where nobody must wait. To be returned with `giveBack`.
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
   * The next step; empty when everyone has gone, or waits for blocks that others hold. To be called between steps only:
   * blocks change hands.
   * @param promptRows rows of prompts at most where others generate: bounds how long those wait for their next token
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

  /** Remembers the blocks that a step filled, so that others may share them. Only of steps that went well. */
  settle(sequence: Sequence, count: number): void {
    sequence.cached += count;
    if (!this.#options.prefixCache) return;
    for (; sequence.chained < Math.floor(sequence.cached / BLOCK_TOKENS); sequence.chained++)
      sequence.entry = this.#blocks.remember(sequence.pages, sequence.chained, sequence.entry, sequence.keys);
  }

  /** Forgets a sequence and takes its blocks back. */
  remove(sequence: Sequence): void {
    this.#running.delete(sequence);
    this.#blocks.release(sequence.pages);
    const owner = this.#owners.get(sequence.owner);
    const at = owner?.sequences.indexOf(sequence) ?? -1;
    if (owner && at >= 0) owner.sequences.splice(at, 1);
    if (owner?.sequences.length === 0) this.#owners.delete(sequence.owner);
  }

  /** Removes a sequence after a step that failed: what its blocks hold is in doubt, and serves nobody again. */
  discard(sequence: Sequence): void {
    this.#blocks.forget(sequence.pages);
    this.remove(sequence);
  }

  /** Ends everything that runs or waits. */
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

  /** Serves reservations in order of arrival, if need be with blocks of sequences that came later. */
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

  /** Who has prompts to read, the owner who had least first. */
  #turns(): Turn[] {
    const turns: Turn[] = [];
    for (const owner of this.#owners.values()) {
      const readers = owner.sequences.filter((s) => !(this.#running.has(s) && generates(s)));
      if (readers.length > 0) turns.push({ owner, readers });
    }
    return turns.sort((a, b) => a.owner.rows - b.owner.rows);
  }

  /** The prompt that an owner's next rows are for; null where it has none that has blocks or can get them. */
  #nextReader(turn: Turn, batch: Map<Sequence, BatchEntry>): Sequence | null {
    const { owner } = turn;
    while (turn.readers.length > 0) {
      // Who waits longest is let in first, so that small prompts never take the room that a large one waits for.
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

  /** Gives a sequence that waits a place and blocks for all its tokens, if need be from other owners who have more. */
  #admit(sequence: Sequence, batch: Map<Sequence, BatchEntry>): boolean {
    if (this.#gaveUp.has(sequence) || sequence.arrival > (this.#reservations[0]?.arrival ?? Number.POSITIVE_INFINITY)) return false;
    const { maxSequences, prefixCache } = this.#options;
    const limit = prefixCache ? Math.floor((sequence.tokens.length - 1) / BLOCK_TOKENS) : 0;
    const { pages, entry } = this.#blocks.match(sequence.keys, limit);
    const wanted = Math.ceil(sequence.tokens.length / BLOCK_TOKENS) - pages.length;
    const fits = (spare: number) => this.#running.size < maxSequences && wanted + spare <= this.#blocks.free;
    // Some blocks are left for those who generate: a newcomer should not have to give its own up at once.
    if (!fits(this.#running.size >> 2) && !this.#makeWay(sequence, wanted, fits, batch)) {
      this.#blocks.release(pages);
      return false;
    }
    sequence.start(pages, entry);
    this.#blocks.cover(sequence.pages, sequence.tokens.length);
    this.#running.add(sequence);
    return true;
  }

  /** Has sequences of other owners that come after a newcomer give way; nobody does where all of them would not be enough. */
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

  /** Gets the block that a sequence's next token needs, if need be from one that comes after it. */
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
    sequence.start([], ROOT);
    batch?.delete(sequence);
    this.#gaveUp.add(sequence);
    this.preemptions++;
  }

  /** Numbers each owner's sequences from its oldest on; once a step, and only where somebody must give way. */
  #order(): void {
    if (this.#ordered) return;
    this.#ordered = true;
    for (const { sequences } of this.#owners.values())
      sequences.forEach((s, i) => {
        s.place = i;
      });
  }
}

/** Tokens that are not in the cache yet. */
function pending(s: Sequence): number {
  return s.tokens.length - s.cached;
}

function generates(s: Sequence): boolean {
  return s.cached > 0 && pending(s) === 1;
}

/** Whether `a` gives way to `b`. */
function comesAfter(a: Sequence, b: Sequence): boolean {
  return a.place === b.place ? a.arrival > b.arrival : a.place > b.place;
}

/** Puts a turn in its place by the rows that its owner has had, behind its equals. */
function insert(turns: Turn[], turn: Turn): void {
  let [low, high] = [0, turns.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (turns[middle].owner.rows <= turn.owner.rows) low = middle + 1;
    else high = middle;
  }
  turns.splice(low, 0, turn);
}
