/**
 * The answer of one request while its tokens arrive: tokens in, events out. Text is handed over in whole characters and once it
 * can't be part of a stop string or a mark any more. Knows no prompt and no engine.
 */
import { randomUUID } from "node:crypto";
import { CallReader } from "../../chat/call.ts";
import { type Dialect, TAGS } from "../../chat/dialect.ts";
import { type Piece, Splitter } from "../../chat/splitter.ts";
import type { GeneratedToken } from "../../engine/sequence.ts";
import { isMoeLayer } from "../../model/config.ts";
import type { Detokenizer } from "../../tokenizer/detokenizer.ts";
import { StopStrings } from "../../tokenizer/stops.ts";
import type { CompletionEvent, CompletionRequest, FinishReason, ServedModel, TokenLogprob, Usage } from "./request.ts";

/** What was sent to the engine. */
interface Asked {
  readonly tokens: readonly number[];
  readonly insideReasoning: boolean;
}

export class Answer {
  readonly #model: ServedModel;
  readonly #request: CompletionRequest;
  readonly #detokenizer: Detokenizer;
  /** Null where no mark means anything. */
  readonly #splitter: Splitter | null;
  readonly #stops: StopStrings;
  /** Special tokens that are marks; other ones are no text. */
  readonly #marks: ReadonlySet<string>;
  readonly #toolNames: ReadonlySet<string>;
  readonly #layers: readonly number[];
  #call: CallReader | null = null;
  #calls = 0;
  /** Events that belong to text which is held back, and where their text begins. */
  #waiting: { readonly event: CompletionEvent; readonly from: number }[] = [];
  /** Units of text so far: of all tokens, of the answer before and after stop strings. */
  #length = 0;
  #answered = 0;
  #released = 0;
  #reason: FinishReason | null = null;
  /** A stop string has come, or all calls that are wanted: what follows is dropped. */
  #cut = false;
  readonly #usage: { -readonly [K in keyof Usage]: number };

  constructor(model: ServedModel, request: CompletionRequest, { thinks }: Dialect, prompt: Asked) {
    const { prompt: asked } = request;
    const chat = asked.kind === "chat" ? asked : null;
    const calls = chat !== null && chat.tools.length > 0 && chat.toolChoice !== "none";
    const reasons = thinks && chat !== null;
    this.#model = model;
    this.#request = request;
    this.#detokenizer = model.tokenizer.detokenizer({ skip_special_tokens: false });
    this.#splitter = calls || reasons ? new Splitter({ thinks: reasons, calls, insideReasoning: prompt.insideReasoning }) : null;
    this.#stops = new StopStrings(request.stop);
    this.#marks = new Set([...(reasons ? [...TAGS.think, ...TAGS.response] : []), ...(calls ? TAGS.call : [])]);
    this.#toolNames = new Set(calls ? chat.tools.map((tool) => tool.name) : []);
    const { config } = model;
    this.#layers = request.routing ? Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i)) : [];
    this.#usage = { promptTokens: prompt.tokens.length, cachedTokens: 0, completionTokens: 0, reasoningTokens: 0 };
  }

  /** True when nothing more is wanted: the engine need not go on. */
  get over(): boolean {
    return this.#reason !== null;
  }

  /** What was computed so far. */
  get usage(): Usage {
    return this.#usage;
  }

