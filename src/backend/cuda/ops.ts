/** The op table with the GPU's rows: fused ops, ops that write bfloat16 or half results, and attention over its own layout of the cache. */
import { AFTER_BACKWARD, type Op, type OpTable, SERVING, type Tensor } from "../../graph/call.ts";
import { products } from "../../graph/ops/matrix.ts";
import { alike, f32, i32, isMatrix, matches } from "../../graph/ops/shapes.ts";
import { OPS } from "../../graph/ops.ts";
import type { Dtype } from "../../tensor/dtype.ts";
import { sameDim, sameShape, times } from "../../tensor/shape.ts";

/** Activations of products: float32 as they are for few rows, else what the tensor cores multiply with weights of a format. */
function met(weight: Dtype): readonly Dtype[] {
  if (weight === "f32") return ["f32"];
  return weight === "f16" ? ["f32", "f16"] : ["f32", "bf16"];
}

/** A cache as the GPU lays it out, keys and values alike: [blocks, heads, tokens, width]. */
function cacheFits(keys: Tensor | undefined, values: Tensor | undefined, segments: Tensor | undefined, pages: Tensor | undefined): boolean {
  return (
    keys?.shape.length === 4 &&
    values?.shape.length === 4 &&
    keys.dtype === values.dtype &&
    sameShape(keys.shape, values.shape) &&
    matches(segments, "i32", 2) &&
    sameDim(segments.shape[1], 3) &&
    matches(pages, "i32", 2) &&
    sameDim(segments.shape[0], pages.shape[0])
  );
}

/** Columns of a cache's rows. */
const widthOf = (cache: Tensor) => Number(cache.shape[1]) * Number(cache.shape[3]);

const PRODUCTS = products(met);

