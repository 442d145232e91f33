/** Products with weight matrices, a single one or one per expert, and their gradients. */
import type { Dtype } from "../../tensor/dtype.ts";
import { sameDim, sameShape, times } from "../../tensor/shape.ts";
import { AFTER_BACKWARD, type Emit, FIRST_ORDER, type Gradient, type Op, type Tensor, WHOLE_NUMBERS } from "../call.ts";
import { biasFits, f32, isActivation, isMatrix, matches } from "./shapes.ts";

/** The activation formats of products with weights of each format. */
export type ActivationFormats = (weight: Dtype) => readonly Dtype[];

/** The formats before a backend chooses its own: float32, or bfloat16 beside a bfloat16 matrix (`narrow`). */
const ACTIVATIONS: ActivationFormats = (weight) => (weight === "bf16" ? ["f32", "bf16"] : ["f32"]);

/** The gradient of a product's result in the format of its activations. */
function alikeX(emit: Emit, x: Tensor, dy: Tensor): Tensor {
  return x.dtype === "bf16" ? emit("castBf16", [dy])[0] : dy;
}

/** dx = dy . W, dW = dy^T x, db = sum of dy. For a frozen weight, in any format, only dx is computed. */
const linearGradient: Gradient = (emit, { inputs: [x, w, bias] }, [dy], [wantsX, wantsW, wantsBias]) => {
  const d = dy && (wantsX || wantsW) ? alikeX(emit, x, dy) : null;
  return [
    wantsX && d ? emit("linearT", [d, w])[0] : null,
    wantsW && d ? emit("outer", [d, x])[0] : null,
    ...(bias ? [wantsBias && dy ? emit("sumRows", [dy])[0] : null] : []),
  ];
};

const groupedGradient: Gradient = (emit, { inputs: [x, w, order, offsets, bias], params }, [dy], [wantsX, wantsW, , , wantsBias]) => {
  const d = dy && (wantsX || wantsW) ? alikeX(emit, x, dy) : null;
  return [
    wantsX && d ? emit("groupedLinearT", [d, w, order, offsets], params, { rows: x.shape[0] })[0] : null,
    wantsW && d ? emit("groupedOuter", [d, x, order, offsets], params)[0] : null,
    null,
    null,
    ...(bias ? [wantsBias && dy ? emit("groupedSumRows", [dy, order, offsets])[0] : null] : []),
  ];
};

/** Activations of a product and gradients of its result, both in float32 or both in bfloat16. */
function bothRows(dy: Tensor | undefined, x: Tensor | undefined): dy is Tensor {
  return [dy, x].every((t) => matches(t, "f32", 2)) || [dy, x].every((t) => matches(t, "bf16", 2));
}

/** Whether order and offsets fit `slots` expert slots per row of x. */
function grouped(x: Tensor, order: Tensor | undefined, offsets: Tensor | undefined, slots: number): boolean {
  return matches(order, "i32", 1) && sameDim(order.shape[0], times(x.shape[0], slots)) && matches(offsets, "i32", 1);
}

/** The table rows of products, which take float32 activations or the format that the backend converts them to. */
export function products(activations: ActivationFormats = ACTIVATIONS) {
  const meets = (x: Tensor | undefined, w: Tensor, rank: number): x is Tensor =>
    x?.shape.length === 2 && activations(w.dtype).includes(x.dtype) && sameDim(x.shape[1], w.shape[rank - 1]);
  const twins = (gate: Tensor | undefined, up: Tensor | undefined, rank: number): boolean =>
    isMatrix(gate, rank) && isMatrix(up, rank) && gate.dtype === up.dtype && gate.shape.every((d, i) => sameDim(d, up.shape[i]));
  return {
    /** `x . w^T (+ bias)`: [rows, k], [n, k], [n] to [rows, n]. */
    linear: {
      outputs: ([x, w, bias]) => (isMatrix(w, 2) && meets(x, w, 2) && biasFits(bias, [w.shape[0]]) ? [f32(x.shape[0], w.shape[0])] : null),
      gradient: linearGradient,
    },
    /** Each expert slot times the matrix of its expert: x [rows, k], w [experts, n, k], bias [experts, n] to [slots * rows, n], in slot order. */
    groupedLinear: {
      params: ["slots"],
      outputs: ([x, w, order, offsets, bias], { slots }) =>
        isMatrix(w, 3) && meets(x, w, 3) && grouped(x, order, offsets, slots) && biasFits(bias, w.shape.slice(0, 2))
          ? [f32(times(x.shape[0], slots), w.shape[1])]
          : null,
      gradient: groupedGradient,
    },
    /** `silu(x . gate^T) * (x . up^T)` (https://arxiv.org/abs/2002.05202); `fuse` builds it from two products and `siluMul`. */
    gatedLinear: {
      outputs: ([x, gate, up]) => (twins(gate, up, 2) && meets(x, gate, 2) ? [f32(x.shape[0], gate.shape[0])] : null),
      gradient: AFTER_BACKWARD,
    },
    groupedGatedLinear: {
      params: ["slots"],
      outputs: ([x, gate, up, order, offsets], { slots }) =>
        twins(gate, up, 3) && meets(x, gate, 3) && grouped(x, order, offsets, slots)
          ? [f32(times(x.shape[0], slots), gate.shape[1])]
          : null,
      gradient: AFTER_BACKWARD,
    },
  } satisfies Record<string, Op>;
}

