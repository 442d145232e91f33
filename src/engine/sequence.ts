/** One request while it is served: its tokens, its cache pages, and its reader. Knows no text and no schedule. */
import type { Sampling } from "./sampling.ts";

export interface Request {
  /** The prompt; at least one token. */
  readonly tokens: readonly number[];
  readonly sampling: Sampling;
  /** New tokens at most. */
  readonly maxNewTokens: number;
  /** Ids that end the answer; the one that does is part of it. */
  readonly stopIds?: readonly number[];
  /** Hand over the unprocessed logits [vocab] with each token. Default false. */
  readonly wantLogits?: boolean;
  /** Aborting it ends the request between two steps. */
  readonly signal?: Pick<AbortSignal, "aborted" | "reason">;
}

export interface GeneratedToken {
  readonly id: number;
  /** Natural logarithm of its probability by the model alone, before bias, penalties and temperature. */
  readonly logprob: number;
  readonly logits?: Float32Array;
  /** Set on the last one: an end token was chosen, or there is no room for more. */
  readonly finish?: "stop" | "length";
}

export class Sequence {
  /** Prompt and answer. */
  readonly tokens: number[];
  readonly promptCount: number;
  /** Blocks of the cache, in order. */
  readonly pages: number[] = [];
  /** How many of `tokens` have their keys and values in the cache. */
  cached = 0;
  readonly request: Request;
  /** Tokens that the reader has not taken yet. */
  readonly #events: GeneratedToken[] = [];
  #done = false;
  #failure: unknown = null;
  #wake: (() => void) | null = null;

  constructor(request: Request) {
    this.request = request;
    this.tokens = [...request.tokens];
    this.promptCount = request.tokens.length;
  }

  get aborted(): boolean {
    return this.request.signal?.aborted ?? false;
  }

  get done(): boolean {
    return this.#done;
  }

  /** Appends a token; the sequence is done when it ends the answer. */
  append(token: GeneratedToken): void {
    this.tokens.push(token.id);
    this.#events.push(token);
    if (token.finish) this.#done = true;
    this.#wake?.();
  }

  /** Ends the sequence; its reader throws `reason`, or just ends when the reader itself left. */
  fail(reason: unknown): void {
    this.#done = true;
    this.#failure = reason;
    this.#wake?.();
  }

  /** The answer as it is made. Leaving the loop early cancels the request. */
  async *read(): AsyncGenerator<GeneratedToken, void, undefined> {
    try {
      for (;;) {
        for (let token = this.#events.shift(); token; token = this.#events.shift()) yield token;
        if (this.#failure !== null) throw this.#failure;
        if (this.#done) return;
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
        this.#wake = null;
      }
    } finally {
      this.#done = true;
    }
  }
}
