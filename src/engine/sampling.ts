/** How a token is sampled from logits: the controls, their ranges, and their layout for the kernels. Does not sample. */
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops/sampling.ts";

/** Controls of one sequence. Applied in transformers' order: bias, penalties, n-grams, temperature, top-k, top-p, min-p. */
export interface Sampling {
  /** 0 is greedy: the most likely token, after bias and penalties. Values below 1e-5 are greedy too: float32 cannot hold the quotients. */
  readonly temperature: number;
  /** 0: no limit. */
  readonly topK: number;
  /** 1: no limit; 0: only the likeliest token. */
  readonly topP: number;
  /** 0: no limit. */
  readonly minP: number;
  /** Applies to prompt and answer; 1: none (https://arxiv.org/abs/1909.05858). */
  readonly repetitionPenalty: number;
  /** Subtracted once from the logit of each token that is in the answer; 0: none. */
  readonly presencePenalty: number;
  /** Subtracted for each occurrence in the answer; 0: none. */
  readonly frequencyPenalty: number;
  /** Size of the n-grams that must not repeat; 0: no limit. */
  readonly noRepeatNgram: number;
  /** Added to the logits of these tokens. */
  readonly logitBias: ReadonlyMap<number, number>;
  /** An integer below 2^53; the same seed gives the same answer. */
  readonly seed: number;
}

export const GREEDY: Sampling = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  noRepeatNgram: 0,
  logitBias: new Map(),
  seed: 0,
};

/** The numbers that a control may have. */
export interface Range {
  readonly least: number;
  readonly most: number;
  /** Only whole numbers. */
  readonly whole?: true;
}

/**
 * The ranges of the controls, by the names that users know: for the library, the server, the command line and generation_config.json.
 * Products of all the largest still fit float32.
 */