  /** Takes the next token. */
  take(token: GeneratedToken): CompletionEvent[] {
    const events: CompletionEvent[] = [];
    const before = this.#splitter?.channel;
    this.#usage.completionTokens++;
    this.#usage.cachedTokens += token.cachedTokens ?? 0;
    const ends = token.finish === "stop"; // an end token is no text
    const text = ends ? "" : this.#textOf(token.id);
    if (!ends) this.#waiting.push(...this.#details(token).map((event) => ({ event, from: this.#length })));
    this.#length += text.length;
    const pieces = this.#route(text);
    if ([before, this.#splitter?.channel].includes("reasoning")) this.#usage.reasoningTokens++;
    const told = this.#tell(pieces);
    events.push(...this.#due(), ...told);
    if (token.finish) this.#reason ??= token.finish;
    return events;
  }

  /** The rest of the text, and the end. */
  finish(): CompletionEvent[] {
    const events: CompletionEvent[] = [];
    if (!this.#cut) {
      const rest = this.#detokenizer.finish();
      this.#length += rest.length;
      const told = this.#tell([...this.#route(rest), ...(this.#splitter?.finish() ?? [])]);
      const held = this.#cut ? "" : this.#stops.finish();
      this.#released += held.length;
      events.push(...this.#due(), ...told);
      if (held !== "") events.push({ kind: "text", channel: "answer", text: held });
    }
    const reason = this.#calls > 0 && this.#reason !== "length" ? "toolCalls" : (this.#reason ?? "length");
    return [...events, { kind: "end", reason, usage: this.#usage }];
  }

  #textOf(id: number): string {
    const { vocabulary } = this.#model.tokenizer;
    if (vocabulary.isSpecial(id) && !this.#marks.has(vocabulary.token(id))) return "";
    return this.#detokenizer.push(id);
  }

  #route(text: string): Piece[] {
    if (this.#splitter) return this.#splitter.push(text);
    return text === "" ? [] : [{ kind: "answer", text }];
  }

  #tell(pieces: readonly Piece[]): CompletionEvent[] {
    const events: CompletionEvent[] = [];
    for (const piece of pieces) {
      if (this.#cut) break;
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
          events.push(...this.#endCall(piece.whole));
          break;
        default:
          piece satisfies never;
      }
    }
    return events;
  }

  #say(piece: string): CompletionEvent[] {
    const { text, stopped } = this.#stops.push(piece);
    this.#answered += piece.length;
    this.#released += text.length;
    if (stopped) {
      this.#cut = true;
      this.#reason = "stop";
    }
    return text === "" ? [] : [{ kind: "text", channel: "answer", text }];
  }

  #readCall(text: string): CompletionEvent[] {
    this.#call ??= new CallReader(this.#toolNames);
    const progress = this.#call.push(text);
    if (progress === null) return [];
    const first = progress.name === undefined ? {} : { id: `call_${randomUUID().replaceAll("-", "").slice(0, 24)}`, name: progress.name };
    return [{ kind: "toolCall", index: this.#calls, ...first, arguments: progress.arguments }];
  }

  /** A call that is none is the text that it is, unless the length cut it off. One that was told already stays as it was told. */
  #endCall(whole: boolean): CompletionEvent[] {
    const call = this.#call ?? new CallReader(this.#toolNames);
    this.#call = null;
    if (!call.told && !whole && this.#reason === "length") return [];
    if (!call.told) return this.#say(`${TAGS.call[0]}${call.raw}${whole ? TAGS.call[1] : ""}`);
    this.#calls++;
    if (this.#request.prompt.kind === "chat" && this.#request.prompt.oneToolCall) {
      this.#cut = true;
      this.#reason = "toolCalls";
    }
    return [];
  }

  /** Log-probabilities and routing, where they were asked for. */
  #details({ id, logprob, top = [], routing }: GeneratedToken): CompletionEvent[] {
    const events: CompletionEvent[] = [];
    const { tokenizer } = this.#model;
    if (this.#request.logprobs !== null) {
      const described = (token: { readonly id: number; readonly logprob: number }): TokenLogprob => ({
        id: token.id,
        bytes: tokenizer.vocabulary.bytes(token.id),
        logprob: token.logprob,
      });
      events.push({ kind: "logprob", token: described({ id, logprob }), top: top.map(described) });
    }
    if (routing) events.push({ kind: "routing", token: { id, text: tokenizer.decode([id]), layers: this.#layers, ...routing } });
    return events;
  }

  /** Details of the tokens whose text is out. */
  #due(): CompletionEvent[] {
    const held = this.#answered - this.#released + (this.#splitter?.heldLength ?? 0);
    const out = this.#length - held;
    const due = this.#waiting.filter(({ from }) => held === 0 || from < out);
    this.#waiting = this.#waiting.slice(due.length);
    return due.map(({ event }) => event);
  }
}
