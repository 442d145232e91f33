/** An answer's events as a choice of OpenAI's responses: whole, or delta by delta. Knows no HTTP. */
import { MessageBuilder } from "../../../chat/message.ts";
import type { CompletionEvent, FinishReason, RoutedToken, ScoredToken, Usage } from "../../completion/request.ts";

const FINISH: Readonly<Record<FinishReason, string>> = { stop: "stop", length: "length", toolCalls: "tool_calls" };

/** The usage of a whole response. */
export function usageOf({ promptTokens, cachedTokens, completionTokens, reasoningTokens }: Usage) {
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
    completion_tokens_details: { reasoning_tokens: reasoningTokens },
  };
}

/** One chat answer, collected from its events: whole or as deltas. */
export class ChatChoice {
  readonly #message = new MessageBuilder();
  readonly #logprobs: object[] = [];
  readonly #routing: object[] = [];
  #sent = { logprobs: 0, routing: 0 };
  #finish = "length";

  take(event: CompletionEvent): void {
    switch (event.kind) {
      case "text":
      case "toolCall":
        this.#message.take(event);
        break;
      case "logprob":
        this.#logprobs.push({ ...logprob(event.token), top_logprobs: event.top.map(logprob) });
        break;
      case "routing":
        this.#routing.push(routed(event.token));
        break;
      case "end":
        this.#finish = FINISH[event.reason];
        break;
      default:
        event satisfies never;
    }
  }

  choice() {
    const { role, content, ...rest } = this.#message.message;
    return {
      message: { role, content, refusal: null, ...rest, ...(this.#routing.length ? { routing: this.#routing } : {}) },
      logprobs: this.#logprobs.length ? { content: this.#logprobs, refusal: null } : null,
      finish_reason: this.#finish,
    };
  }

  /** What an event adds, with the log-probabilities and routing before it; null for an event that is not sent by itself. */
  delta(event: CompletionEvent) {
    this.take(event);
    if (event.kind === "logprob" || event.kind === "routing") return null;
    const logprobs = this.#logprobs.slice(this.#sent.logprobs);
    const routing = this.#routing.slice(this.#sent.routing);
    this.#sent = { logprobs: this.#logprobs.length, routing: this.#routing.length };
    return {
      delta: { ...deltaOf(event), ...(routing.length ? { routing } : {}) },
      logprobs: logprobs.length ? { content: logprobs, refusal: null } : null,
      finish_reason: event.kind === "end" ? this.#finish : null,
    };
  }
}

function deltaOf(event: Extract<CompletionEvent, { kind: "text" | "toolCall" | "end" }>): object {
  if (event.kind === "text") return event.channel === "answer" ? { content: event.text } : { reasoning_content: event.text };
  if (event.kind === "end") return {};
  const { index, id, name, arguments: args } = event;
  const first = id === undefined ? {} : { id, type: "function" };
  return { tool_calls: [{ index, ...first, function: { ...(name === undefined ? {} : { name }), arguments: args } }] };
}

/** One text completion, in OpenAI's older format. */
export class TextChoice {
  #text: string;
  #offset: number;
  readonly #logprobs: { token: ScoredToken; top: readonly ScoredToken[]; offset: number }[] = [];
  readonly #routing: object[] = [];
  #sent = { logprobs: 0, routing: 0 };
  #finish = "length";

  constructor(echo: string) {
    this.#text = echo;
    this.#offset = echo.length;
  }

  take(event: CompletionEvent): void {
    if (event.kind === "text") this.#text += event.text;
    if (event.kind === "logprob") {
      this.#logprobs.push({ token: event.token, top: event.top, offset: this.#offset });
      this.#offset += textOf(event.token).length;
    }
    if (event.kind === "routing") this.#routing.push(routed(event.token));
    if (event.kind === "end") {
      this.#finish = FINISH[event.reason];
    }
  }

  choice() {
    return { text: this.#text, ...this.#rest(0, 0), finish_reason: this.#finish };
  }

  delta(event: CompletionEvent) {
    this.take(event);
    if (event.kind === "logprob" || event.kind === "routing") return null;
    const rest = this.#rest(this.#sent.logprobs, this.#sent.routing);
    this.#sent = { logprobs: this.#logprobs.length, routing: this.#routing.length };
    return { text: event.kind === "text" ? event.text : "", ...rest, finish_reason: event.kind === "end" ? this.#finish : null };
  }

  #rest(logprobsFrom: number, routingFrom: number) {
    const list = this.#logprobs.slice(logprobsFrom);
    const routing = this.#routing.slice(routingFrom);
    return {
      logprobs: list.length
        ? {
            tokens: list.map((l) => textOf(l.token)),
            token_logprobs: list.map((l) => l.token.logprob),
            top_logprobs: list.map((l) => Object.fromEntries(l.top.map((t) => [textOf(t), t.logprob]))),
            text_offset: list.map((l) => l.offset),
          }
        : null,
      ...(routing.length ? { routing } : {}),
    };
  }
}

function textOf({ bytes }: ScoredToken): string {
  return Buffer.from(bytes).toString("utf8");
}

function logprob(token: ScoredToken) {
  return { token: textOf(token), logprob: token.logprob, bytes: [...token.bytes] };
}

/** Experts and weights by layer: [layers][chosen]. */
function routed({ id, text, layers, experts, weights }: RoutedToken) {
  const k = layers.length ? experts.length / layers.length : 0;
  const rows = (all: Int32Array | Float32Array) => layers.map((_, i) => [...all.subarray(i * k, (i + 1) * k)]);
  return {
    token: id,
    text,
    layers,
    experts: rows(experts),
    weights: rows(weights).map((row) => row.map((w) => Math.round(w * 1e4) / 1e4)),
  };
}
