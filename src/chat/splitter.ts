/**
 * Splits text into reasoning, answer and tool calls at the tags around them, while it arrives in pieces of any size. White space
 * around tags is dropped. Knows no tokens and no JSON.
 */
import { openLength } from "../tokenizer/stops.ts";
import { TAGS } from "./dialect.ts";

export type Piece =
  | { readonly kind: "reasoning" | "answer" | "call"; readonly text: string }
  /** `whole`: the closing tag was there. */
  | { readonly kind: "callEnd"; readonly whole: boolean };

export interface SplitterOptions {
  /** Recognize the tags of reasoning and response. */
  readonly thinks: boolean;
  /** Recognize the tags of calls. */
  readonly calls: boolean;
  /** The prompt ended inside the reasoning. */
  readonly insideReasoning: boolean;
}

/** Tags that are recognized before an answer only; within it they are text. */
const OPENING: readonly string[] = [TAGS.think[0], TAGS.response[0]];

type Channel = "reasoning" | "answer" | "call";

export class Splitter {
  readonly #options: SplitterOptions;
  #channel: Channel;
  /** Text that may become a tag, or white space that may be dropped with a tag. */
  #held = "";
  /** Nothing of the channel has been emitted yet: its leading white space is dropped with the tag before it. */
  #atStart: boolean;
  /** Only white space has come since the start or since the reasoning. */
  #atAnswerStart = true;
  #insideResponse = false;

  constructor(options: SplitterOptions) {
    this.#options = options;
    this.#channel = options.insideReasoning ? "reasoning" : "answer";
    this.#atStart = options.insideReasoning;
  }

  /** What the next text belongs to. */
  get channel(): Channel {
    return this.#channel;
  }

  get heldLength(): number {
    return this.#held.length;
  }

  push(text: string): Piece[] {
    const pieces: Piece[] = [];
    let rest = this.#held + text;
    this.#held = "";
    for (;;) {
      const marks = this.#marks();
      let at = Number.POSITIVE_INFINITY;
      let mark = "";
      for (const each of marks) {
        const found = rest.indexOf(each);
        const opens = this.#channel === "answer" && OPENING.includes(each);
        if (found >= 0 && found < at && !(opens && rest.slice(0, found).trim() !== "")) [at, mark] = [found, each];
      }
      if (mark === "") {
        const certain = rest.slice(0, rest.length - openLength(rest, marks));
        const said = this.#channel === "call" ? certain : certain.trimEnd();
        this.#emit(said, pieces);
        this.#held = rest.slice(said.length);
        return pieces;
      }
      this.#emit(this.#channel === "call" ? rest.slice(0, at) : rest.slice(0, at).trimEnd(), pieces);
      rest = rest.slice(at + mark.length);
      this.#enter(mark, pieces);
    }
  }

  /** The held-back text, and the end of a call without a closing tag. */
  finish(): Piece[] {
    const pieces: Piece[] = [];
    const held = this.#held;
    this.#held = "";
    // Held-back white space belongs to the text, except around reasoning and response.
    this.#emit(this.#channel === "reasoning" || this.#options.thinks ? held.trimEnd() : held, pieces);
    if (this.#channel === "call") pieces.push({ kind: "callEnd", whole: false });
    return pieces;
  }

  /** The tags that are recognized in the current state. */
  #marks(): string[] {
    const { thinks, calls } = this.#options;
    switch (this.#channel) {
      case "reasoning":
        return [TAGS.think[1]];
      case "call":
        return [TAGS.call[1]];
      case "answer":
        return [
          ...(thinks && this.#atAnswerStart ? OPENING : []),
          ...(this.#insideResponse ? [TAGS.response[1]] : []),
          ...(calls ? [TAGS.call[0]] : []),
        ];
      default:
        return this.#channel satisfies never;
    }
  }

  #enter(mark: string, pieces: Piece[]): void {
    if (this.#channel === "call") pieces.push({ kind: "callEnd", whole: true });
    this.#atStart = mark !== TAGS.response[1];
    if (mark === TAGS.think[0]) this.#channel = "reasoning";
    else if (mark === TAGS.call[0]) this.#channel = "call";
    else {
      this.#channel = "answer";
      if (mark === TAGS.think[1]) this.#atAnswerStart = true;
      if (mark === TAGS.response[0]) [this.#insideResponse, this.#atAnswerStart] = [true, false];
      if (mark === TAGS.response[1]) [this.#insideResponse, this.#atStart] = [false, true];
    }
  }

  #emit(text: string, pieces: Piece[]): void {
    const said = this.#atStart && this.#channel !== "call" ? text.trimStart() : text;
    if (said === "") return;
    this.#atStart = false;
    if (this.#channel === "answer" && said.trim() !== "") this.#atAnswerStart = false;
    pieces.push({ kind: this.#channel, text: said });
  }
}
