// Finds stop strings in a streamed text and holds back any suffix that may become one. Knows nothing of tokens.

/** The result of pushing a piece of text. */
export interface Watched {
  /** Text that can no longer be part of a stop string. */
  readonly text: string;
  /** True once a stop string has occurred; the stop string and everything after it are dropped. */
  readonly stopped: boolean;
}

export class StopStrings {
  readonly #stops: readonly string[];
  #held = "";
  #stopped = false;

  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((s) => s !== "");
  }

  /** The number of UTF-16 units held back. */
  get heldLength(): number {
    return this.#held.length;
  }

  /** Takes the next piece. The returned texts, followed by that of `finish`, form the text before the first stop string. */
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

  /** Returns the text still held back when the input ends without a stop string. */
  finish(): string {
    return this.#stopped ? "" : this.#take(this.#held.length);
  }

  #take(length: number): string {
    const text = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    return text;
  }
}

/** The length of the longest suffix of `text` that is a proper prefix of one of the words. */
export function openLength(text: string, words: readonly string[]): number {
  let length = Math.min(Math.max(0, ...words.map((word) => word.length)) - 1, text.length);
  while (length > 0 && !words.some((word) => word.length > length && word.startsWith(text.slice(text.length - length)))) length--;
  return Math.max(length, 0);
}
