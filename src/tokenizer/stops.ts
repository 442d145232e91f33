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
  #held = "";
  #stopped = false;

  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((s) => s !== "");
  }

  /** UTF-16 units that wait for what comes next. */
  get heldLength(): number {
    return this.#held.length;
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
    return { text: this.#take(this.#held.length - openLength(this.#held, this.#stops)), stopped: false };
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

/** Length of the longest end of `text` with which one of the words begins, whole words excepted. */
export function openLength(text: string, words: readonly string[]): number {
  let length = Math.min(Math.max(0, ...words.map((word) => word.length)) - 1, text.length);
  while (length > 0 && !words.some((word) => word.length > length && word.startsWith(text.slice(text.length - length)))) length--;
  return Math.max(length, 0);
}