const FUSED = {
  ...PRODUCTS,
  pagedWrite: {
    outputs: ([k, v, keys, values, segments, pages]) =>
      alike(k, v) && matches(k, "f32", 2) && cacheFits(keys, values, segments, pages) && k.shape[1] === widthOf(values) ? [] : null,
    gradient: SERVING,
    writes: [2, 3],
  },
  pagedAttention: {
    outputs: ([q, keys, values, segments, pages]) =>
      q && ["f32", "bf16", "f16"].includes(q.dtype) && cacheFits(keys, values, segments, pages) && Number(q.shape[1]) % widthOf(values) === 0
        ? [f32(...q.shape)]
        : null,
    gradient: SERVING,
  },
  /** `rope` of q and k, and `pagedWrite` of k and v. */
  ropeWrite: {
    outputs: ([q, k, v, angles, keys, values, segments, pages]) =>
      matches(q, "f32", 2) &&
      matches(angles, "f32", 2) &&
      alike(k, v) &&
      cacheFits(keys, values, segments, pages) &&
      k.shape[1] === widthOf(values) &&
      sameDim(angles.shape[1], values.shape[3])
        ? [f32(...q.shape)]
        : null,
    gradient: SERVING,
    writes: [4, 5],
  },
  /** The products of x with the three matrices of an attention, then `ropeWrite`. */
  qkvRope: {
    outputs: ([x, q, k, v, angles, keys, values, segments, pages]) =>
      matches(x, "f32", 2) &&
      [q, k, v].every((w) => isMatrix(w, 2) && sameDim(w.shape[1], x.shape[1])) &&
      sameShape(k.shape, v.shape) &&
      matches(angles, "f32", 2) &&
      cacheFits(keys, values, segments, pages) &&
      Number(k.shape[0]) === widthOf(values)
        ? [f32(x.shape[0], q.shape[0])]
        : null,
    gradient: SERVING,
    writes: [5, 6],
  },
  /** `addRmsNorm`, then `route` of the norm: sum, norm, and the routing's results. */
  addRmsNormRoute: {
    params: ["eps", "k", "normMin"],
    outputs: ([a, b, w, gate, bias], { k }) =>
      alike(a, b) && matches(a, "f32", 2) && matches(w, "f32", 1) && matches(gate, "f32", 2) && matches(bias, "f32", 1)
        ? [f32(...a.shape), f32(...a.shape), f32(a.shape[0], gate.shape[0]), i32(a.shape[0], k), f32(a.shape[0], k)]
        : null,
    gradient: AFTER_BACKWARD,
  },
  /** `silu(gate x) * up x` of each row's experts [k * rows, width], and with `shared` 1 of the shared experts. */
  expertsGated: {
    params: ["shared"],
    outputs: (inputs, { shared }) => {
      const [x, gate, up, ...rest] = inputs;
      const experts = rest[rest.length - 1];
      if (!matches(x, "f32", 2) || !isMatrix(gate, 3) || !isMatrix(up, 3) || !matches(experts, "i32", 2)) return null;
      const slots = f32(times(x.shape[0], Number(experts.shape[1])), gate.shape[1]);
      return shared ? [slots, f32(x.shape[0], rest[0].shape[0])] : [slots];
    },
    gradient: AFTER_BACKWARD,
  },
  /** The weighted sum of each row's experts' `down h`, plus, with `shared` 1, `down` of the shared experts. */
  expertsDown: {
    params: ["shared", "residual"],
    outputs: (inputs, { shared }) => {
      const weights = inputs[shared ? 5 : 3];
      const down = inputs[shared ? 2 : 1];
      return matches(inputs[0], "f32", 2) && isMatrix(down, 3) && matches(weights, "f32", 2) ? [f32(weights.shape[0], down.shape[1])] : null;
    },
    gradient: AFTER_BACKWARD,
  },
  /** residual + (combine(slots, weights) + shared), and its rmsNorm. */
  combineAddNorm: {
    params: ["eps"],
    outputs: ([slots, weights, shared, residual, w]) =>
      slots?.shape.length === 2 && matches(weights, "f32", 2) && alike(shared, residual) && matches(w, "f32", 1)
        ? [f32(...residual.shape), f32(...residual.shape)]
        : null,
    gradient: AFTER_BACKWARD,
  },
} satisfies Record<string, Op>;

/** The op with its output of this position in another format. */
function narrowed(op: Op, at: number, dtype: Dtype): Op {
  return {
    ...op,
    inPlace: [],
    gradient: AFTER_BACKWARD,
    outputs: (...call) => op.outputs(...call)?.map((result, i) => (i === at ? { ...result, dtype } : result)) ?? null,
  };
}

/** Ops whose result can be written in the format that the next product takes, and which of their results. */
export const NARROWED: Readonly<Record<string, number>> = {
  rmsNorm: 0,
  addRmsNorm: 1,
  combineAddNorm: 1,
  gatedLinear: 0,
  groupedGatedLinear: 0,
  groupedLinear: 0,
  pagedAttention: 0,
  ropeWrite: 0,
};
/** Casts, and what the names of ops end with that include them. */
export const CASTS: Readonly<Record<string, string>> = { castBf16: "ToBf16", castF16: "ToF16" };

const plain: OpTable = { ...OPS, ...FUSED };

/** The op table with the GPU's rows. */
export const CUDA_TABLE: OpTable = {
  ...plain,
  combine: { ...OPS.combine, outputs: (inputs) => OPS.combine.outputs(inputs.map(asF32)) },
  ...Object.fromEntries(
    Object.entries(NARROWED).flatMap(([op, at]) => [
      [`${op}${CASTS.castBf16}`, narrowed(plain[op], at, "bf16")],
      [`${op}${CASTS.castF16}`, narrowed(plain[op], at, "f16")],
    ]),
  ),
};

/** Slots may be in half precision. */
function asF32(t: Tensor): Tensor {
  return t.dtype === "bf16" || t.dtype === "f16" ? { ...t, dtype: "f32" } : t;
}
