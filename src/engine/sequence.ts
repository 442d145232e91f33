/** One request being served: its tokens, its cache pages, and its reader. Knows no text and no schedule. */
import type { Content, EmbeddedSpan } from "../model/content.ts";
import type { LoadedAdapter } from "./adapters.ts";
import { BLOCK_TOKENS, ROOT } from "./blocks.ts";
import type { Sampling } from "./sampling.ts";

/** Restricts the choice of each next token, for structured output for example. */
export interface Constraint {
  /** Allowed ids as a bit mask: bit id & 31 of word id >> 5, ceil(vocab / 32) words; null: all. Called once before each new token. */
  next(): Int32Array | null | Promise<Int32Array | null>;
  /** Receives each chosen token once, in order, even if the sequence is recomputed. */
  accept(id: number): void;
}

/** A prompt of at least one token, and how to generate its answer. */
export interface Request extends Content {
  readonly sampling: Sampling;
  /** The most new tokens. */
  readonly maxNewTokens: number;
  /** Ids that end the answer; the one that ends it is included. */
  readonly stopIds?: readonly number[];
  /** How many of the likeliest tokens to return with each token. Default 0. */
  readonly topLogprobs?: number;
  /** Return the experts that each token used. Default false. */
  readonly wantRouting?: boolean;
  readonly constraint?: Constraint;
  /** The name of a loaded adapter. Default: the base model. */
  readonly adapter?: string;
  /** Called after each step with how many of the prompt's tokens have been read, those found in the prefix cache included, and with those found; it must not throw. */
  readonly onPrompt?: (read: number, cached: number) => void;
  /** Owners take turns. Default: one owner for all requests. */
  readonly owner?: string;
  /** Aborting it ends the request before the next step. */
  readonly signal?: Pick<AbortSignal, "aborted" | "reason">;
}

/** The experts that computed one position: [mixture layers, chosen], best first. */
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
  /** Natural logarithm of its probability according to the model alone, before bias, penalties and temperature. */
  readonly logprob: number;
  /** The likeliest tokens according to the model alone, best first, if requested. */
  readonly top?: readonly TokenLogprob[];
  /** Of a classifier: its logits, [classes], in place of a token. */
  readonly scores?: Float32Array;
  /** For the position that this token was predicted from. */
  readonly routing?: TokenRouting;
  /** On the first token: how many of the prompt's tokens were already cached. */
  readonly cachedTokens?: number;
  /** Set on the last token: an end token was chosen, or there is no room for more. */
  readonly finish?: "stop" | "length";
}

export class Sequence {
  readonly request: Request;
  readonly owner: string;
  /** Prompt and answer. */
  readonly tokens: number[];
  /** The prefix cache's key of each token, from the model's `cacheKey`. The same array as `tokens` where ids alone identify tokens. */
  readonly keys: number[];
  readonly promptCount: number;
  /** As its name was when the request came; null: the base model. */
  readonly adapter: LoadedAdapter | null;
  /** Blocks of the cache, in order. */
  readonly pages: number[] = [];
  /** Its place in the order of arrival, and how many earlier sequences of its owner are still here. */
  arrival = 0;
  place = 0;
  /** How many of `tokens` have keys and values in the cache. */
  cached = 0;
  /** How many of the pages are in the prefix cache, and the last entry of their chain. */
  chained = 0;
  entry: number;
  /** Prompt tokens that were cached when the sequence first got blocks; null before that. */
  reused: number | null = null;
  /** Tokens that the reader has not consumed. */
  readonly #events: GeneratedToken[] = [];
  #done = false;
  #failure: unknown = null;
  #wake: (() => void) | null = null;

  /** Offset from the indices of the answer's tokens to their positions. */
  readonly #ahead: number;

  /** @param keys the prompt's `cacheKey` */
  constructor(request: Request, keys: readonly number[] = request.tokens, adapter: LoadedAdapter | null = null) {
    this.request = request;
    this.adapter = adapter;
    this.entry = this.root;
    this.owner = request.owner ?? "";
    this.tokens = [...request.tokens];
    this.keys = keys === request.tokens ? this.tokens : [...keys];
    this.promptCount = request.tokens.length;
    const { positions } = request;
    this.#ahead = positions ? positions.reduce((top, p) => Math.max(top, p), 0) + 1 - this.promptCount : 0;
  }

  /** The entry where its chain of remembered blocks begins. */
  get root(): number {
    return this.adapter?.root ?? ROOT;
  }

  /** Position of a token on an axis. An answer's positions follow the prompt's largest. */
  position(index: number, axis: number): number {
    const { positions } = this.request;
    return positions && index < this.promptCount ? positions[axis * this.promptCount + index] : index + this.#ahead;
  }

  /** The embeddings for `count` tokens starting at `from`, trimmed to that range. */
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

  /** Starts or restarts with blocks that hold its first tokens. */
  start(pages: readonly number[], entry: number): void {
    this.pages.push(...pages);
    this.chained = pages.length;
    this.entry = entry;
    this.cached = pages.length * BLOCK_TOKENS;
    this.reused ??= Math.min(this.cached, this.promptCount);
  }

  /** Appends a token; a token that ends the answer ends the sequence. The reader sees it after the next `wake`. */
  append(token: GeneratedToken): void {
    this.tokens.push(token.id);
    if (this.keys !== this.tokens) this.keys.push(token.id);
    this.#events.push(token);
    if (token.finish) this.#done = true;
  }

  wake(): void {
    this.#wake?.();
  }

  /** Ends the sequence; its reader throws `reason`, or simply returns if it left by itself. */
  fail(reason: unknown): void {
    if (this.#done) return; // already ended; its reader gets that reason
    this.#done = true;
    this.#failure = reason;
    this.#wake?.();
  }

  /** Yields the answer as it is generated. Leaving the loop early cancels the request. */
  read(): AsyncGenerator<GeneratedToken, void, undefined> {
    const reader = this.#read();
    const leave = reader.return.bind(reader);
    reader.return = (value) => {
      this.#done = true; // a generator that never started does not run its `finally`
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
