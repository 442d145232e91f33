/**
 * A data set: examples by number, in an order for each epoch, packed where that is wanted. What it holds of an example is a few numbers; rows are
 * read and encoded when they are asked for. The same seed, epoch and position give the same example, so that a run goes on where it stopped.
 */
import { hash32 } from "../random.ts";
import { type CausalExample, type Example, IGNORED } from "./example.ts";
import { DataError } from "./fault.ts";
import type { Problem } from "./labels.ts";
import type { ReadOptions, Task } from "./options.ts";
import { type Packing, packed, shuffled } from "./order.ts";
import { type DataStatistics, lengthStatistics } from "./statistics.ts";

/** Where examples come from. */
export interface ExampleStore {
  readonly length: number;
  /** Throws DataError for a row that has changed. */
  read(i: number): Promise<Example>;
  tokens(i: number): number;
  trained(i: number): number;
  /** A hash of what the model reads of the example's row. */
  input(i: number): number;
  /** File and line, for messages. */
  place(i: number): string;
  /** Where groups begin that are read together; [0]: each is read alone. */
  readonly groups: readonly number[];
  /** Of a classifier; null for other tasks. */
  readonly problem: Problem | null;
  /** Names of the classes; null where there are none. */
  readonly labels: readonly string[] | null;
  /** Rows of each class. */
  readonly labelCounts: Readonly<Record<string, number>> | null;
  readonly badRows: number;
  readonly truncated: number;
  readonly skipped: number;
  /** Tells one content and way of reading it from another. */
  readonly fingerprint: string;
  close(): Promise<void>;
}

export type OrderOptions = Pick<ReadOptions, "packing" | "packing_window" | "shuffle" | "seed"> & { readonly max_length: number };

/** The examples of one epoch, in its order; with packing, the packs. */
export interface Epoch<E extends Example = Example> {
  readonly length: number;
  /** Tokens of what is at a position. */
  tokens(position: number): number;
  /** Throws DataError for a position outside. */
  row(position: number): Promise<E>;
  /** What is at this position and those behind it. */
  rows(from?: number): AsyncGenerator<E>;
}

export class Dataset<E extends Example = Example> {
  readonly task: Task;
  readonly #store: ExampleStore;
  readonly #options: OrderOptions;
  /** The examples of the store that belong to it; null: all. */
  readonly #members: Uint32Array | null;

  constructor(task: Task, store: ExampleStore, options: OrderOptions, members: Uint32Array | null = null) {
    this.task = task;
    this.#store = store;
    this.#options = options;
    this.#members = members;
  }

  /** Examples: without packing, those of an epoch. */
  get length(): number {
    return this.#members?.length ?? this.#store.length;
  }

  /** What a classifier predicts; null for other tasks. */
  get problem(): Problem | null {
    return this.#store.problem;
  }

  /** Names of a classifier's classes in the order of their ids; null for other tasks and for regression. */
  get labels(): readonly string[] | null {
    return this.#store.labels;
  }

