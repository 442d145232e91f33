/**
 * The words that the parts of the server share: a model that is served, what may be asked of it, and what comes back.
 * HTTP and gRPC turn their requests into a `CompletionRequest` and its events into their replies. Knows no protocol.
 */
import type { Engine } from "../../engine/engine.ts";
import type { Sampling } from "../../engine/sampling.ts";
import type { Grammars } from "../../grammar/grammars.ts";
import type { ErnieConfig } from "../../model/config.ts";
import type { Message } from "../../tokenizer/template.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import type { Encoder } from "./encoder.ts";

/** A loaded model under the name that clients know it by. */
export interface ServedModel {
  readonly name: string;
  /** When it was made known, seconds since 1970. */
  readonly created: number;
  readonly config: ErnieConfig;
  readonly tokenizer: Tokenizer;
  readonly engine: Engine;
  /** Format that most of the weights have in memory: `fp32`, `bf16`, `int8` and so on. */
  readonly dtype: string;
  readonly encoder: Encoder;
  readonly grammars: Grammars;
  /** generation_config.json: defaults of the sampling controls. */
  readonly generationConfig: Readonly<Record<string, unknown>>;
}

/** Models by name, loaded when first used. */
export interface Catalog {
  /** Every name that may be asked for, loaded or not. */
  list(): readonly { readonly name: string; readonly created: number; readonly loaded: boolean }[];
  /**
   * The model, kept loaded until `release` is called. Throws ServerError `model_not_found`, or `overloaded` when memory does
   * not allow it.
   */
  use(name: string): Promise<{ readonly model: ServedModel; release(): void }>;
}

/** Who asks: what authentication found out. */
export interface Caller {
  /** Id of the key, or "anonymous" where the server has no keys. Requests of one caller share a turn in the engine. */
  readonly id: string;
  /** Models that the key may use; null: all. */
  readonly models: readonly string[] | null;
}

/** A function that the model may call, as in OpenAI's `tools`. */
export interface ToolDefinition {
  readonly name: string;
  readonly description?: string;
  /** JSON schema of the arguments. */
  readonly parameters?: Readonly<Record<string, unknown>>;
  /** Whether the arguments must satisfy the schema, enforced while decoding. Default false. */
  readonly strict?: boolean;
}

/** `auto`: the model decides; `required`: it must call one; a name: it must call that one. */
export type ToolChoice = "auto" | "none" | "required" | { readonly name: string };

export type Prompt =
  /** `specialTokens`: with those around it that the tokenizer declares; default true. */
  | { readonly kind: "text"; readonly text: string; readonly specialTokens?: boolean }
  | { readonly kind: "tokens"; readonly tokens: readonly number[] }
  | {
      readonly kind: "chat";
      readonly messages: readonly Message[];
      readonly tools: readonly ToolDefinition[];
      readonly toolChoice: ToolChoice;
      /** False where the model itself decides how many it calls at once. */
      readonly oneToolCall: boolean;
      /** Further variables of the chat template. */
      readonly templateVariables: Readonly<Record<string, unknown>>;
    };

export type ResponseFormat =
  | { readonly kind: "text" }
  | { readonly kind: "json" }
  | { readonly kind: "schema"; readonly schema: Readonly<Record<string, unknown>> };

/** One answer that is wanted. A request for several is several of these. */
export interface CompletionRequest {
  readonly prompt: Prompt;
  /** Longer prompts are refused. Default: those that the model has no room for. */
  readonly maxPromptTokens?: number;
  readonly sampling: Sampling;
  /** Null: until the model ends or its positions do. */
  readonly maxTokens: number | null;
  /** Texts that end the answer; they are left out of it. */
  readonly stop: readonly string[];
  readonly format: ResponseFormat;
  /** Null: no log-probabilities; a number: with so many alternatives each. */
  readonly logprobs: number | null;
  readonly routing: boolean;
  /** Caller's id. */
  readonly owner: string;
  readonly signal: AbortSignal;
}

export interface TokenLogprob {
  readonly id: number;
  /** Its bytes, which need not be whole characters. */
  readonly bytes: Uint8Array;
  readonly logprob: number;
}

/** What each token of an answer used: experts and weights are [mixture layers, chosen]. */
export interface TokenRouting {
  readonly id: number;
  readonly text: string;
  readonly layers: readonly number[];
  readonly experts: Int32Array;
  readonly weights: Float32Array;
}

export interface Usage {
  readonly promptTokens: number;
  /** Of the prompt's, those that the prefix cache had. */
  readonly cachedTokens: number;
  readonly completionTokens: number;
  /** Of the completion's, those of the reasoning. */
  readonly reasoningTokens: number;
}

export type FinishReason = "stop" | "length" | "toolCalls";

/** An answer as it is made: whole characters only. `end` comes last and exactly once; failures are thrown. */
export type CompletionEvent =
  | { readonly kind: "text"; readonly channel: "answer" | "reasoning"; readonly text: string }
  | { readonly kind: "logprob"; readonly token: TokenLogprob; readonly top: readonly TokenLogprob[] }
  | { readonly kind: "routing"; readonly token: TokenRouting }
  /** The first of a call has its id and name; `arguments` is the next piece of its JSON. */
  | { readonly kind: "toolCall"; readonly index: number; readonly id?: string; readonly name?: string; readonly arguments: string }
  | { readonly kind: "end"; readonly reason: FinishReason; readonly usage: Usage };