export const RANGES = {
  temperature: { least: 0, most: 1e6 },
  top_k: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
  top_p: { least: 0, most: 1 },
  min_p: { least: 0, most: 1 },
  repetition_penalty: { least: 0.01, most: 1e6 },
  presence_penalty: { least: -1e6, most: 1e6 },
  frequency_penalty: { least: -1e6, most: 1e6 },
  no_repeat_ngram_size: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
  seed: { least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
} as const satisfies Record<string, Range>;
export type Control = keyof typeof RANGES;

/** Of a bias; minus infinity, which forbids a token, is allowed as well. */
export const BIAS_RANGE: Range = { least: -1e6, most: 1e6 };

/** Lower temperatures are greedy: float32 cannot hold logits divided by them. */
const LOWEST_TEMPERATURE = 1e-5;
/** Larger numbers of tokens mean the same as this one, which no vocabulary and no context exceeds. */
const MOST_INT32 = 2 ** 31 - 1;

export function inRange(value: unknown, { least, most, whole }: Range): value is number {
  return typeof value === "number" && value >= least && value <= most && (!whole || Number.isInteger(value));
}

/** `a number from 0 to 1`. */
export function rangeText({ least, most, whole }: Range): string {
  const end = most === Number.MAX_SAFE_INTEGER ? "2^53 - 1" : String(most);
  return `a ${whole ? "whole " : ""}number from ${least} to ${end}`;
}

/** Throws a RangeError that names the control, the value given and the values allowed. */
export function checkSampling(s: Sampling, vocabSize: number): void {
  const values: Record<Control, unknown> = {
    temperature: s.temperature,
    top_k: s.topK,
    top_p: s.topP,
    min_p: s.minP,
    repetition_penalty: s.repetitionPenalty,
    presence_penalty: s.presencePenalty,
    frequency_penalty: s.frequencyPenalty,
    no_repeat_ngram_size: s.noRepeatNgram,
    seed: s.seed,
  };
  for (const name of Object.keys(RANGES) as Control[])
    if (!inRange(values[name], RANGES[name]))
      throw new RangeError(`${name} is ${String(values[name])}; it must be ${rangeText(RANGES[name])}`);
  for (const [id, bias] of s.logitBias) {
    if (!inRange(id, { least: 0, most: vocabSize - 1, whole: true }))
      throw new RangeError(`logit_bias: the token id is ${id}; it must be a whole number below ${vocabSize}`);
    if (bias !== Number.NEGATIVE_INFINITY && !inRange(bias, BIAS_RANGE))
      throw new RangeError(
        `logit_bias: the bias of token ${id} is ${bias}; it must be ${rangeText(BIAS_RANGE)}, or -Infinity to forbid the token`,
      );
  }
}

/** The seed of an answer among several to one prompt: they count up, from the largest on to 0. */
export function seedOf(seed: number, index: number): number {
  const left = RANGES.seed.most - seed;
  return index <= left ? seed + index : index - left - 1;
}

/** What the controls of one output row need to know about its sequence. */
export interface SampledRow {
  readonly sampling: Sampling;
  /** Prompt and answer so far. */
  readonly tokens: readonly number[];
  readonly promptCount: number;
  /** Bit mask of the allowed ids; null or absent: all. */
  readonly mask?: Int32Array | null;
}

/** A step's controls, in the layout that the ops `processLogits` and `sample` expect. */
export interface Controls {
  readonly floats: Float32Array;
  readonly ints: Int32Array;
  readonly history: Int32Array;
  readonly biasIds: Int32Array;
  readonly biasValues: Float32Array;
  readonly masks: Int32Array;
}

export function layOut(rows: readonly SampledRow[]): Controls {
  const floats = new Float32Array(rows.length * SAMPLING_FLOATS.length);
  const ints = new Int32Array(rows.length * SAMPLING_INTS.length);
  let [historyCount, biasCount, maskWords, maskCount] = [0, 0, 0, 0];
  for (const row of rows) {
    if (looksBack(row.sampling)) historyCount += row.tokens.length;
    biasCount += row.sampling.logitBias.size;
    maskWords += row.mask?.length ?? 0;
  }
  const history = new Int32Array(historyCount);
  const biasIds = new Int32Array(biasCount);
  const biasValues = new Float32Array(biasCount);
  const masks = new Int32Array(maskWords);
  [historyCount, biasCount, maskWords] = [0, 0, 0];
  rows.forEach(({ sampling: s, tokens, promptCount, mask }, r) => {
    const seen = looksBack(s) ? tokens.length : 0;
    const row: Record<(typeof SAMPLING_INTS)[number], number> = {
      topK: Math.min(s.topK, MOST_INT32),
      noRepeatNgram: Math.min(s.noRepeatNgram, MOST_INT32),
      seedLow: (s.seed % 2 ** 32) | 0,
      seedHigh: Math.floor(s.seed / 2 ** 32),
      step: tokens.length,
      historyStart: historyCount,
      historyCount: seen,
      promptCount: Math.min(promptCount, seen),
      biasStart: biasCount,
      biasCount: s.logitBias.size,
      mask: mask ? maskCount++ : -1,
    };
    SAMPLING_FLOATS.forEach((name, i) => {
      floats[r * SAMPLING_FLOATS.length + i] = name === "temperature" && s.temperature < LOWEST_TEMPERATURE ? 0 : s[name];
    });
    SAMPLING_INTS.forEach((name, i) => {
      ints[r * SAMPLING_INTS.length + i] = row[name];
    });
    if (seen > 0) history.set(tokens, historyCount);
    historyCount += seen;
    for (const [id, bias] of s.logitBias) {
      biasIds[biasCount] = id;
      biasValues[biasCount++] = bias;
    }
    if (mask) masks.set(mask, maskWords);
    maskWords += mask?.length ?? 0;
  });
  return { floats, ints, history, biasIds, biasValues, masks };
}

/** Whether a row's history affects its next token. */
function looksBack(s: Sampling): boolean {
  return s.repetitionPenalty !== 1 || s.presencePenalty !== 0 || s.frequencyPenalty !== 0 || s.noRepeatNgram > 0;
}