  /** Changes with the content of any row, with the tokenizer and with the options. A run that goes on compares it. */
  get fingerprint(): string {
    if (this.#members === null) return this.#store.fingerprint;
    return `${this.#store.fingerprint}-${hash32(this.#members.join()).toString(16)}`;
  }

  /** Example `i` in the order of the files. Throws DataError for a number outside, and for a row that has changed. */
  async row(i: number): Promise<E> {
    return (await this.#store.read(this.#member(i))) as E;
  }

  /** The examples from `from` on, in the order of the files. */
  async *rows(from = 0): AsyncGenerator<E> {
    for (let i = from; i < this.length; i++) yield await this.row(i);
  }

  /** Tokens of example `i`. */
  tokens(i: number): number {
    return this.#store.tokens(this.#member(i));
  }

  /** File and line of example `i`, for messages. */
  place(i: number): string {
    return this.#store.place(this.#member(i));
  }

  /**
   * The order of an epoch, counted from 0. The same for the same seed, epoch, options and data.
   * @param options in place of the data set's own, such as `{ shuffle: false }` to evaluate
   */
  epoch(epoch: number, options: Partial<OrderOptions> = {}): Epoch<E> {
    const { packing, packing_window, shuffle, seed, max_length } = { ...this.#options, ...options };
    const order = shuffle ? shuffled(this.length, seed, epoch, this.#groups()) : Uint32Array.from({ length: this.length }, (_, i) => i);
    if (packing && this.task === "causal-lm") return this.#packs(packed(order, (i) => this.tokens(i), max_length, packing_window));
    return epochOf(
      order.length,
      (position) => this.tokens(order[position]),
      (position) => this.row(order[position]),
    );
  }

  /**
   * Two parts: a row belongs to the validation part if the hash of what the model reads of it, with the seed, falls into that share. Rows with the same
   * input are on the same side, and adding rows moves none. Throws DataError if a part would be empty.
   * @param fraction above 0 and below 1
   */
  split(fraction: number, seed = this.#options.seed): { readonly train: Dataset<E>; readonly validation: Dataset<E> } {
    if (!(fraction > 0 && fraction < 1)) throw new DataError(`the fraction for validation is ${fraction}; it must be above 0 and below 1`);
    const sides: [number[], number[]] = [[], []];
    for (let i = 0; i < this.length; i++) {
      const member = this.#member(i);
      sides[hash32(`${seed} ${this.#store.input(member)}`) < fraction * 2 ** 32 ? 1 : 0].push(member);
    }
    const [train, validation] = sides.map((side) => new Dataset<E>(this.task, this.#store, this.#options, Uint32Array.from(side)));
    for (const [part, name] of [
      [train, "training"],
      [validation, "validation"],
    ] as const)
      if (part.length === 0)
        throw new DataError(
          `of ${this.length} examples, a fraction of ${fraction} for validation leaves none for ${name}: give another fraction, or a file`,
        );
    return { train, validation };
  }

  statistics(): DataStatistics {
    const { badRows, truncated, skipped, labelCounts: labels } = this.#store;
    const lengths = lengthStatistics(
      this.length,
      (i) => this.tokens(i),
      (i) => this.#store.trained(this.#member(i)),
    );
    const packing = this.#options.packing && this.task === "causal-lm" ? this.#filled(lengths.tokens) : null;
    return { ...lengths, badRows, truncated, skipped, labels, packing };
  }

  /** Closes files. Parts of a split share them. */
  close(): Promise<void> {
    return this.#store.close();
  }

  #filled(tokens: number) {
    const { length } = this.epoch(0);
    return { sequences: length, filled: length === 0 ? 0 : tokens / (length * this.#options.max_length) };
  }

  #member(i: number): number {
    if (!Number.isInteger(i) || i < 0 || i >= this.length)
      throw new DataError(`there is no example ${i}: there are ${this.length}, counted from 0`);
    return this.#members?.[i] ?? i;
  }

  /** Where groups of its own examples begin. */
  #groups(): readonly number[] {
    const { groups } = this.#store;
    const members = this.#members;
    if (members === null || groups.length < 2) return groups;
    const starts: number[] = [];
    let at = 0;
    for (const start of groups) {
      while (at < members.length && members[at] < start) at++;
      if (at < members.length && starts.at(-1) !== at) starts.push(at);
    }
    return starts;
  }

  #packs({ order, starts }: Packing): Epoch<E> {
    const own = (position: number) => order.subarray(starts[position], starts[position + 1]);
    return epochOf(
      starts.length - 1,
      (position) => own(position).reduce((sum, i) => sum + this.tokens(i), 0),
      async (position) =>
        pack((await Promise.all(Array.from(own(position), (i) => this.row(i)))) as unknown as CausalExample[]) as unknown as E,
    );
  }
}

function epochOf<E extends Example>(length: number, tokens: Epoch<E>["tokens"], row: Epoch<E>["row"]): Epoch<E> {
  const within = (position: number) => {
    if (!Number.isInteger(position) || position < 0 || position >= length)
      throw new DataError(`there is no position ${position} in an epoch of ${length}`);
    return position;
  };
  return {
    length,
    tokens: (position) => tokens(within(position)),
    row: async (position) => row(within(position)),
    async *rows(from = 0) {
      for (let position = from; position < length; position++) yield await row(position);
    },
  };
}

/** Examples one behind the other, each a segment of its own. */
function pack(examples: readonly CausalExample[]): CausalExample {
  const segments: [number, number][] = [];
  let at = 0;
  for (const { input_ids } of examples) {
    segments.push([at, input_ids.length]);
    at += input_ids.length;
  }
  return {
    input_ids: examples.flatMap(({ input_ids }) => input_ids),
    // Nothing within its own document predicts a first token.
    labels: examples.flatMap(({ labels }) => labels.with(0, IGNORED)),
    segments,
  };
}
