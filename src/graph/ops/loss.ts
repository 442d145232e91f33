/** The loss and the optimiser's updates. */
import { DYNAMIC_BLOCK } from "../../tensor/dynamic.ts";
import { elements, sameDim, sameShape } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op, type Tensor } from "../call.ts";
import { alike, biasFits, f32, isActivation, isMatrix, matches } from "./shapes.ts";

/** Columns of an AdamW step's rates [7]: `bias1` and `bias2` are 1 - beta^t for step t, counted from 1. */
export const ADAMW_RATES = ["learningRate", "beta1", "beta2", "eps", "weightDecay", "bias1", "bias2"] as const;

function headFits(x: Tensor | undefined, head: Tensor | undefined, labels: Tensor | undefined, bias: Tensor | undefined): boolean {
  return (
    isMatrix(head, 2) &&
    isActivation(x, head) &&
    sameDim(x.shape[1], head.shape[1]) &&
    matches(labels, "i32", 1) &&
    sameDim(labels.shape[0], x.shape[0]) &&
    biasFits(bias, [head.shape[0]])
  );
}

/** States of a parameter's moment in dynamic 8-bit numbers: four codes a word, and a scale a block. */
function codesFit(codes: Tensor | undefined, scales: Tensor | undefined, parameter: Tensor): boolean {
  const n = elements(parameter.shape.map(Number));
  return (
    matches(codes, "i32", 1) &&
    matches(scales, "f32", 1) &&
    codes.kind === "state" &&
    scales.kind === "state" &&
    codes.shape[0] === Math.ceil(n / 4) &&
    scales.shape[0] === Math.ceil(n / DYNAMIC_BLOCK)
  );
}

/** Whether a branch's low [rows, rank] and up [vocab, rank] fit beside a head. */
function branchFits(x: Tensor, head: Tensor, low: Tensor | undefined, up: Tensor | undefined): low is Tensor {
  return (
    matches(low, "f32", 2) &&
    (matches(up, "f32", 2) || matches(up, "bf16", 2)) &&
    sameDim(low.shape[0], x.shape[0]) &&
    sameDim(up.shape[0], head.shape[0]) &&
    sameDim(up.shape[1], low.shape[1])
  );
}

