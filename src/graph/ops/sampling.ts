/** From logits to tokens: logits processors, sampling, and the likeliest alternatives. */
import { sameShape } from "../../tensor/shape.ts";
import { type Op, SERVING, type Tensor } from "../call.ts";
import { f32, i32, matches } from "./shapes.ts";

/** Columns of the sampling controls [outs, n], in order. Checked against the addon's when it loads. */
export const SAMPLING_FLOATS = ["temperature", "topP", "minP", "repetitionPenalty", "presencePenalty", "frequencyPenalty"] as const;
/**
 * `mask` is a row of the masks, -1 for none. `history*` and `bias*` are ranges in the concatenated lists; `promptCount` is the number
 * of prompt tokens in the history. `seed*` and `step` determine the random draw.
 */
export const SAMPLING_INTS = [
  "topK",
  "noRepeatNgram",
  "seedLow",
  "seedHigh",
  "step",
  "historyStart",
  "historyCount",
  "promptCount",
  "biasStart",
  "biasCount",
  "mask",
] as const;

/** Ids that `sample` returns in place of a token: all of the row's tokens are ruled out; a logit is NaN or infinite. */
export const NONE_LEFT = -1;
export const NOT_FINITE = -2;

function controlsFit(logits: Tensor | undefined, floats: Tensor | undefined, ints: Tensor | undefined): boolean {
  return (
    matches(logits, "f32", 2) &&
    matches(floats, "f32", 2) &&
    matches(ints, "i32", 2) &&
    sameShape(floats.shape, [logits.shape[0], SAMPLING_FLOATS.length]) &&
    sameShape(ints.shape, [logits.shape[0], SAMPLING_INTS.length])
  );
}

export const SAMPLING_OPS = {
  /** Logits [outs, vocab] after each row's processors. The second output is scratch. */
  processLogits: {
    outputs: ([logits, floats, ints, history, biasIds, biasValues, masks]) =>
      controlsFit(logits, floats, ints) &&
      matches(history, "i32", 1) &&
      matches(biasIds, "i32", 1) &&
      matches(biasValues, "f32", 1) &&
      matches(masks, "i32", 2) &&
      masks.shape[1] === Math.ceil(Number(logits.shape[1]) / 32)
        ? [f32(...logits.shape), i32(...logits.shape)]
        : null,
    gradient: SERVING,
  },
  /**
   * One token per row, greedy or random, and its log-probability according to the unprocessed logits: [outs] i32, [outs]. The token is
   * `NONE_LEFT` or `NOT_FINITE` if there is none.
   */
  sample: {
    outputs: ([logits, processed, floats, ints]) =>
      controlsFit(logits, floats, ints) && matches(processed, "f32", 2) && sameShape(logits.shape, processed.shape)
        ? [i32(logits.shape[0]), f32(logits.shape[0])]
        : null,
    gradient: SERVING,
  },
  /** The `top` likeliest tokens of each row, best first, ties by lower id: ids and log-probabilities, [outs, top] each. */
  topLogprobs: {
    outputs: ([logits], _params, { top }) =>
      matches(logits, "f32", 2) && top !== undefined && (typeof top !== "number" || (top >= 1 && top <= Number(logits.shape[1])))
        ? [i32(logits.shape[0], top), f32(logits.shape[0], top)]
        : null,
    gradient: SERVING,
  },
} satisfies Record<string, Op>;
