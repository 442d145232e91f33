/** One request while it is served: its tokens, its cache pages, and its reader. Knows no text and no schedule. */
import type { Content, EmbeddedSpan } from "../model/content.ts";
import { BLOCK_TOKENS, ROOT } from "./blocks.ts";
import type { Sampling } from "./sampling.ts";

/** Narrows the choice of each next token, as structured output does. */
export interface Constraint {
  /** Allowed ids as bits: id & 31 of word id >> 5, ceil(vocab / 32) words; null: all. Called once before each new token. */
  next(): Int32Array | null | Promise<Int32Array | null>;
  /** Told each token that was chosen, in order; never twice, also where a sequence is computed again. */
  accept(id: number): void;
}

/** A prompt of at least one token, and what is wanted of its answer. */
export interface Request extends Content {
  readonly sampling: Sampling;
  /** New tokens at most. */
  readonly maxNewTokens: number;
  /** Ids that end the answer; the one that does is part of it. */
  readonly stopIds?: readonly number[];
  /** How many of the likeliest tokens to return with each token. Default 0. */
  readonly topLogprobs?: number;
  /** Hand over which experts each token used. Default false. */
  readonly wantRouting?: boolean;
  readonly constraint?: Constraint;
  /** Whose request it is: owners take turns. Default: one owner for all. */
  readonly owner?: string;
  /** Aborting it ends the request between two steps. */
  readonly signal?: Pick<AbortSignal, "aborted" | "reason">;
}

/** Which experts computed one position: [mixture layers, chosen], best first. */
export interface TokenRouting {
  readonly experts: Int32Array;
  readonly weights: Float32Array;
}

export interface TokenLogprob {
  readonly id: number;
  readonly logprob: number;
}

export interface GeneratedToken {
  readonly id: number;
  /** Natural logarithm of its probability by the model alone, before bias, penalties and temperature. */
  readonly logprob: number;
  /** The likeliest tokens by the model alone, best first, where they were asked for. */
  readonly top?: readonly TokenLogprob[];
  /** Of the position that this token was predicted from. */
  readonly routing?: TokenRouting;
  /** On the first token: how many of the prompt's tokens the cache held already. */
  readonly cachedTokens?: number;
  /** Set on the last one: an end token was chosen, or there is no room for more. */
  readonly finish?: "stop" | "length";
}

export class Sequence {
  readonly request: Request;
  readonly owner: string;
  /** Prompt and answer. */
  readonly tokens: number[];
  /** What the prefix cache finds each token by: a model's `cacheKey`. The same array as `tokens` where a token is its id alone. */
  readonly keys: number[];
  readonly promptCount: number;
  /** Blocks of the cache, in order. */
  readonly pages: number[] = [];
  /** When it came, counted by the scheduler, and how many of its owner's came before it and are still here. */
  arrival = 0;
  place = 0;
  /** How many of `tokens` have their keys and values in the cache. */
  cached = 0;
  /** How many pages are remembered in the prefix cache, and the entry that their chain ends with. */
  chained = 0;
  entry = ROOT;
  /** Prompt tokens that the cache held when the sequence first got blocks; null before. */
  reused: number | null = null;
  /** Tokens that the reader has not taken yet. */
  readonly #events: GeneratedToken[] = [];
  #done = false;
  #failure: unknown = null;
  #wake: (() => void) | null = null;

  /** How far positions of the answer are ahead of its indices. */
  readonly #ahead: number;

  /** @param keys the prompt's `cacheKey` */
  constructor(request: Request, keys: readonly number[] = request.tokens) {
    this.request = request;
    this.owner = request.owner ?? "";
    this.tokens = [...request.tokens];
    this.keys = keys === request.tokens ? this.tokens : [...keys];
    this.promptCount = request.tokens.length;
    const { positions } = request;
    this.#ahead = positions ? positions.reduce((top, p) => Math.max(top, p), 0) + 1 - this.promptCount : 0;
  }

  /** Position of a token on an axis. Those of an answer follow the prompt's largest. */
  position(index: number, axis: number): number {
    const { positions } = this.request;
    return positions && index < this.promptCount ? positions[axis * this.promptCount + index] : index + this.#ahead;
  }

  /** Embeddings that fall among `count` tokens from `from` on, cut to those. */
  embeddings(from: number, count: number): EmbeddedSpan[] {
    return (this.request.embeddings ?? []).flatMap((span) => {
      const [first, end] = [Math.max(from, span.at), Math.min(from + count, span.at + span.count)];
      if (first >= end) return [];
      const width = span.values.length / span.count;
      const values = span.values.subarray((first - span.at) * width, (end - span.at) * width);
      return [{ at: first, count: end - first, values }];
    });
  }

  get aborted(): boolean {
    return this.request.signal?.aborted ?? false;
  }

  get done(): boolean {
    return this.#done;
  }

  /** Begins, or begins again, with blocks that hold the first of its tokens. */
  start(pages: readonly number[], entry: number): void {
    this.pages.push(...pages);
    this.chained = pages.length;
    this.entry = entry;
    this.cached = pages.length * BLOCK_TOKENS;
    this.reused ??= Math.min(this.cached, this.promptCount);
  }

  /** Appends a token; the sequence is done when it ends the answer. Its reader sees it after the next `wake`. */
  append(token: GeneratedToken): void {
    this.tokens.push(token.id);
    if (this.keys !== this.tokens) this.keys.push(token.id);
    this.#events.push(token);
    if (token.finish) this.#done = true;
  }

  wake(): void {
    this.#wake?.();
  }

  /** Ends the sequence; its reader throws `reason`, or just ends when the reader itself left. */
  fail(reason: unknown): void {
    if (this.#done) return; // it has ended already, for the reason that its reader hears
    this.#done = true;
    this.#failure = reason;
    this.#wake?.();
  }

  /** The answer as it is made. Leaving the loop early cancels the request. */
  read(): AsyncGenerator<GeneratedToken, void, undefined> {
    const reader = this.#read();
    const leave = reader.return.bind(reader);
    reader.return = (value) => {
      this.#done = true; // a generator that was never started would not run its `finally`
      return leave(value);
    };
    return reader;
  }

  async *#read(): AsyncGenerator<GeneratedToken, void, undefined> {
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
