/** Options of `generate`, named as in transformers: their defaults, validation, and conversion to requests. Runs nothing. */
import { randomInt } from "node:crypto";
import { type ResponseFormat, type ResponseFormatOption, readFormat } from "../chat/format.ts";
import { inRange, type Range, rangeText, type Sampling } from "../engine/sampling.ts";
import { type ErnieConfig, readIds } from "../model/config.ts";
import { idRows, type TokenRows } from "../tokenizer/ids.ts";
import { optionFault } from "../tokenizer/options.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { COUNTS, endTokenIds, type GenerationDefaults, resolveSampling } from "./defaults.ts";
import type { Streamer } from "./streamers.ts";

/** The model's generation_config.json may set any default; those given here apply otherwise. */
export interface GenerationOptions {
  /** Maximum number of tokens of prompt and answer together. Ignored when `max_new_tokens` is given. */
  readonly max_length?: number;
  /** Maximum number of tokens of the answer. Default 256 when `max_length` is not given either. */
  readonly max_new_tokens?: number;
  /** Sample by probability. Default false: always take the likeliest token. */
  readonly do_sample?: boolean;
  /** Divides the logits; below 1 sharpens the distribution, 0 is greedy. Default 1. Ignored unless sampling, like the next three. */
  readonly temperature?: number;
  /** Sample from the k likeliest tokens; 0 is no limit. Default 0. */
  readonly top_k?: number;
  /** Sample from the likeliest tokens whose probabilities add up to this. Default 1 (https://arxiv.org/abs/1904.09751). */
  readonly top_p?: number;
  /** Sample from tokens at least this fraction as likely as the likeliest. Default 0 (https://arxiv.org/abs/2407.01082). */
  readonly min_p?: number;
  /** Divides the logits of tokens that have occurred, prompt included. Default 1: no penalty. */
  readonly repetition_penalty?: number;
  /** Subtracted once from the logit of each token that has occurred in the answer. Default 0. */
  readonly presence_penalty?: number;
  /** Subtracted from a token's logit for each occurrence in the answer. Default 0. */
  readonly frequency_penalty?: number;
  /** No n-gram of this size occurs twice; 0: off. Default 0. */
  readonly no_repeat_ngram_size?: number;
  /** Added to logits, by token id; -Infinity forbids a token. */
  readonly logit_bias?: Readonly<Record<number, number>> | ReadonlyMap<number, number>;
  /** Makes sampling repeatable. Default: a random seed. */
  readonly seed?: number;
  /** Ids that end an answer: one, a list, or null for none. Default: the model's. */
  readonly eos_token_id?: number | bigint | readonly (number | bigint)[] | null;
  /** Texts that end an answer when they occur in it. Needs `tokenizer`. */
  readonly stop_strings?: string | readonly string[];
  /** For options that read or constrain the answer's text. */
  readonly tokenizer?: Tokenizer;
  /**
   * The form of the answer, enforced token by token: any JSON object, JSON of a schema, or text that matches a regular expression
   * as a whole. Needs `tokenizer`. An answer that `max_new_tokens` cuts off is incomplete. Default: free text.
   */
  readonly response_format?: ResponseFormatOption;
  /** Answers per prompt. More than one needs sampling. Default 1. */
  readonly num_return_sequences?: number;
  /** Receives the prompt, then each new token. Only for one prompt with one answer. */
  readonly streamer?: Streamer;
  /** Aborting it stops generation between two tokens; `generate` then rejects with the signal's reason. */
  readonly signal?: AbortSignal;
  /** Return an object with log-probabilities and finish reasons instead of plain sequences. Default false. */
  readonly return_dict_in_generate?: boolean;
  /** With `return_dict_in_generate`: the likeliest n alternatives at each step, with their log-probabilities. Default 0. */
  readonly top_logprobs?: number;
  /** The name of a loaded adapter; null: the base model. Default: the one that `set_adapter` made active. */
  readonly adapter?: string | null;
  /** Accepted for compatibility: the cache is always used, and there is one beam. */
  readonly use_cache?: true;
  readonly num_beams?: 1;
}

/** Options resolved against a model's defaults. */
export interface ResolvedGeneration {
  readonly sampling: Sampling;
  readonly stopIds: readonly number[];
  readonly stopStrings: readonly string[];
  readonly answers: number;
  readonly format: ResponseFormat;
  /** Maximum number of tokens of the answer to a prompt of this length. */
  maxNewTokens(promptLength: number): number;
}

/** Options of `generate` that are not in `GenerationOptions`. */
const INPUTS = ["input_ids", "attention_mask"];
const KNOWN = new Set<string>([
  ...INPUTS,
  ...([
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "seed",
    "eos_token_id",
    "stop_strings",
    "tokenizer",
    "num_return_sequences",
    "streamer",
    "signal",
    "response_format",
    "return_dict_in_generate",
    "top_logprobs",
    "adapter",
    "use_cache",
    "num_beams",
  ] satisfies (keyof GenerationOptions)[]),
]);

/**
 * Fills in defaults. Throws RangeError for options that are unknown, out of range or contradict each other, GrammarError for a malformed
 * `response_format`. The ranges of the sampling controls are checked when a request is submitted.
 */
