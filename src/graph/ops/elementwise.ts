/** Ops that read a row and write a row: norms, activations, rotary embeddings, sums, casts, row selection; and their gradients. */
import { sameDim, sameShape } from "../../tensor/shape.ts";
import { AFTER_BACKWARD, FIRST_ORDER, type Op, SERVING } from "../call.ts";
import { alike, f32, matches } from "./shapes.ts";

/** A copy in another format. Rounding has no slope, so the gradient is a straight-through estimator (https://arxiv.org/abs/1308.3432). */
function cast(dtype: "f32" | "bf16" | "f16"): Op {
  return {
    outputs: ([x]) => (x && ["f32", "bf16", "f16"].includes(x.dtype) ? [{ shape: x.shape, dtype }] : null),
    gradient: (_emit, _call, [dy]) => [dy],
  };
}

/** x [rows, n], of which `index` [m] names those that `by` [m, n] changes. */
const withRows: Op["outputs"] = ([x, by, index]) =>
  matches(x, "f32", 2) &&
  matches(by, "f32", 2) &&
  sameDim(x.shape[1], by.shape[1]) &&
  matches(index, "i32", 1) &&
  sameDim(by.shape[0], index.shape[0])
    ? [f32(...x.shape)]
    : null;

export const ELEMENTWISE_OPS = {
  /** `x / sqrt(mean(x^2) + eps) * weight` over the last axis (https://arxiv.org/abs/1910.07467). */
  rmsNorm: {
    params: ["eps"],
    outputs: ([x, w]) => (matches(x, "f32", 2) && matches(w, "f32", 1) && sameDim(x.shape[1], w.shape[0]) ? [f32(...x.shape)] : null),
    gradient: (emit, { inputs: [x, w], params }, [dy], [wantsX, wantsW]) => [
      wantsX && dy ? emit("rmsNormGradX", [dy, x, w], params)[0] : null,
      wantsW && dy ? emit("rmsNormGradW", [dy, x], params)[0] : null,
    ],
    inPlace: [0],
  },
  rmsNormGradX: {
    params: ["eps"],
    outputs: ([dy, x, w]) => (alike(dy, x) && matches(w, "f32", 1) && sameDim(x.shape[1], w.shape[0]) ? [f32(...x.shape)] : null),
    gradient: FIRST_ORDER,
  },
  rmsNormGradW: {
    params: ["eps"],
    outputs: ([dy, x]) => (matches(x, "f32", 2) && alike(dy, x) ? [f32(x.shape[1])] : null),
    gradient: FIRST_ORDER,
  },
  /** a + b and its rmsNorm; `fuse` builds it from the two. */
  addRmsNorm: {
    params: ["eps"],
    outputs: ([a, b, w]) =>
      matches(a, "f32", 2) && alike(a, b) && matches(w, "f32", 1) && sameDim(a.shape[1], w.shape[0])
        ? [f32(...a.shape), f32(...a.shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [0, 1],
  },
  add: {
    outputs: ([a, b]) => (alike(a, b) ? [f32(...a.shape)] : null),
    gradient: (_emit, _call, [dy]) => [dy, dy],
    inPlace: [0, 1],
  },
  /** x * by. */
  scale: {
    params: ["by"],
    outputs: ([x]) => (alike(x) ? [f32(...x.shape)] : null),
    gradient: (emit, { params }, [dy]) => [dy && emit("scale", [dy], params)[0]],
    inPlace: [0],
  },
  /** x * by[0], with by [1] a computed value. */
  scaleBy: {
    outputs: ([x, by]) => (alike(x) && matches(by, "f32", 1) && by.shape[0] === 1 ? [f32(...x.shape)] : null),
    gradient: FIRST_ORDER,
    inPlace: [0],
  },
  /** `silu(gate) * up` (https://arxiv.org/abs/2002.05202). */
  siluMul: {
    outputs: ([gate, up]) => (alike(gate, up) ? [f32(...gate.shape)] : null),
    gradient: (emit, { inputs: [gate, up] }, [dy]) => (dy ? emit("siluMulGrad", [dy, gate, up]) : [null, null]),
    inPlace: [0, 1],
  },
  /** Gradients of gate and up. */
  siluMulGrad: {
    outputs: ([dy, gate, up]) => (alike(dy, gate, up) ? [f32(...gate.shape), f32(...gate.shape)] : null),
    gradient: FIRST_ORDER,
  },
  /**
   * Zeroes each element with probability `p` and divides the others by 1 - p (https://jmlr.org/papers/v15/srivastava14a.html).
   * A hash of seed [2] i32, `stream` and the element's index decides which, so the gradient drops the same ones.
   */
  dropout: {
    params: ["p", "stream"],
    outputs: ([x, seed], { p }) =>
      alike(x) && matches(seed, "i32", 1) && seed.shape[0] === 2 && p >= 0 && p < 1 ? [f32(...x.shape)] : null,
    gradient: (emit, { inputs: [, seed], params }, [dy]) => [dy && emit("dropout", [dy, seed], params)[0], null],
    inPlace: [0],
  },
  castF32: cast("f32"),
  castBf16: cast("bf16"),
  castF16: cast("f16"),
  /** Cosine and sine of `position * theta^(-2i/dim)` for each pair i, side by side: [rows] to [rows, dim]. */
  angles: {
    params: ["dim", "theta"],
    outputs: ([positions], { dim }) => (matches(positions, "i32", 1) && dim % 2 === 0 ? [f32(positions.shape[0], dim)] : null),
    gradient: "positions are whole numbers and nothing is learnt",
  },
  /** Rotates adjacent pairs of each head by `angles` (https://arxiv.org/abs/2104.09864). */
  rope: rotation("ropeT"),
  /** Rotates back: the transpose of `rope`. */
  ropeT: rotation("rope"),
  /** Rows of x selected by `index`. */
  gather: {
    outputs: ([x, index]) => (matches(x, "f32", 2) && matches(index, "i32", 1) ? [f32(index.shape[0], x.shape[1])] : null),
    gradient: (emit, { inputs: [x, index] }, [dy]) => [dy && emit("scatterRows", [dy, index], {}, { rows: x.shape[0] })[0], null],
  },
  /** Adds row r of dy [n, width] to row index[r] of zeros [rows, width]. */
  scatterRows: {
    outputs: ([dy, index], _params, { rows }) =>
      matches(dy, "f32", 2) && matches(index, "i32", 1) && sameDim(dy.shape[0], index.shape[0]) && rows !== undefined
        ? [f32(rows, dy.shape[1])]
        : null,
    gradient: (emit, { inputs: [, index] }, [dy]) => [dy && emit("gather", [dy, index])[0], null],
  },
  /** x [rows, n] with row index[i] replaced by row i of `by` [m, n], for example to put image embeddings in place of placeholders. */
  replaceRows: {
    outputs: withRows,
    gradient: (emit, { inputs: [, , index] }, [dy], [wantsX, wantsBy]) => [
      wantsX && dy ? emit("zeroRows", [dy, index])[0] : null,
      wantsBy && dy ? emit("gather", [dy, index])[0] : null,
      null,
    ],
    inPlace: [0],
  },
  /** x [rows, n] with row i of `by` [m, n] added to row index[i]; no row occurs twice: the low-rank branches of the rows that have an adapter. */
  addRows: {
    outputs: withRows,
    gradient: SERVING,
    inPlace: [0],
  },
  /** x [rows, n] with the rows in `index` set to zero. */
  zeroRows: {
    outputs: ([x, index]) => (matches(x, "f32", 2) && matches(index, "i32", 1) ? [f32(...x.shape)] : null),
    gradient: FIRST_ORDER,
    inPlace: [0],
  },
  /** [n] times `value`. */
  fill: {
    params: ["value"],
    outputs: (inputs, _params, { n }) => (inputs.length === 0 && n !== undefined ? [f32(n)] : null),
    gradient: "has no inputs",
  },
  /** Sum of a * b, [n] each, to [1]: a weighted mean of losses. */
  dot: {
    outputs: ([a, b]) => (matches(a, "f32", 1) && matches(b, "f32", 1) && sameShape(a.shape, b.shape) ? [f32(1)] : null),
    gradient: (emit, { inputs: [a, b] }, [dy], [wantsA, wantsB]) => [
      wantsA && dy ? emit("scaleBy", [b, dy])[0] : null,
      wantsB && dy ? emit("scaleBy", [a, dy])[0] : null,
    ],
  },
} satisfies Record<string, Op>;

function rotation(transpose: "rope" | "ropeT"): Op {
  return {
    outputs: ([x, angles]) =>
      matches(x, "f32", 2) &&
      matches(angles, "f32", 2) &&
      sameDim(x.shape[0], angles.shape[0]) &&
      Number(x.shape[1]) % Number(angles.shape[1]) === 0
        ? [f32(...x.shape)]
        : null,
    gradient: (emit, { inputs: [, angles] }, [dy]) => [dy && emit(transpose, [dy, angles])[0], null],
    inPlace: [0],
  };
}
