/** An answer while it is generated: assembles the streamed deltas and times them. Knows nothing of the server or the page. */
import type { Figures, Message, ToolCall } from "./conversation.ts";
import { Trace } from "./trace.ts";
import type { Delta, Usage } from "./wire.ts";

export class Answer {
  readonly #started: number;
  readonly #now: () => number;
  #content = "";
  #reasoning = "";
  readonly #toolCalls: ToolCall[] = [];
  #usage: Usage | null = null;
  #finish: string | null = null;
  #pieces = 0;
  #first = 0;
  #last = 0;
  #trace: Trace | null = null;

  /** @param now a clock in milliseconds, from any origin */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
    this.#started = now();
  }

  take(delta: Delta): void {
    this.#content += delta.content;
    this.#reasoning += delta.reasoning;
    for (const { index, name, arguments: text } of delta.toolCalls) {
      const before = this.#toolCalls[index] ?? { name: "", arguments: "" };
      if (index <= this.#toolCalls.length)
        this.#toolCalls[index] = { name: before.name + (name ?? ""), arguments: before.arguments + text };
    }
    for (const token of delta.routing) {
      this.#trace ??= Trace.like(token);
      this.#trace.push(token);
    }
    this.#usage = delta.usage ?? this.#usage;
    this.#finish = delta.finish ?? this.#finish;
    if (delta.content === "" && delta.reasoning === "" && delta.toolCalls.length === 0) return;
    this.#last = this.#now();
    if (this.#pieces++ === 0) this.#first = this.#last;
  }

  /** Null when the server sent no routing. */
  get trace(): Trace | null {
    return this.#trace;
  }

  /** The answer so far. */
  get parts(): Pick<Message, "content" | "reasoning" | "toolCalls" | "figures"> {
    return { content: this.#content, reasoning: this.#reasoning, toolCalls: [...this.#toolCalls], figures: this.#figures };
  }

  /** The server's reason for the end; `stop` for every reason but `length`. */
  get end(): "stop" | "length" {
    return this.#finish === "length" ? "length" : "stop";
  }

  /** Null before the first token. Until the server reports its count, each piece counts as one token. */
  get #figures(): Figures | null {
    if (this.#pieces === 0) return null;
    const tokens = this.#usage?.completionTokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    return {
      promptTokens: this.#usage?.promptTokens ?? 0,
      cachedTokens: this.#usage?.cachedTokens ?? 0,
      completionTokens: tokens,
      firstTokenSeconds: (this.#first - this.#started) / 1000,
      tokensPerSecond: seconds > 0 && tokens > 1 ? (tokens - 1) / seconds : 0,
    };
  }
}
