/**
 * Runs blocking work in slices: after a few milliseconds of it, the event loop handles everything else. Owners take turns, so that
 * one owner's work does not hold up another's.
 */
import { setImmediate as turn } from "node:timers/promises";

/** How long pieces of work may block the event loop together. A single piece is never interrupted. */
const SLICE_MS = 5;

/** Waiting items by owner: each owner's in order of arrival, the owners in turn. */
export class Line<T> {
  /** The owner whose turn it is comes first. */
  readonly #owners = new Map<string, T[]>();

  add(owner: string, item: T): void {
    const own = this.#owners.get(owner);
    if (own) own.push(item);
    else this.#owners.set(owner, [item]);
  }

  /** Takes out the item whose turn it is; undefined: none waits. */
  next(): T | undefined {
    for (const [owner, own] of this.#owners) {
      const item = own.shift();
      this.#owners.delete(owner);
      if (own.length > 0) this.#owners.set(owner, own); // to the end of the line
      return item;
    }
    return undefined;
  }

  /** Takes out an item that no longer waits. */
  remove(owner: string, item: T): void {
    const others = this.#owners.get(owner)?.filter((each) => each !== item) ?? [];
    if (others.length > 0) this.#owners.set(owner, others);
    else this.#owners.delete(owner);
  }
}

export class Turns {
  readonly #line = new Line<() => void>();
  #running = false;
  readonly #coming: (() => void)[] = [];

  /** Runs `work` after what its owner queued before it; owners take turns. Rejects with what it throws. */
  take<T>(work: () => T, owner = ""): Promise<T> {
    return new Promise((resolve, reject) => {
      this.#line.add(owner, () => {
        try {
          resolve(work());
        } catch (error) {
          reject(error);
        }
      });
      if (!this.#running) void this.#run();
    });
  }

  async #run(): Promise<void> {
    this.#running = true;
    await null; // work never runs within `take`
    let start = performance.now();
    for (let work = this.#line.next(); work; work = this.#line.next()) {
      work();
      await null; // who waited for this work goes on before the next
      if (performance.now() - start < SLICE_MS) continue;
      await turn();
      start = performance.now();
    }
    this.#running = false;
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
}
