/**
 * Reads an answer token by token: ids in; reasoning, answer text and tool calls out. Cuts the answer at stop strings and, where
 * one call is wanted, after that call. Knows no engine and no protocol.
 */
import { randomUUID } from "node:crypto";
import type { Detokenizer } from "../tokenizer/detokenizer.ts";
import { StopStrings } from "../tokenizer/stops.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { CallReader } from "./call.ts";
import { dialectOf, TAGS } from "./dialect.ts";
import { holdsCalls } from "./format.ts";
import type { Prompt } from "./prompt.ts";
import { type Piece, Splitter } from "./splitter.ts";

/** Part of a reply, in whole characters. */
export type ReplyEvent =
  | { readonly kind: "text"; readonly channel: "answer" | "reasoning"; readonly text: string }
  /** The first event of a call has its id and name; `arguments` is the next piece of its JSON. */
  | { readonly kind: "toolCall"; readonly index: number; readonly id?: string; readonly name?: string; readonly arguments: string };

/** Why a reply ends before its tokens do. */
export type ReplyEnd = "stop" | "toolCalls";

export interface ReplyOptions {
  readonly prompt: Prompt;
  /** The prompt ended inside the model's reasoning. */
  readonly insideReasoning: boolean;
  /** Texts that end the answer; they are left out of it. */
  readonly stop: readonly string[];
}

export class ReplyReader {
  readonly #tokenizer: Tokenizer;
  readonly #detokenizer: Detokenizer;
  /** Null when no tags are recognized. */
  readonly #splitter: Splitter | null;
  readonly #stops: StopStrings;
  /** Special tokens that are tags; other special tokens have no text. */
  readonly #tags: ReadonlySet<string>;
  readonly #toolNames: ReadonlySet<string>;
  readonly #oneToolCall: boolean;
  /** A grammar holds all calls. */
  readonly #callsAreHeld: boolean;
  #call: CallReader | null = null;
  #calls = 0;
  /** UTF-16 units of text so far: of all tokens, and of the answer before and after stop strings. */
  #length = 0;
  #answered = 0;
  #released = 0;
  #ended: ReplyEnd | null = null;

  constructor(tokenizer: Tokenizer, { prompt, insideReasoning, stop }: ReplyOptions) {
    const chat = prompt.kind === "chat" ? prompt : null;
    const calls = chat !== null && chat.tools.length > 0 && chat.toolChoice !== "none";
    const thinks = chat !== null && dialectOf(tokenizer).thinks;
    this.#tokenizer = tokenizer;
    this.#detokenizer = tokenizer.detokenizer({ skip_special_tokens: false });
    this.#splitter = calls || thinks ? new Splitter({ thinks, calls, insideReasoning }) : null;
    this.#stops = new StopStrings(stop);
    this.#tags = new Set([...(thinks ? [...TAGS.think, ...TAGS.response] : []), ...(calls ? TAGS.call : [])]);
    this.#toolNames = new Set(calls ? chat.tools.map((tool) => tool.name) : []);
    this.#oneToolCall = chat?.oneToolCall ?? false;
    this.#callsAreHeld = chat !== null && holdsCalls(chat);
  }

  /** Set once a stop string or the only call has come: what follows is dropped. */
  get ended(): ReplyEnd | null {
    return this.#ended;
  }

  /** Calls read so far. */
  get calls(): number {
    return this.#calls;
  }

  get insideReasoning(): boolean {
    return this.#splitter?.channel === "reasoning";
  }

  /** UTF-16 units of text read so far, tags included. */
  get length(): number {
    return this.#length;
  }

  /** Of `length`, what is held back because it may become a tag or a stop string. */
  get heldLength(): number {
    return this.#answered - this.#released + (this.#splitter?.heldLength ?? 0);
  }

  /** Takes the next token. The caller must leave out end tokens. */
  take(id: number): ReplyEvent[] {
    const { vocabulary } = this.#tokenizer;
    if (vocabulary.isSpecial(id) && !this.#tags.has(vocabulary.token(id))) return [];
    return this.#read(this.#detokenizer.push(id));
  }

  /** What was held back. @param cutOff the answer was cut off by its length, so that an unfinished call is dropped */
  finish(cutOff: boolean): ReplyEvent[] {
    if (this.#ended) return [];
    const events = [...this.#read(this.#detokenizer.finish()), ...this.#tell(this.#splitter?.finish() ?? [], cutOff)];
    const held = this.#ended ? "" : this.#stops.finish();
    this.#released += held.length;
    return held === "" ? events : [...events, { kind: "text", channel: "answer", text: held }];
  }

  #read(text: string): ReplyEvent[] {
    this.#length += text.length;
    if (this.#splitter) return this.#tell(this.#splitter.push(text));
    return text === "" ? [] : this.#tell([{ kind: "answer", text }]);
  }

  #tell(pieces: readonly Piece[], cutOff = false): ReplyEvent[] {
    const events: ReplyEvent[] = [];
    for (const piece of pieces) {
      if (this.#ended) break;
      switch (piece.kind) {
        case "reasoning":
          events.push({ kind: "text", channel: "reasoning", text: piece.text });
          break;
        case "answer":
          events.push(...this.#say(piece.text));
          break;
        case "call":
          events.push(...this.#readCall(piece.text));
          break;
        case "callEnd":
          events.push(...this.#endCall(piece.whole, cutOff));
          break;
        default:
          piece satisfies never;
      }
    }
    return events;
  }

  #say(piece: string): ReplyEvent[] {
    const { text, stopped } = this.#stops.push(piece);
    this.#answered += piece.length;
    this.#released += text.length;
    if (stopped) this.#ended = "stop";
    return text === "" ? [] : [{ kind: "text", channel: "answer", text }];
  }

  #readCall(text: string): ReplyEvent[] {
    this.#call ??= new CallReader(this.#toolNames, this.#callsAreHeld);
    const progress = this.#call.push(text);
    if (progress === null) return [];
    const first = progress.name === undefined ? {} : { id: `call_${randomUUID().replaceAll("-", "").slice(0, 24)}`, name: progress.name };
    return [{ kind: "toolCall", index: this.#calls, ...first, arguments: progress.arguments }];
  }

  /** A malformed call becomes answer text, unless it was cut off by the length. A call that has been emitted stays a call. */
  #endCall(whole: boolean, cutOff: boolean): ReplyEvent[] {
    const call = this.#call ?? new CallReader(this.#toolNames, this.#callsAreHeld);
    this.#call = null;
    if (!call.told && !whole && cutOff) return [];
    if (!call.told) return this.#say(`${TAGS.call[0]}${call.raw}${whole ? TAGS.call[1] : ""}`);
    this.#calls++;
    if (this.#oneToolCall) this.#ended = "toolCalls";
    return [];
  }
}
