// Watches a text that arrives in pieces for strings that end it, and holds back what may become one. Knows no tokens.

/** What a piece of text came to. */
export interface Watched {
  /** Text that no stop string can begin in any more. */
  readonly text: string;
  /** True once a stop string has occurred; what follows it is dropped. */
  readonly stopped: boolean;
}

export class StopStrings {
  readonly #stops: readonly string[];
  readonly #longest: number;
  #held = "";
  #stopped = false;

  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((s) => s !== "");
    this.#longest = Math.max(0, ...this.#stops.map((s) => s.length));
  }

  /** Takes the next piece. The text of all pieces together, and of `finish`, is that before the first stop string. */
  push(piece: string): Watched {
    if (this.#stopped) return { text: "", stopped: true };
    this.#held += piece;
    const found = this.#stops.map((s) => this.#held.indexOf(s)).filter((at) => at >= 0);
    if (found.length > 0) {
      this.#stopped = true;
      return { text: this.#take(Math.min(...found)), stopped: true };
    }
    // Hold the longest end that a stop string begins with.
    let keep = Math.min(this.#longest - 1, this.#held.length);
    while (keep > 0 && !this.#stops.some((s) => s.startsWith(this.#held.slice(this.#held.length - keep)))) keep--;
    return { text: this.#take(this.#held.length - Math.max(keep, 0)), stopped: false };
  }

  /** What is still held when the text ends by itself. */
  finish(): string {
    return this.#stopped ? "" : this.#take(this.#held.length);
  }

  #take(length: number): string {
    const text = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    return text;
  }
}
