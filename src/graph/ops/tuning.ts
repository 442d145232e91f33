/** Ops of training methods: magnitudes beside directions (DoRA), losses of classifiers and preferences, and those of the router. */
import { sameDim } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op, type Tensor } from "../call.ts";
import { alike, biasFits, f32, isMatrix, matches } from "./shapes.ts";

/** Whether a and b are a low-rank pair for w: [rank, in] and [out, rank], or a stack of each. */
function pairFits(w: Tensor, a: Tensor | undefined, b: Tensor | undefined): boolean {
  const rank = w.shape.length;
  if (!matches(a, "f32", rank) || !matches(b, "f32", rank)) return false;
  const stacks = rank === 2 || (sameDim(a.shape[0], w.shape[0]) && sameDim(b.shape[0], w.shape[0]));
  return (
    stacks &&
    sameDim(a.shape[rank - 1], w.shape[rank - 1]) &&
    sameDim(b.shape[rank - 2], w.shape[rank - 2]) &&
    sameDim(a.shape[rank - 2], b.shape[rank - 1])
  );
}

export const TUNING_OPS = {
  /** a * b, element by element. */
  mul: {
    outputs: ([a, b]) => (alike(a, b) ? [f32(...a.shape)] : null),
    gradient: (emit, { inputs: [a, b] }, [dy], [wantsA, wantsB]) => [
      wantsA && dy ? emit("mul", [dy, b])[0] : null,
      wantsB && dy ? emit("mul", [dy, a])[0] : null,
    ],
    inPlace: [0, 1],
  },
  /** log(1 + e^x): of a logit x, the loss of the label 0; of -x, that of the label 1. */
  softplus: {
    outputs: ([x]) => (alike(x) ? [f32(...x.shape)] : null),
    gradient: (emit, { inputs: [x] }, [dy]) => [dy && emit("softplusGrad", [dy, x])[0]],
    inPlace: [0],
  },
  /** dy / (1 + e^-x). */
  softplusGrad: {
    outputs: ([dy, x]) => (alike(dy, x) ? [f32(...x.shape)] : null),
    gradient: FIRST_ORDER,
    inPlace: [0, 1],
  },
  /** x * by (+ bias), column by column: [rows, n], [n], [n] to [rows, n]. */
  scaleColumns: {
    outputs: ([x, by, bias]) =>
      matches(x, "f32", 2) && matches(by, "f32", 1) && sameDim(x.shape[1], by.shape[0]) && biasFits(bias, by.shape)
        ? [f32(...x.shape)]
        : null,
    gradient: (emit, { inputs: [x, by, bias] }, [dy], [wantsX, wantsBy, wantsBias]) => [
      wantsX && dy ? emit("scaleColumns", [dy, by])[0] : null,
      wantsBy && dy ? emit("sumRows", [emit("mul", [dy, x])[0]])[0] : null,
      ...(bias ? [wantsBias && dy ? emit("sumRows", [dy])[0] : null] : []),
    ],
    inPlace: [0],
  },
  /**
   * 1 / |w_i + scale * (b . a)_i| of each row i: w [n, k] in any format, a [rank, k], b [n, rank] to [n]; of stacks [experts, n, k], ... to
   * [experts * n]. A constant for gradients, as DoRA has it (https://arxiv.org/abs/2402.09353, section 4.3).
   */
  inverseNorms: {
    params: ["scale"],
    outputs: ([w, a, b]) =>
      w && (w.shape.length === 2 || w.shape.length === 3) && isMatrix(w, w.shape.length) && pairFits(w, a, b)
        ? [f32(w.shape.slice(0, -1).reduce<number>((n, d) => n * Number(d), 1))]
        : null,
    gradient: () => [null, null, null],
    kept: "a number for each row, which takes a pass over the matrix",
  },
  /**
   * What a router's losses are made of, from its logits [rows, experts]: the share of rows for which an expert is among the `k` largest [experts],
   * a constant for gradients; its mean probability [experts]; and the mean of the squared logarithms of the softmax's denominators [1].
   */
  routerLoad: {
    params: ["k"],
    outputs: ([logits], { k }) =>
      matches(logits, "f32", 2) && k <= Number(logits.shape[1]) ? [f32(logits.shape[1]), f32(logits.shape[1]), f32(1)] : null,
    gradient: (emit, { inputs: [logits], outputs: [, probability] }, [, dProbability, dZ]) => {
      if (!dProbability && !dZ) return [null];
      const zeros = (n: Tensor["shape"][number]) => emit("fill", [], { value: 0 }, { n })[0];
      return emit("routerLoadGrad", [dProbability ?? zeros(probability.shape[0]), dZ ?? zeros(1), logits]);
    },
  },
  routerLoadGrad: {
    outputs: ([dProbability, dZ, logits]) =>
      matches(dProbability, "f32", 1) &&
      matches(dZ, "f32", 1) &&
      dZ.shape[0] === 1 &&
      matches(logits, "f32", 2) &&
      sameDim(dProbability.shape[0], logits.shape[1])
        ? [f32(...logits.shape)]
        : null,
    gradient: FIRST_ORDER,
  },
} satisfies Record<string, Op>;
