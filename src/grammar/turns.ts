/** Runs blocking work in slices: after a few milliseconds of it, the event loop handles everything else. */
import { setImmediate as turn } from "node:timers/promises";

/** How long pieces of work may block the event loop together. A single piece is never interrupted. */
const SLICE_MS = 5;

export class Turns {
  #last: Promise<unknown> = Promise.resolve();
  #heldMs = 0;
  readonly #coming: (() => void)[] = [];

  /** Runs `work` after everything queued before it. Rejects with what it throws. */
  take<T>(work: () => T): Promise<T> {
    const done = this.#last.then(() => {
      const start = performance.now();
      try {
        return work();
      } finally {
        this.#heldMs += performance.now() - start;
      }
    });
    this.#last = done.then(this.#rest, this.#rest); // the caller sees a failure
    return done;
  }

  /** Resolves in an event-loop turn of its own: one waiter per turn. Spreads out bursts of requests. */
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
