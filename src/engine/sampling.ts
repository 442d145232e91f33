/** How a token is chosen from logits: the controls, their checks, and their layout for the kernels. Chooses nothing itself. */
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops.ts";

/** Controls of one sequence. The order of processing is that of transformers: bias, penalties, n-grams, temperature, top-k, top-p, min-p. */
export interface Sampling {
  /** 0 is greedy: the most likely token, after bias and penalties. So is what is below 1e-5: float32 cannot hold the quotients. */
  readonly temperature: number;
  /** 0: no limit. */
  readonly topK: number;
  /** 1: no limit. */
  readonly topP: number;
  /** 0: no limit. */
  readonly minP: number;
  /** Over prompt and answer; 1: none (https://arxiv.org/abs/1909.05858). */
  readonly repetitionPenalty: number;
  /** Subtracted once from the logit of each token of the answer; 0: none. */
  readonly presencePenalty: number;
  /** Subtracted for each occurrence in the answer; 0: none. */
  readonly frequencyPenalty: number;
  /** Size of the n-grams that may not occur twice; 0: none. */
  readonly noRepeatNgram: number;
  /** Added to the logits of the tokens. */
  readonly logitBias: ReadonlyMap<number, number>;
  /** Whole number below 2^53; the same seed gives the same answer. */
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

/** Throws RangeError naming the control, what was given and what is allowed. */
export function checkSampling(s: Sampling, vocabSize: number): void {
  const check = (name: string, value: number, ok: boolean, allowed: string) => {
    if (!ok) throw new RangeError(`${name} is ${value}; it must be ${allowed}`);
  };
  check("temperature", s.temperature, s.temperature >= 0 && s.temperature < Number.POSITIVE_INFINITY, "a number of at least 0");
  check("top_k", s.topK, Number.isInteger(s.topK) && s.topK >= 0, "a whole number of at least 0");
  check("top_p", s.topP, s.topP > 0 && s.topP <= 1, "above 0 and at most 1");
  check("min_p", s.minP, s.minP >= 0 && s.minP <= 1, "from 0 to 1");
  check(
    "repetition_penalty",
    s.repetitionPenalty,
    s.repetitionPenalty >= 0.01 && s.repetitionPenalty <= 1e6, // beyond, quotients leave float32
    "from 0.01 to 1000000",
  );
  check("presence_penalty", s.presencePenalty, Number.isFinite(s.presencePenalty), "a number");
  check("frequency_penalty", s.frequencyPenalty, Number.isFinite(s.frequencyPenalty), "a number");
  check("no_repeat_ngram_size", s.noRepeatNgram, Number.isInteger(s.noRepeatNgram) && s.noRepeatNgram >= 0, "a whole number of at least 0");
  check("seed", s.seed, Number.isSafeInteger(s.seed) && s.seed >= 0, "a whole number from 0 to 2^53 - 1");
  for (const [id, bias] of s.logitBias) {
    check("logit_bias: the token id", id, Number.isInteger(id) && id >= 0 && id < vocabSize, `a whole number below ${vocabSize}`);
    check(
      `logit_bias: the bias of token ${id}`,
      bias,
      !Number.isNaN(bias) && bias < Number.POSITIVE_INFINITY,
      "a number, or -Infinity to forbid the token",
    );
  }
}

/** What the controls of one output row need of its sequence. */
export interface SampledRow {
  readonly sampling: Sampling;
  /** Prompt and answer so far. */
  readonly tokens: readonly number[];
  readonly promptCount: number;
  /** Bits of the ids that are allowed; null or absent: all. */
  readonly mask?: Int32Array | null;
}

/** The controls of a step, in the layout of the ops `processLogits` and `sample`. */
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
  const history: number[] = [];
  const biases: [number, number][] = [];
  const masks: Int32Array[] = [];
  rows.forEach(({ sampling: s, tokens, promptCount, mask }, r) => {
    const looksBack = s.repetitionPenalty !== 1 || s.presencePenalty !== 0 || s.frequencyPenalty !== 0 || s.noRepeatNgram > 0;
    const seen = looksBack ? tokens : [];
    const row: Record<(typeof SAMPLING_FLOATS)[number] | (typeof SAMPLING_INTS)[number], number> = {
      ...s,
      temperature: s.temperature < 1e-5 ? 0 : s.temperature,
      seedLow: (s.seed % 2 ** 32) | 0,
      seedHigh: Math.floor(s.seed / 2 ** 32),
      step: tokens.length,
      historyStart: history.length,
      historyCount: seen.length,
      promptCount: Math.min(promptCount, seen.length),
      biasStart: biases.length,
      biasCount: s.logitBias.size,
      mask: mask ? masks.push(mask) - 1 : -1,
    };
    floats.set(
      SAMPLING_FLOATS.map((name) => row[name]),
      r * SAMPLING_FLOATS.length,
    );
    ints.set(
      SAMPLING_INTS.map((name) => row[name]),
      r * SAMPLING_INTS.length,
    );
    for (const id of seen) history.push(id);
    for (const bias of s.logitBias) biases.push(bias);
  });
  return {
    floats,
    ints,
    history: Int32Array.from(history),
    biasIds: Int32Array.from(biases, ([id]) => id),
    biasValues: Float32Array.from(biases, ([, bias]) => bias),
    masks: joined(masks),
  };
}

function joined(masks: readonly Int32Array[]): Int32Array {
  const all = new Int32Array(masks.reduce((n, mask) => n + mask.length, 0));
  let at = 0;
  for (const mask of masks) {
    all.set(mask, at);
    at += mask.length;
  }
  return all;
}

/** The n largest logits with their log-probabilities. */
export function likeliest(logits: Float32Array, n: number): { id: number; logprob: number }[] {
  let ids: number[] = []; // best first; for a few one pass is enough, while sorting a large vocabulary holds the event loop
  if (n > 100) ids = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, n);
  else
    logits.forEach((x, id) => {
      if (ids.length === n && x <= logits[ids[n - 1]]) return;
      let at = ids.length;
      while (at > 0 && x > logits[ids[at - 1]]) at--;
      ids.splice(at, 0, id);
      if (ids.length > n) ids.pop();
    });
  const top = logits[ids[0]];
  const total = Math.log(logits.reduce((sum, x) => sum + Math.exp(x - top), 0)) + top;
  return ids.map((id) => ({ id, logprob: logits[id] - total }));
}