export function resolveGeneration(options: GenerationOptions, defaults: GenerationDefaults, config: ErnieConfig): ResolvedGeneration {
  const fault = optionFault("generate", options, KNOWN);
  if (fault !== null) throw new RangeError(fault);
  const count = (name: keyof typeof COUNTS): number | undefined => {
    const value = options[name];
    const range: Range = COUNTS[name];
    if (value !== undefined && !inRange(value, range)) throw new RangeError(`${name} is ${String(value)}; it must be ${rangeText(range)}`);
    return value ?? defaults[name];
  };
  const beams = options.num_beams ?? defaults.num_beams ?? 1;
  if (beams !== 1) throw new RangeError(`num_beams is ${beams}; beam search is not supported, only 1`);

  const samples = (options.do_sample ?? defaults.do_sample ?? false) && (options.temperature ?? defaults.temperature) !== 0;
  const answers = count("num_return_sequences") ?? 1;
  if (answers > 1 && !samples)
    throw new RangeError(`num_return_sequences is ${answers}, but without do_sample all answers would be the same`);
  const stopStrings = [options.stop_strings ?? defaults.stop_strings ?? []].flat();
  if (stopStrings.some((s) => typeof s !== "string" || s === "")) throw new RangeError("stop_strings must be non-empty strings");
  if (stopStrings.length && !options.tokenizer)
    throw new RangeError(
      `stop_strings${options.stop_strings ? "" : " of generation_config.json"} needs the option 'tokenizer' as well, to read the answer`,
    );

  const { logit_bias: bias = {}, seed = randomInt(2 ** 47) } = options;
  const entries = bias instanceof Map ? [...bias] : Object.entries(bias).map(([id, value]) => [idOf(id), value] as const);
  const sampling = resolveSampling(
    { ...options, logit_bias: new Map(entries.map(([id, value]) => [Number(id), value])), seed },
    defaults,
    samples,
  );
  const maxLength = count("max_length");
  const own = count("max_new_tokens");
  const maxNew = options.max_new_tokens === undefined && options.max_length !== undefined ? undefined : own;
  return {
    sampling,
    stopIds: options.eos_token_id === undefined ? endTokenIds(defaults, config) : stopIdsOf(options.eos_token_id, config),
    stopStrings,
    answers,
    format: readFormat(options.response_format),
    maxNewTokens(promptLength) {
      if (maxNew !== undefined) return maxNew;
      if (maxLength === undefined) return 256;
      if (promptLength >= maxLength)
        throw new RangeError(`the prompt has ${promptLength} tokens, and max_length is ${maxLength}; raise it, or give max_new_tokens`);
      return maxLength - promptLength;
    },
  };
}

function idOf(text: string): number {
  if (!/^\d+$/.test(text)) throw new RangeError(`logit_bias: the token id is '${text}'; it must be a whole number`);
  return Number(text);
}

function stopIdsOf(given: NonNullable<GenerationOptions["eos_token_id"]> | null, { vocabSize }: ErnieConfig): readonly number[] {
  const ids = given === null ? [] : readIds(given, "eos_token_id");
  const wrong = ids.find((id) => id >= vocabSize);
  if (wrong !== undefined) throw new RangeError(`eos_token_id: ${wrong} is outside the vocabulary of ${vocabSize}`);
  return ids;
}

/** Prompts for `generate` and `forward`: rows of ids, and which of them are padding. */
export interface ModelInputs {
  readonly input_ids: TokenRows;
  /** 1 for a token, 0 for padding, in the shape of `input_ids`. Default: no padding. */
  readonly attention_mask?: TokenRows;
}

/** A prompt and its position in the row as given. */
export interface Row {
  /** The row as given, padding included. */
  readonly given: readonly number[];
  readonly tokens: readonly number[];
  /** Index in `given` of the first token that is not padding. */
  readonly start: number;
}

/** Removes padding. Throws RangeError for rows without tokens, masks of another shape, or padding between tokens. */
export function readRows({ input_ids, attention_mask }: ModelInputs): Row[] {
  const ids = idRows(input_ids);
  if (ids === null) throw new RangeError("input_ids must be rows of token ids: number[][], or a tensor of two dimensions");
  const masks = attention_mask && idRows(attention_mask);
  if (masks === null) throw new RangeError("attention_mask must be rows of 0 and 1, in the shape of input_ids");
  if (ids.length === 0) throw new RangeError("the prompt is empty: input_ids has no rows");
  if (masks && (masks.length !== ids.length || masks.some((m, i) => m.length !== ids[i].length)))
    throw new RangeError("attention_mask has another shape than input_ids");
  return ids.map((given, i) => {
    const mask = masks?.[i] ?? given.map(() => 1);
    const start = Math.max(
      0,
      mask.findIndex((m) => m !== 0),
    );
    const count = mask.filter((m) => m !== 0).length;
    if (mask.slice(start, start + count).some((m) => m === 0))
      throw new RangeError(`attention_mask, row ${i}: padding must stand before or after the tokens, not between them`);
    return { given, tokens: given.slice(start, start + count), start };
  });
}
