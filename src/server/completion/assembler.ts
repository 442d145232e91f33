/**
 * Assembles an answer's events from the engine's tokens: text and tool calls as the reply reader finds them, log-probabilities
 * and routing once their text is out, and what was used. Knows no engine and no protocol.
 */
import type { EncodedPrompt } from "../../chat/prompt.ts";
import { ReplyReader } from "../../chat/reply.ts";
import type { GeneratedToken } from "../../engine/sequence.ts";
import { moeLayers } from "../../model/config.ts";
import type { NamedModel } from "../catalog.ts";
import type { CompletionEvent, CompletionRequest, FinishReason, Progress, ScoredToken, Usage } from "./request.ts";

export class Assembler {
  readonly #model: NamedModel;
  readonly #request: CompletionRequest;
  readonly #reply: ReplyReader;
  readonly #layers: readonly number[];
  /** Events about text that is held back, and where that text begins, in order. */
  readonly #waiting: { readonly event: CompletionEvent; readonly from: number }[] = [];
  #finish: "stop" | "length" | null = null;
  readonly #usage: { -readonly [K in keyof Usage]: number };
  readonly #progress: Progress;

  constructor(model: NamedModel, request: CompletionRequest, { tokens, insideReasoning }: EncodedPrompt, progress: Progress) {
    this.#progress = progress;
    this.#model = model;
    this.#request = request;
    this.#reply = new ReplyReader(model.tokenizer, { prompt: request.prompt, insideReasoning, stop: request.stop });
    this.#layers = request.routing ? moeLayers(model.config) : [];
    this.#usage = { promptTokens: tokens.length, cachedTokens: 0, completionTokens: 0, reasoningTokens: 0 };
  }

  /** True when nothing more is wanted, so that the engine need not go on. */
  get over(): boolean {
    return this.#finish !== null || this.#reply.ended !== null;
  }

  /** Takes the next token. */
  take(token: GeneratedToken): CompletionEvent[] {
    const reply = this.#reply;
    const reasoned = reply.insideReasoning;
    this.#usage.completionTokens++;
    this.#usage.cachedTokens += token.cachedTokens ?? 0;
    const ends = token.finish === "stop"; // an end token is no text
    if (!ends) this.#waiting.push(...this.#details(token).map((event) => ({ event, from: reply.length })));
    const told = ends ? [] : reply.take(token.id);
    const reasons = reasoned || reply.insideReasoning;
    if (reasons) this.#usage.reasoningTokens++;
    this.#progress.wrote(reasons);
    if (token.finish) this.#finish = token.finish;
    return [...this.#due(), ...told];
  }

  /** The rest of the text, and the end. */
  finish(): CompletionEvent[] {
    const reply = this.#reply;
    const ended = reply.ended !== null;
    const told = reply.finish(this.#finish === "length");
    const due = ended ? [] : this.#due();
    return [...due, ...told, { kind: "end", reason: this.#reason(), usage: this.#usage }];
  }

  #reason(): FinishReason {
    const reason = this.#reply.ended ?? this.#finish;
    return this.#reply.calls > 0 && reason !== "length" ? "toolCalls" : (reason ?? "length");
  }

  /** Log-probabilities and routing, where the request asks for them. */
  #details({ id, logprob, top = [], routing }: GeneratedToken): CompletionEvent[] {
    const events: CompletionEvent[] = [];
    const { tokenizer } = this.#model;
    if (this.#request.logprobs !== null) {
      const scored = (token: { readonly id: number; readonly logprob: number }): ScoredToken => ({
        id: token.id,
        bytes: tokenizer.vocabulary.bytes(token.id),
        logprob: token.logprob,
      });
      events.push({ kind: "logprob", token: scored({ id, logprob }), top: top.map(scored) });
    }
    if (routing) events.push({ kind: "routing", token: { id, text: tokenizer.decode([id]), layers: this.#layers, ...routing } });
    return events;
  }

  /** Details of the tokens whose text is out. */
  #due(): CompletionEvent[] {
    const held = this.#reply.heldLength;
    const out = this.#reply.length - held;
    let due = 0;
    while (due < this.#waiting.length && (held === 0 || this.#waiting[due].from < out)) due++;
    return due === 0 ? [] : this.#waiting.splice(0, due).map(({ event }) => event);
  }
}
