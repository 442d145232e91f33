/**
 * Counts the work of compiling a shape, so that none can hold the event loop: a slice of it runs at a time, and there is a limit for
 * a slice and for all. Knows no schema.
 */
import { WorkError } from "./error.ts";

/** Steps of all slices, and of one. A step takes a few microseconds. */
export const MAX_STEPS = 100_000;
const MAX_SLICE = 3_000;

/** Work that pauses where it may: whoever runs it decides when it goes on. */
export type Steps<T> = Generator<undefined, T, undefined>;

export class Work {
  #left: number;
  #slice: number;
  readonly #most: number;
  readonly #mostSlice: number;

  constructor(most = MAX_STEPS, mostSlice = MAX_SLICE) {
    this.#left = this.#most = most;
    this.#slice = this.#mostSlice = mostSlice;
  }

  /** Charges steps before they are done. Throws SchemaError, naming `path`, once there are too many. */
  spend(steps: number, path: string): void {
    this.#left -= steps;
    this.#slice -= steps;
    if (this.#left < 0)
      throw new WorkError(path, `the schema is too large or too complex: it takes more than ${this.#most} steps to compile`);
    if (this.#slice < 0)
      throw new WorkError(
        path,
        `this part of the schema is too large or too complex: it takes more than ${this.#mostSlice} steps to compile`,
      );
  }

  /** Pauses where much has been done since the last time. */
  *pause(): Steps<void> {
    if (this.#slice > this.#mostSlice * 0.8) return;
    yield;
    this.#slice = this.#mostSlice;
  }
}

/** Runs work to its end without a pause. */
export function run<T>(steps: Steps<T>): T {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
  }
}
