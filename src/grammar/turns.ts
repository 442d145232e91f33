/** Work that holds the event loop, done piece by piece: after a few milliseconds of it, everything else has its turn. */
import { setImmediate as turn } from "node:timers/promises";

/** How long pieces may hold the event loop together. A piece itself is not cut. */
const SLICE_MS = 5;

export class Turns {
  #last: Promise<unknown> = Promise.resolve();
  #heldMs = 0;
  readonly #coming: (() => void)[] = [];

  /** Does `work` after all that was asked for before. Rejects with what it throws. */
  take<T>(work: () => T): Promise<T> {
    const done = this.#last.then(() => {
      const start = performance.now();
      try {
        return work();
      } finally {
        this.#heldMs += performance.now() - start;
      }
    });
    this.#last = done.then(this.#rest, this.#rest); // who asked hears of a failure
    return done;
  }

  /** Resolves in a turn of the event loop of its own: of those who wait, one a turn. For what comes in crowds. */
  next(): Promise<void> {
    return new Promise((resolve) => {
      this.#coming.push(resolve);
      if (this.#coming.length === 1) setImmediate(this.#release);
    });
  }

  readonly #release = (): void => {
    this.#coming.shift()?.();
    if (this.#coming.length > 0) setImmediate(this.#release);
  };

  readonly #rest = async (): Promise<void> => {
    if (this.#heldMs < SLICE_MS) return;
    this.#heldMs = 0;
    await turn();
  };
}
