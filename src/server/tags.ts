/**
 * Splits a model's text, as it arrives, into answer, reasoning and tool calls by the tags that ERNIE-4.5's thinking models
 * write: `<think>`, `<response>`, `<tool_call>`. Knows no tokens and no protocol.
 */
import { randomUUID } from "node:crypto";

/** What a piece of text came to, in order. */
export type Piece =
  | { readonly kind: "text"; readonly channel: "answer" | "reasoning"; readonly text: string }
  | { readonly kind: "toolCall"; readonly index: number; readonly id?: string; readonly name?: string; readonly arguments: string };

type State = "answer" | "reasoning" | "tool";

const TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"] as const;
const HEAD = /^\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*/;

export class TagSplitter {
  #state: State;
  #held = "";
  /** The text right behind a tag begins a line of its own: its first line break is the tag's. */
  #trim = false;
  #calls = 0;
  #call: ToolCallText | null = null;

  /** @param reasoning whether the text begins inside `<think>`, as behind a prompt that ends with it */
  constructor(reasoning: boolean) {
    this.#state = reasoning ? "reasoning" : "answer";
    this.#trim = reasoning;
  }

  /** How many tool calls have begun. */
  get calls(): number {
    return this.#calls;
  }

  push(text: string): Piece[] {
    this.#held += text;
    const pieces: Piece[] = [];
    for (;;) {
      const [at, tag] = this.#firstTag();
      if (tag === null) break;
      this.#emit(this.#take(at), pieces);
      this.#take(tag.length);
      this.#enter(tag, pieces);
    }
    let keep = Math.min(this.#held.length, Math.max(...TAGS.map((t) => t.length)) - 1);
    while (keep > 0 && !TAGS.some((t) => t.startsWith(this.#held.slice(-keep)))) keep--;
    this.#emit(this.#take(this.#held.length - keep), pieces);
    return pieces;
  }

  /** What is left when the text ends. */
  finish(): Piece[] {
    const pieces: Piece[] = [];
    this.#emit(this.#take(this.#held.length), pieces);
    if (this.#call) pieces.push(...this.#call.finish().filter((piece) => piece.kind === "toolCall")); // half a call is no answer
    return pieces;
  }

  #firstTag(): [number, (typeof TAGS)[number] | null] {
    let [first, tag]: [number, (typeof TAGS)[number] | null] = [this.#held.length, null];
    for (const t of TAGS) {
      const at = this.#held.indexOf(t);
      if (at >= 0 && at < first) [first, tag] = [at, t];
    }
    return [first, tag];
  }

  #enter(tag: (typeof TAGS)[number], pieces: Piece[]): void {
    if (this.#call) pieces.push(...this.#call.finish());
    this.#call = null;
    this.#trim = true;
    switch (tag) {
      case "<think>":
        this.#state = "reasoning";
        break;
      case "<tool_call>":
        this.#state = "tool";
        this.#call = new ToolCallText(this.#calls++);
        break;
      case "</think>":
      case "<response>":
      case "</response>":
      case "</tool_call>":
        this.#state = "answer";
        break;
      default:
        tag satisfies never;
    }
  }

  #emit(text: string, pieces: Piece[]): void {
    if (text === "") return;
    if (this.#call) {
      pieces.push(...this.#call.push(text));
      return;
    }
    let rest = text;
    if (this.#trim) rest = rest.replace(/^\s+/, "");
    if (rest === "") return;
    this.#trim = false;
    pieces.push({ kind: "text", channel: this.#state === "reasoning" ? "reasoning" : "answer", text: rest });
  }

  #take(length: number): string {
    const text = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    return text;
  }
}

/** The JSON of one call: its name first, then its arguments as they arrive. */
class ToolCallText {
  readonly #index: number;
  #text = "";
  /** Where the arguments begin in the text; -1 until that is known. */
  #from = -1;
  #sent = 0;
  #depth = 0;
  #inString = false;
  #escaped = false;
  #ended = false;

  constructor(index: number) {
    this.#index = index;
  }

  push(text: string): Piece[] {
    this.#text += text;
    const pieces: Piece[] = [];
    if (this.#from < 0) {
      const head = HEAD.exec(this.#text);
      // The arguments must have begun, so that what was read of the space before them is all of it.
      if (!head || head[0].length === this.#text.length) return pieces;
      this.#from = this.#sent = head[0].length;
      pieces.push(this.#begin(JSON.parse(`"${head[1]}"`) as string, ""));
    }
    const start = this.#sent;
    while (!this.#ended && this.#sent < this.#text.length) this.#scan(this.#text[this.#sent++]);
    const next = this.#text.slice(start, this.#sent);
    if (next !== "") pieces.push({ kind: "toolCall", index: this.#index, arguments: next });
    return pieces;
  }

  /** The call as a whole, where it was not of the form that can be streamed; text that is no call comes back as text. */
  finish(): Piece[] {
    if (this.#from >= 0) return [];
    try {
      const call = JSON.parse(this.#text) as { name?: unknown; arguments?: unknown; parameters?: unknown };
      if (typeof call.name === "string") return [this.#begin(call.name, JSON.stringify(call.arguments ?? call.parameters ?? {}))];
    } catch {
      // Not JSON: what the model wrote is shown.
    }
    return this.#text.trim() === "" ? [] : [{ kind: "text", channel: "answer", text: this.#text }];
  }

  #begin(name: string, args: string): Piece {
    return { kind: "toolCall", index: this.#index, id: `call_${randomUUID().replaceAll("-", "").slice(0, 24)}`, name, arguments: args };
  }

  /** Follows the JSON value up to its end; the brace behind it closes the call. */
  #scan(char: string): void {
    if (this.#inString) {
      if (this.#escaped) this.#escaped = false;
      else if (char === "\\") this.#escaped = true;
      else if (char === '"') this.#inString = false;
    } else if (char === '"') this.#inString = true;
    else if (char === "{" || char === "[") this.#depth++;
    else if (char === "}" || char === "]") this.#depth--;
    if (!this.#inString && this.#depth === 0) this.#ended = true;
  }
}
