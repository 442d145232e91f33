/**
 * From options named as in transformers to the engine's sampling controls, with the defaults of generation_config.json. The library and
 * the server read both here, so that a model answers alike through either. The ranges are the engine's (`engine/sampling.ts`).
 */
import { randomInt } from "node:crypto";
import { checkSampling, GREEDY, type Sampling } from "../engine/sampling.ts";

/** Controls of sampling, all optional; `null` means unset. */
export interface SamplingOptions {
  readonly do_sample?: boolean | null;
  readonly temperature?: number | null;
  readonly top_k?: number | null;
  readonly top_p?: number | null;
  readonly min_p?: number | null;
  readonly repetition_penalty?: number | null;
  readonly presence_penalty?: number | null;
  readonly frequency_penalty?: number | null;
  readonly no_repeat_ngram_size?: number | null;
  readonly logit_bias?: Readonly<Record<string, number>> | ReadonlyMap<number, number> | null;
  readonly seed?: number | null;
}

const FILE = "generation_config.json";

/**
 * The controls of one answer. Options that are not given are the model's; where it has none, they have no effect.
 * @throws RangeError that names a malformed option; ranges are checked when a request is submitted
 */
export function samplingOf(options: SamplingOptions, defaults: Readonly<Record<string, unknown>>): Sampling {
  const numberOf = (name: Exclude<keyof SamplingOptions, "do_sample" | "logit_bias">, fallback: number): number => {
    if (options[name] != null) return options[name];
    const value = defaults[name] ?? fallback;
    if (typeof value === "number") return value;
    throw new RangeError(`${FILE}: ${name} is ${JSON.stringify(value)}; it must be a number`);
  };
  const samples = options.do_sample ?? defaults["do_sample"] ?? false;
  if (typeof samples !== "boolean") throw new RangeError(`${FILE}: do_sample is ${JSON.stringify(samples)}; it must be true or false`);
  const controls = samples
    ? {
        temperature: numberOf("temperature", 1),
        topK: numberOf("top_k", 0),
        topP: numberOf("top_p", 1),
        minP: numberOf("min_p", 0),
      }
    : {};
  return {
    ...GREEDY,
    ...controls,
    repetitionPenalty: numberOf("repetition_penalty", 1),
    presencePenalty: numberOf("presence_penalty", 0),
    frequencyPenalty: numberOf("frequency_penalty", 0),
    noRepeatNgram: numberOf("no_repeat_ngram_size", 0),
    logitBias: biasOf(options.logit_bias ?? {}),
    seed: options.seed ?? randomInt(2 ** 47),
  };
}

function biasOf(bias: NonNullable<SamplingOptions["logit_bias"]>): Map<number, number> {
  const entries: [unknown, number][] = bias instanceof Map ? [...bias] : Object.entries(bias);
  return new Map(
    entries.map(([id, value]) => {
      if (!/^\d{1,15}$/.test(String(id)))
        throw new RangeError(`logit_bias: the token id is ${JSON.stringify(String(id))}; it must be a whole number`);
      return [Number(id), value];
    }),
  );
}

/** Fields of generation_config.json that would change answers and that nothing here reads, with the values that change nothing. */
const UNREAD: Readonly<Record<string, readonly unknown[]>> = {
  min_length: [0],
  min_new_tokens: [0],
  bad_words_ids: [],
  suppress_tokens: [],
  begin_suppress_tokens: [],
  forced_bos_token_id: [],
  forced_eos_token_id: [],
  sequence_bias: [],
  stop_strings: [],
  typical_p: [1],
  epsilon_cutoff: [0],
  eta_cutoff: [0],
  encoder_repetition_penalty: [1],
  encoder_no_repeat_ngram_size: [0],
  exponential_decay_length_penalty: [],
  num_beams: [1],
  num_beam_groups: [1],
  penalty_alpha: [0],
  diversity_penalty: [0],
  guidance_scale: [1],
  max_time: [],
};

/**
 * Checks the sampling defaults of a model.
 * @returns what the file sets and nothing reads, as one sentence; null: nothing
 * @throws RangeError that names the file and the field
 */
export function checkDefaults(defaults: Readonly<Record<string, unknown>>, vocabSize: number): string | null {
  const sampling = samplingOf({ seed: 0, do_sample: true }, defaults);
  samplingOf({ seed: 0 }, defaults); // do_sample
  try {
    checkSampling(sampling, vocabSize);
  } catch (error) {
    throw new RangeError(`${FILE}: ${(error as Error).message}`, { cause: error });
  }
  const unread = Object.entries(UNREAD).flatMap(([name, idle]) => {
    const value = defaults[name];
    return value == null || idle.includes(value) || (Array.isArray(value) && value.length === 0) ? [] : [name];
  });
  return unread.length === 0 ? null : `${FILE} sets ${unread.join(", ")}, which ${unread.length === 1 ? "has" : "have"} no effect here`;
}
