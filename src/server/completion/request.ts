/**
 * What may be asked of a model, and what comes back: HTTP and gRPC turn their requests into a `CompletionRequest` and its
 * events into their replies. Knows no protocol.
 */
import type { ResponseFormat } from "../../chat/format.ts";
import type { Prompt } from "../../chat/prompt.ts";
import type { ReplyEvent } from "../../chat/reply.ts";
import type { Sampling } from "../../engine/sampling.ts";
import type { TokenLogprob, TokenRouting } from "../../engine/sequence.ts";

/** A request for one answer. A client that wants several makes several of these. */
export interface CompletionRequest {
  readonly prompt: Prompt;
  /** Longer prompts are rejected. Default: those that do not fit the model. */
  readonly maxPromptTokens?: number;
  readonly sampling: Sampling;
  /** Null: until the model ends the answer or its context is full. */
  readonly maxTokens: number | null;
  /** Texts that end the answer; they are not part of it. */
  readonly stop: readonly string[];
  readonly format: ResponseFormat;
  /** Null: no log-probabilities; a number: log-probabilities with this many alternatives each. */
  readonly logprobs: number | null;
  readonly routing: boolean;
  /** Caller's id. */
  readonly owner: string;
  readonly signal: AbortSignal;
}

/** A token's log-probability, for clients. */
export interface ScoredToken extends TokenLogprob {
  /** The token's bytes, which need not be whole characters. */
  readonly bytes: Uint8Array;
}

/** Which experts a token used, for clients. */
export interface RoutedToken extends TokenRouting {
  readonly id: number;
  readonly text: string;
  /** Indices of the mixture layers. */
  readonly layers: readonly number[];
}

export interface Usage {
  readonly promptTokens: number;
  /** Prompt tokens found in the prefix cache. */
  readonly cachedTokens: number;
  readonly completionTokens: number;
  /** Completion tokens spent on reasoning. */
  readonly reasoningTokens: number;
}

/** Told what one answer costs, while it is computed. */
export interface Progress {
  /** How many of the prompt's tokens have been read so far, and how many of those were found in the prefix cache. */
  read(tokens: number, cached: number): void;
  /** Another token of the answer. */
  wrote(reasoning: boolean): void;
}

export type FinishReason = "stop" | "length" | "toolCalls";

/** An answer while it is generated, in whole characters. `end` comes last and exactly once; failures are thrown. */
export type CompletionEvent =
  | ReplyEvent
  | { readonly kind: "logprob"; readonly token: ScoredToken; readonly top: readonly ScoredToken[] }
  | { readonly kind: "routing"; readonly token: RoutedToken }
  | { readonly kind: "end"; readonly reason: FinishReason; readonly usage: Usage };