export const LOSS_OPS = {
  /**
   * -log softmax(x . head^T + bias)[label] of each row: x [rows, k], head [vocab, k], labels [rows], bias [vocab] to losses [rows] and
   * the logarithm of each softmax's denominator [rows]. Rows with a negative label have a loss of 0. Logits are computed for
   * at most `chunk` rows at a time, and never stored for all rows.
   */
  crossEntropy: {
    params: ["chunk"],
    outputs: ([x, head, labels, bias], { chunk }) =>
      headFits(x, head, labels, bias) && chunk >= 1 ? [f32(x.shape[0]), f32(x.shape[0])] : null,
    gradient: (emit, { inputs: [x, head, labels, bias], outputs: [, logsumexp], params }, [dy], [, wantsHead, , wantsBias]) => {
      if (!dy) return [null, null, null, null];
      const head_ = wantsHead || wantsBias;
      const [dx, dHead, dBias] = emit("crossEntropyGrad", [dy, x, head, labels, logsumexp, bias], {
        ...params,
        head: Number(head_ ?? false),
      });
      return [dx, dHead ?? null, null, dBias ?? null];
    },
  },
  /**
   * Gradients of x and, with `head` 1, of the head and its bias, if any. Recomputes logits in chunks. Those of the logits are rounded
   * to bfloat16 for the products if x is in bfloat16.
   */
  crossEntropyGrad: {
    params: ["chunk", "head"],
    outputs: ([dy, x, weight, labels, logsumexp, bias], { head }) =>
      headFits(x, weight, labels, bias) && alike(dy, logsumexp) && sameDim(dy.shape[0], x.shape[0])
        ? [f32(...x.shape), ...(head ? [f32(...weight.shape), ...(bias ? [f32(...bias.shape)] : [])] : [])]
        : null,
    gradient: FIRST_ORDER,
  },
  /**
   * `crossEntropy` with an adapter's branch beside the head: logits are x . head^T + low . up^T + bias, low [rows, rank] being what the
   * adapter's first matrix made of the inputs, its scale included, and up [vocab, rank] its second. The head itself is frozen.
   */
  adaptedCrossEntropy: {
    params: ["chunk"],
    outputs: ([x, head, labels, low, up, bias], { chunk }) =>
      headFits(x, head, labels, bias) && branchFits(x, head, low, up) && chunk >= 1 ? [f32(x.shape[0]), f32(x.shape[0])] : null,
    gradient: (
      emit,
      { inputs: [x, head, labels, low, up, bias], outputs: [, logsumexp], params },
      [dy],
      [, wantsHead, , , , wantsBias],
    ) => {
      if (wantsHead || wantsBias) throw new Error("internal: a head that has an adapter is frozen");
      if (!dy) return [];
      const [dx, dLow, dUp] = emit("adaptedCrossEntropyGrad", [dy, x, head, labels, logsumexp, low, up, bias], params);
      return [dx, null, null, dLow, dUp, null];
    },
  },
  /** Gradients of x, low and up. */
  adaptedCrossEntropyGrad: {
    params: ["chunk"],
    outputs: ([dy, x, head, labels, logsumexp, low, up, bias]) =>
      headFits(x, head, labels, bias) && branchFits(x, head, low, up) && alike(dy, logsumexp) && sameDim(dy.shape[0], x.shape[0])
        ? [f32(...x.shape), f32(...low.shape), f32(...up.shape)]
        : null,
    gradient: FIRST_ORDER,
  },
  /** The global L2 norm of all inputs, [1]. */
  norm: {
    outputs: (tensors) => (tensors.length > 0 && tensors.every((t) => t.dtype === "f32") ? [f32(1)] : null),
    gradient: FIRST_ORDER,
  },
  /** The factor [1] that clips gradients of that norm [1]: min(1, max / (norm + 1e-6)), as in `torch.nn.utils.clip_grad_norm_`. */
  clip: {
    params: ["max"],
    outputs: ([norm]) => (matches(norm, "f32", 1) && norm.shape[0] === 1 ? [f32(1)] : null),
    gradient: FIRST_ORDER,
  },
  /**
   * One AdamW step (https://arxiv.org/abs/1711.05101) on a parameter and its two moments, in place; rates as in `ADAMW_RATES`. The
   * gradient is first multiplied by `factor` [1], if given.
   */
  adamw: {
    outputs: ([parameter, gradient, m, v, rates, factor]) =>
      alike(parameter, gradient, m, v) &&
      [parameter, m, v].every((t) => t.kind === "state") &&
      matches(rates, "f32", 1) &&
      sameShape(rates.shape, [ADAMW_RATES.length]) &&
      biasFits(factor, [1])
        ? []
        : null,
    gradient: FIRST_ORDER,
    writes: [0, 2, 3],
  },
  /**
   * The same step with moments in block-wise dynamic 8-bit numbers (see `tensor/dynamic.ts`): codes m and v [numbers / 4], scales of both
   * [numbers / 256]. Codes lie in the order of the parameter's numbers. The step uses the new moments before they are rounded.
   */
  adamw8bit: {
    outputs: ([parameter, gradient, m, v, mScales, vScales, rates, factor]) =>
      alike(parameter, gradient) &&
      parameter.kind === "state" &&
      codesFit(m, mScales, parameter) &&
      codesFit(v, vScales, parameter) &&
      matches(rates, "f32", 1) &&
      sameShape(rates.shape, [ADAMW_RATES.length]) &&
      biasFits(factor, [1])
        ? []
        : null,
    gradient: FIRST_ORDER,
    writes: [0, 2, 3, 4, 5],
  },
  /** Adds x to a state of its shape. */
  accumulate: {
    outputs: ([total, x]) => (alike(total, x) && total.kind === "state" ? [] : null),
    gradient: FIRST_ORDER,
    writes: [0],
  },
  /** Sets a state to zeros. */
  clear: { outputs: ([state]) => (alike(state) && state.kind === "state" ? [] : null), gradient: FIRST_ORDER, writes: [0] },
} satisfies Record<string, Op>;