export const MATRIX_OPS = {
  ...products(),
  /** Rows of `table` [n, width] selected by `ids` [rows]. */
  embed: {
    outputs: ([ids, table]) => (matches(ids, "i32", 1) && isMatrix(table, 2) ? [f32(ids.shape[0], table.shape[1])] : null),
    gradient: (emit, { inputs: [ids, table] }, [dy], [, wantsTable]) => [
      null,
      wantsTable && dy ? emit("scatterRows", [dy, ids], {}, { rows: table.shape[0] })[0] : null,
    ],
  },
  /** `dy . w`: [rows, n], [n, k] to [rows, k]. */
  linearT: {
    outputs: ([dy, w]) =>
      isMatrix(w, 2) && isActivation(dy, w) && sameDim(dy.shape[1], w.shape[0]) ? [f32(dy.shape[0], w.shape[1])] : null,
    gradient: (emit, { inputs: [x, w] }, [dy], [wantsX, wantsW]) => {
      const d = dy && alikeX(emit, x, dy);
      return [wantsX && d ? emit("linear", [d, w])[0] : null, wantsW && d ? emit("outer", [x, d])[0] : null];
    },
  },
  /** x . w^T + y, y [rows, n]; `fuse` builds it from an adapter's product and a sum. */
  addLinear: {
    outputs: ([x, w, y]) =>
      isMatrix(w, 2) &&
      isActivation(x, w) &&
      sameDim(x.shape[1], w.shape[1]) &&
      matches(y, "f32", 2) &&
      sameShape(y.shape, [x.shape[0], w.shape[0]])
        ? [f32(...y.shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [2],
  },
  /** `dy . w + dx`, dx [rows, k]; likewise. */
  addLinearT: {
    outputs: ([dy, w, dx]) =>
      isMatrix(w, 2) &&
      isActivation(dy, w) &&
      sameDim(dy.shape[1], w.shape[0]) &&
      matches(dx, "f32", 2) &&
      sameShape(dx.shape, [dy.shape[0], w.shape[1]])
        ? [f32(...dx.shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [2],
  },
  /** `groupedLinear` + y [slots * rows, n]; likewise. */
  addGroupedLinear: {
    params: ["slots"],
    outputs: ([x, w, order, offsets, y], { slots }) =>
      isMatrix(w, 3) &&
      isActivation(x, w) &&
      sameDim(x.shape[1], w.shape[2]) &&
      grouped(x, order, offsets, slots) &&
      matches(y, "f32", 2) &&
      sameShape(y.shape, [times(x.shape[0], slots), w.shape[1]])
        ? [f32(...y.shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [4],
  },
  /** `dy^T x`: [rows, n], [rows, k] to [n, k]. */
  outer: {
    outputs: ([dy, x]) => (bothRows(dy, x) && sameDim(dy.shape[0], x.shape[0]) ? [f32(dy.shape[1], x.shape[1])] : null),
    gradient: FIRST_ORDER,
  },
  /** [rows, n] to [n]. */
  sumRows: { outputs: ([x]) => (matches(x, "f32", 2) ? [f32(x.shape[1])] : null), gradient: FIRST_ORDER },
  /** For each row, the sum of dy . w over its slots, w being the slot's expert: [slots * rows, n], [experts, n, k] to [rows, k]. */
  groupedLinearT: {
    params: ["slots"],
    outputs: ([dy, w, order, offsets], { slots }, { rows }) =>
      isMatrix(w, 3) &&
      isActivation(dy, w) &&
      sameDim(dy.shape[1], w.shape[1]) &&
      rows !== undefined &&
      sameDim(dy.shape[0], times(rows, slots)) &&
      grouped(dy, order, offsets, 1)
        ? [f32(rows, w.shape[2])]
        : null,
    gradient: FIRST_ORDER,
  },
  /** For each expert, dy^T x over its slots, zero if it has none: [slots * rows, n], [rows, k] to [experts, n, k]. */
  groupedOuter: {
    params: ["slots"],
    outputs: ([dy, x, order, offsets], { slots }) =>
      bothRows(dy, x) && sameDim(dy.shape[0], times(x.shape[0], slots)) && grouped(dy, order, offsets, 1)
        ? [f32(Number(offsets.shape[0]) - 1, dy.shape[1], x.shape[1])]
        : null,
    gradient: FIRST_ORDER,
  },
  /** For each expert, the sum of dy over its slots: [slots * rows, n] to [experts, n]. */
  groupedSumRows: {
    outputs: ([dy, order, offsets]) =>
      matches(dy, "f32", 2) && grouped(dy, order, offsets, 1) ? [f32(Number(offsets.shape[0]) - 1, dy.shape[1])] : null,
    gradient: FIRST_ORDER,
  },
  /** Sorts expert slots [rows, k] by expert: `order` lists the slots; those of expert e are at offsets[e] up to offsets[e + 1]. */
  group: {
    params: ["count"],
    outputs: ([experts], { count }) =>
      matches(experts, "i32", 2)
        ? [
            { shape: [times(experts.shape[0], Number(experts.shape[1]))], dtype: "i32" },
            { shape: [count + 1], dtype: "i32" },
          ]
        : null,
    gradient: WHOLE_NUMBERS,
    kept: "follows from what was routed",
  },
} satisfies Record<string, Op>;
