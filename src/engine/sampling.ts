/** How a token is sampled from logits: the controls, their validation, and their layout for the kernels. Does not sample. */
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops/sampling.ts";

/** Controls of one sequence. Applied in transformers' order: bias, penalties, n-grams, temperature, top-k, top-p, min-p. */
export interface Sampling {
  /** 0 is greedy: the most likely token, after bias and penalties. Values below 1e-5 are greedy too: float32 cannot hold the quotients. */
  readonly temperature: number;
  /** 0: no limit. */
  readonly topK: number;
  /** 1: no limit. */
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

/** Beyond this, sums and quotients of logits would overflow float32, in which they are computed. */
const LARGEST = 1_000_000;
/** Quotients by less than this overflow too, and the likeliest token has all of the probability long before. */
const LEAST_TEMPERATURE = 1e-5;
/** Controls are passed as 32-bit integers; a larger count is no limit in any case. */
const LARGEST_COUNT = 2 ** 31 - 1;

/** Throws a RangeError that names the control, the value given and the values allowed. */
export function checkSampling(s: Sampling, vocabSize: number): void {
  const check = (name: string, value: number, ok: boolean, allowed: string) => {
    if (!ok || typeof value !== "number") throw new RangeError(`${name} is ${value}; it must be ${allowed}`);
  };
  check("temperature", s.temperature, s.temperature >= 0 && s.temperature <= LARGEST, `from 0 to ${LARGEST}`);
  check("top_k", s.topK, Number.isInteger(s.topK) && s.topK >= 0, "a whole number of at least 0");
  check("top_p", s.topP, s.topP > 0 && s.topP <= 1, "above 0 and at most 1");
  check("min_p", s.minP, s.minP >= 0 && s.minP <= 1, "from 0 to 1");
  check(
    "repetition_penalty",
    s.repetitionPenalty,
    s.repetitionPenalty >= 0.01 && s.repetitionPenalty <= LARGEST,
    `from 0.01 to ${LARGEST}`,
  );
  const [small, near] = [(value: number) => Math.abs(value) <= LARGEST, `from ${-LARGEST} to ${LARGEST}`];
  check("presence_penalty", s.presencePenalty, small(s.presencePenalty), near);
  check("frequency_penalty", s.frequencyPenalty, small(s.frequencyPenalty), near);
  check("no_repeat_ngram_size", s.noRepeatNgram, Number.isInteger(s.noRepeatNgram) && s.noRepeatNgram >= 0, "a whole number of at least 0");
  check("seed", s.seed, Number.isSafeInteger(s.seed) && s.seed >= 0, "a whole number from 0 to 2^53 - 1");
  for (const [id, bias] of s.logitBias) {
    check("logit_bias: the token id", id, Number.isInteger(id) && id >= 0 && id < vocabSize, `a whole number below ${vocabSize}`);
    check(
      `logit_bias: the bias of token ${id}`,
      bias,
      small(bias) || bias === Number.NEGATIVE_INFINITY,
      `${near}, or -Infinity to forbid the token`,
    );
  }
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
      topK: Math.min(s.topK, LARGEST_COUNT),
      noRepeatNgram: Math.min(s.noRepeatNgram, LARGEST_COUNT),
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
      floats[r * SAMPLING_FLOATS.length + i] = name === "temperature" && s[name] < LEAST_TEMPERATURE ? 0 : s[name];
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
