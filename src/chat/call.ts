/**
 * Parses one tool call, `{"name": "f", "arguments": {...}}`, while it arrives in pieces: emits the name, and arguments that are
 * always a JSON object: as they arrive where a grammar holds them, else once they are known to be one. Knows no tags.
 */

/** What a piece of a call revealed. */
export interface CallProgress {
  /** Set once, on the first progress. */
  readonly name?: string;
  /** The next piece of the arguments' JSON. */
  readonly arguments: string;
}

const ARGUMENTS = ["arguments", "parameters"];
const SPACE = /\s/;

type Expected = "open" | "key" | "colon" | "value" | "next" | "nothing";

export class CallReader {
  /** All text so far. */
  raw = "";
  #at = 0;
  #expects: Expected = "open";
  #broken = false;
  #key = "";
  /** Start of the current key or value; -1: none. */
  #from = -1;
  #depth = 0;
  #inString = false;
  #escaped = false;
  #name: string | null = null;
  #told = false;
  /** Arguments not yet emitted: they wait for the name. */
  #arguments = "";
  #hasArguments = false;
  #streams = false;
  readonly #names: ReadonlySet<string>;
  readonly #held: boolean;

  /**
   * @param names of the tools; a call of any other name is malformed
   * @param held a grammar holds the call, so that its arguments need no check before they are emitted
   */
  constructor(names: ReadonlySet<string>, held: boolean) {
    this.#names = names;
    this.#held = held;
  }

  /** True when the call is complete and well formed. */
  get complete(): boolean {
    return !this.#broken && this.#expects === "nothing" && this.#name !== null;
  }

  /** True once the name has been emitted. */
  get told(): boolean {
    return this.#told;
  }

  push(text: string): CallProgress | null {
    this.raw += text;
    while (!this.#broken && this.#at < this.raw.length) this.#read(this.raw[this.#at]);
    if (this.#expects === "nothing" && !this.#hasArguments) {
      this.#arguments += "{}";
      this.#hasArguments = true;
    }
    if (this.#name === null || !this.#hasArguments || this.#broken) return null;
    if (this.#streams && !this.#held) return null; // not known to be JSON yet
    const piece = { ...(this.#told ? {} : { name: this.#name }), arguments: this.#arguments };
    if (this.#told && piece.arguments === "") return null;
    this.#told = true;
    this.#arguments = "";
    return piece;
  }

  /** Consumes one character, or leaves it for the next state. */
  #read(character: string): void {
    if (this.#from < 0 && SPACE.test(character)) {
      this.#at++;
      return;
    }
    switch (this.#expects) {
      case "open":
        this.#expect(character === "{", "key");
        return;
      case "next":
        if (character === "}") this.#expect(true, "nothing");
        else this.#expect(character === ",", "key");
        return;
      case "colon":
        this.#expect(character === ":", "value");
        return;
      case "nothing":
        this.#broken = true;
        return;
      case "key":
        if (this.#from < 0 && character !== '"') {
          if (character === "}" && this.#key === "") this.#expect(true, "nothing");
          else this.#broken = true;
          return;
        }
        this.#scan(character, () => {
          this.#key = this.#parsed() as string;
          this.#expects = "colon";
        });
        return;
      case "value":
        this.#scan(character, () => {
          this.#settle();
          this.#expects = "next";
        });
        return;
      default:
        this.#expects satisfies never;
    }
  }

  #expect(right: boolean, next: Expected): void {
    this.#at++;
    if (right) this.#expects = next;
    else this.#broken = true;
  }

  /** Scans a JSON value; `done` is called after its last character. */
  #scan(character: string, done: () => void): void {
    const first = this.#from < 0;
    if (first) {
      this.#from = this.#at;
      this.#streams = this.#expects === "value" && ARGUMENTS.includes(this.#key) && character === "{";
      if (this.#streams && this.#hasArguments) this.#broken = true; // twice
      if (this.#streams) this.#hasArguments = true;
    }
    const scalar = !first && this.#depth === 0 && !this.#inString;
    if (scalar && /[\s,}\]]/.test(character)) {
      this.#end(done); // the character belongs to the next state
      return;
    }
    this.#at++;
    if (this.#streams) this.#arguments += character;
    if (this.#inString) {
      if (this.#escaped) this.#escaped = false;
      else if (character === "\\") this.#escaped = true;
      else if (character === '"') this.#inString = false;
      if (!this.#inString && this.#depth === 0) this.#end(done);
      return;
    }
    if (character === '"') this.#inString = true;
    else if (character === "{" || character === "[") this.#depth++;
    else if (character === "}" || character === "]") {
      this.#depth--;
      if (this.#depth === 0) this.#end(done);
      else if (this.#depth < 0) this.#broken = true;
    }
  }

  #end(done: () => void): void {
    done();
    this.#from = -1;
  }

  /** The key or value that just ended. */
  #parsed(): unknown {
    try {
      return JSON.parse(this.raw.slice(this.#from, this.#at));
    } catch {
      this.#broken = true;
      return null;
    }
  }

  #settle(): void {
    const value = this.#parsed();
    this.#streams = false;
    if (this.#key === "name") {
      if (typeof value === "string" && this.#name === null && this.#names.has(value)) this.#name = value;
      else this.#broken = true;
    }
    if (!ARGUMENTS.includes(this.#key) || this.#hasArguments) return;
    // Some models write the arguments as a JSON string.
    this.#hasArguments = true;
    if (typeof value === "string" && isObjectText(value)) this.#arguments += value;
    else if (value === null) this.#arguments += "{}";
    else this.#broken = true;
  }
}

function isObjectText(text: string): boolean {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}
