/**
 * generation_config.json: reads what transformers' GenerationConfig holds, checks it, and fills in what a request leaves open. The library
 * and the server use the same defaults. Knows no request and no engine.
 */
import { type Control, GREEDY, inRange, RANGES, type Range, rangeText, type Sampling } from "../engine/sampling.ts";
import { ConfigError, type ErnieConfig, readIds, show } from "../model/config.ts";

/** Lengths and counts, in tokens and answers. */
export const COUNTS = {
  max_length: { least: 1, most: Number.MAX_SAFE_INTEGER, whole: true },
  max_new_tokens: { least: 1, most: Number.MAX_SAFE_INTEGER, whole: true },
  num_return_sequences: { least: 1, most: 4096, whole: true },
} as const satisfies Record<string, Range>;

/** A model's defaults, checked; absent where the file sets none. */
export type GenerationDefaults = Readonly<
  Partial<Record<Exclude<Control, "seed"> | keyof typeof COUNTS, number>> & {
    do_sample?: boolean;
    num_beams?: number;
    eos_token_id?: readonly number[];
    stop_strings?: readonly string[];
    /** Tokens that are never chosen. */
    forbidden?: readonly number[];
  }
>;

/** Fields that would change answers and have no effect here, with the values that mean nothing. */
const WITHOUT_EFFECT: Readonly<Record<string, unknown>> = {
  min_length: 0,
  min_new_tokens: 0,
  max_time: null,
  num_beams: 1,
  num_beam_groups: 1,
  penalty_alpha: 0,
  dola_layers: null,
  typical_p: 1,
  epsilon_cutoff: 0,
  eta_cutoff: 0,
  diversity_penalty: 0,
  encoder_repetition_penalty: 1,
  force_words_ids: null,
  constraints: null,
  forced_bos_token_id: null,
  forced_eos_token_id: null,
  exponential_decay_length_penalty: null,
  begin_suppress_tokens: null,
  sequence_bias: null,
  guidance_scale: 1,
  token_healing: false,
  watermarking_config: null,
};

const MOST_STOPS = 64;
const MOST_FORBIDDEN = 4096;
const LONGEST_STOP = 1024;

/**
 * The defaults of a model, and the fields of the file that change answers in transformers and not here. Throws ConfigError that names the
 * file and the field for a value of the wrong kind or out of range. Null means that the field is not set.
 */
export function readDefaults(
  raw: Readonly<Record<string, unknown>>,
  config: Pick<ErnieConfig, "vocabSize">,
): { readonly defaults: GenerationDefaults; readonly warnings: readonly string[] } {
  const refuse = (name: string, wanted: string): never => {
    throw new ConfigError(`generation_config.json: ${name} is ${show(raw[name])}; it must be ${wanted}`);
  };
  const warnings: string[] = [];
  const warn = (name: string) => warnings.push(`generation_config.json: ${name} has no effect: it is not supported`);
  const set = (name: string) => Object.hasOwn(raw, name) && raw[name] !== null;

  const numbers: Partial<Record<string, number>> = {};
  const { seed: _, ...controls } = RANGES;
  for (const [name, range] of Object.entries({ ...controls, ...COUNTS, num_beams: { least: 1, most: 1e6, whole: true } as Range })) {
    if (!set(name)) continue;
    const value = raw[name];
    if (!inRange(value, range)) refuse(name, rangeText(range));
    numbers[name] = value as number;
  }
  if (set("do_sample") && typeof raw["do_sample"] !== "boolean") refuse("do_sample", "true or false");
  const stops = set("stop_strings") ? [raw["stop_strings"]].flat() : [];
  if (stops.length > MOST_STOPS || !stops.every((text) => typeof text === "string" && text !== "" && text.length <= LONGEST_STOP))
    refuse("stop_strings", `at most ${MOST_STOPS} texts of 1 to ${LONGEST_STOP} characters`);

  const forbidden: number[] = [];
  const forbid = (name: string, ids: readonly unknown[]) => {
    const range: Range = { least: 0, most: config.vocabSize - 1, whole: true };
    if (ids.length > MOST_FORBIDDEN || !ids.every((id) => inRange(id, range)))
      refuse(name, `at most ${MOST_FORBIDDEN} token ids, each ${rangeText(range)}`);
    forbidden.push(...(ids as number[]));
  };
  if (set("suppress_tokens")) forbid("suppress_tokens", [raw["suppress_tokens"]].flat());
  if (set("bad_words_ids")) {
    const words = raw["bad_words_ids"];
    if (!Array.isArray(words) || !words.every((word) => Array.isArray(word) && word.length > 0))
      refuse("bad_words_ids", "a list of lists of token ids");
    const single = (words as unknown[][]).filter((word) => word.length === 1);
    forbid("bad_words_ids", single.flat());
    if (single.length < (words as unknown[]).length)
      warnings.push("generation_config.json: bad_words_ids of more than one token have no effect: only single tokens are supported");
  }
  for (const [name, nothing] of Object.entries(WITHOUT_EFFECT)) if (set(name) && raw[name] !== nothing && !isEmpty(raw[name])) warn(name);

  return {
    defaults: {
      ...numbers,
      ...(set("do_sample") ? { do_sample: raw["do_sample"] as boolean } : {}),
      ...(set("eos_token_id") ? { eos_token_id: readIds(raw["eos_token_id"], "generation_config.json: eos_token_id") } : {}),
      ...(stops.length > 0 ? { stop_strings: stops as string[] } : {}),
      ...(forbidden.length > 0 ? { forbidden: [...new Set(forbidden)] } : {}),
    },
    warnings,
  };
}

/** The controls of a request; absent or null where it leaves them to the model. */
export type Controls = {
  readonly [Name in Exclude<Control, "seed">]?: number | null;
} & {
  readonly logit_bias?: ReadonlyMap<number, number>;
  readonly seed: number;
};

/** The sampling of a request over the model's defaults. @param samples false: greedy, whatever the temperature */
export function resolveSampling(given: Controls, defaults: GenerationDefaults, samples: boolean): Sampling {
  const pick = (name: Exclude<Control, "seed">, otherwise: number): number => given[name] ?? defaults[name] ?? otherwise;
  const { forbidden = [] } = defaults;
  return {
    ...GREEDY,
    ...(samples ? { temperature: pick("temperature", 1), topK: pick("top_k", 0), topP: pick("top_p", 1), minP: pick("min_p", 0) } : {}),
    repetitionPenalty: pick("repetition_penalty", 1),
    presencePenalty: pick("presence_penalty", 0),
    frequencyPenalty: pick("frequency_penalty", 0),
    noRepeatNgram: pick("no_repeat_ngram_size", 0),
    logitBias: new Map([...(given.logit_bias ?? []), ...forbidden.map((id) => [id, Number.NEGATIVE_INFINITY] as const)]),
    seed: given.seed,
  };
}

/** Ids that end an answer: those of generation_config.json, else of config.json. */
export function endTokenIds({ eos_token_id: eos }: GenerationDefaults, config: Pick<ErnieConfig, "eosTokenIds">): readonly number[] {
  return eos ?? config.eosTokenIds;
}

function isEmpty(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}
