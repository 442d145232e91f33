/** A random sample of a stream whose length is not known. */
import type { Random } from "../random.ts";

/** Keeps so many items of a stream, each equally likely, in their order. */
export class Reservoir<T> {
  readonly #most: number;
  readonly #random: Random;
  readonly #kept: { readonly at: number; readonly item: T }[] = [];
  #seen = 0;

  constructor(most: number, random: Random) {
    this.#most = most;
    this.#random = random;
  }

  get items(): T[] {
    return this.#kept.toSorted((a, b) => a.at - b.at).map(({ item }) => item);
  }

  add(item: T): void {
    const at = this.#seen++;
    const slot = at < this.#most ? at : this.#random.below(at + 1);
    if (slot < this.#most) this.#kept[slot] = { at, item };
  }
}
