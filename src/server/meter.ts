/**
 * What a request uses, counted while it is computed: each of its prompts once, however many answers it gets, and every token of its
 * answers. The charge, the metrics and the response's `usage` are this count. Knows no budget and no protocol.
 */
import type { Progress, Usage } from "./completion/request.ts";

export type TokenKind = "prompt" | "cached" | "completion";

export class Meter {
  readonly #record: (kind: TokenKind, tokens: number) => void;
  /** By prompt: how many of its tokens have been read, those found in the prefix cache included. */
  readonly #read: number[] = [];
  readonly #found: number[] = [];
  #completion = 0;
  #reasoning = 0;

  /** @param record called at once with what is used; `cached` tokens are part of `prompt` */
  constructor(record: (kind: TokenKind, tokens: number) => void) {
    this.#record = record;
  }

  /** For one answer to a prompt. What another answer, or an earlier attempt, has read of the prompt is not counted again. */
  answerTo(prompt: number): Progress {
    return {
      read: (tokens, cached) => {
        if (this.#found[prompt] === undefined) this.#add("cached", (this.#found[prompt] = cached));
        const before = this.#read[prompt] ?? 0;
        if (tokens <= before) return;
        this.#read[prompt] = tokens;
        this.#add("prompt", tokens - before);
      },
      wrote: (reasoning) => {
        this.#completion++;
        if (reasoning) this.#reasoning++;
        this.#add("completion", 1);
      },
    };
  }

  get usage(): Usage {
    const sum = (counts: readonly number[]) => counts.reduce((total, count = 0) => total + count, 0);
    return {
      promptTokens: sum(this.#read),
      cachedTokens: sum(this.#found),
      completionTokens: this.#completion,
      reasoningTokens: this.#reasoning,
    };
  }

  #add(kind: TokenKind, tokens: number): void {
    if (tokens > 0) this.#record(kind, tokens);
  }
}
