/** Rows of the op table for what a GPU computes in one kernel where other backends run several ops; and the cache in its layout. */
import { AFTER_BACKWARD, type Op, SERVING, type Tensor } from "../../graph/call.ts";
import { pagesFit } from "../../graph/ops/attention.ts";
import { alike, f32, i32, isMatrix, matches } from "../../graph/ops/shapes.ts";
import type { Dtype } from "../../tensor/dtype.ts";
import { sameDim, sameShape, times } from "../../tensor/shape.ts";

const FLOATS: ReadonlySet<Dtype> = new Set(["f32", "f16", "bf16"]);

/** Numbers in any float format, [rows, n]. */
function isRows(t: Tensor | undefined): t is Tensor {
  return t?.shape.length === 2 && FLOATS.has(t.dtype);
}

/** Keys and values [blocks, heads, tokens, width], alike. */
function cacheFits(keys: Tensor | undefined, values: Tensor | undefined, segments: Tensor | undefined, pages: Tensor | undefined): boolean {
  return keys?.shape.length === 4 && keys.dtype === values?.dtype && sameShape(keys.shape, values.shape) && pagesFit(segments, pages);
}

function chosenFits(experts: Tensor | undefined, weights: Tensor | undefined): experts is Tensor {
  return matches(experts, "i32", 2) && matches(weights, "f32", 2) && sameShape(experts.shape, weights.shape);
}

function combineFits([slots, weights, shared, residual]: readonly Tensor[]): boolean {
  return (
    isRows(slots) &&
    matches(weights, "f32", 2) &&
    sameDim(slots.shape[0], times(weights.shape[0], Number(weights.shape[1]))) &&
    isRows(shared) &&
    isRows(residual) &&
    sameShape(shared.shape, residual.shape) &&
    sameShape(residual.shape, [weights.shape[0], slots.shape[1]])
  );
}

export const FUSED_OPS = {
  /** `addRmsNorm` and `route` of its result: a, b [rows, hidden] to sum, normed, logits, experts, weights. */
  addRmsNormRoute: {
    params: ["eps", "k", "normMin"],
    outputs: ([a, b, norm, gate, bias], { k }) =>
      matches(a, "f32", 2) &&
      alike(a, b) &&
      matches(norm, "f32", 1) &&
      sameDim(a.shape[1], norm.shape[0]) &&
      matches(gate, "f32", 2) &&
      sameDim(a.shape[1], gate.shape[1]) &&
      matches(bias, "f32", 1) &&
      sameDim(bias.shape[0], gate.shape[0]) &&
      k <= Number(gate.shape[0])
        ? [f32(...a.shape), f32(...a.shape), f32(a.shape[0], gate.shape[0]), i32(a.shape[0], k), f32(a.shape[0], k)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [0, 1],
  },
  /** `linear` plus residual [rows, n]. */
  linearAdd: {
    outputs: ([x, w, residual]) =>
      matches(x, "f32", 2) &&
      isMatrix(w, 2) &&
      sameDim(x.shape[1], w.shape[1]) &&
      matches(residual, "f32", 2) &&
      sameShape(residual.shape, [x.shape[0], w.shape[0]])
        ? [f32(...residual.shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [2],
  },
  /** residual + (`combine` + shared), all [rows, n]. */
  combineAdd: {
    outputs: (inputs) => (combineFits(inputs) ? [f32(...inputs[3].shape)] : null),
    gradient: AFTER_BACKWARD,
    inPlace: [3, 2],
  },
  /** `combineAdd` and its `rmsNorm`. */
  combineAddNorm: {
    params: ["eps"],
    outputs: (inputs) =>
      combineFits(inputs) && matches(inputs[4], "f32", 1) && sameDim(inputs[4].shape[0], inputs[3].shape[1])
        ? [f32(...inputs[3].shape), f32(...inputs[3].shape)]
        : null,
    gradient: AFTER_BACKWARD,
    inPlace: [3, 2],
  },
  /** Each row's `groupedGatedLinear` with its experts; with `shared` 1, also `gatedLinear` with the shared ones: h [k * rows, width], hs. */
  expertsGated: {
    params: ["shared"],
    outputs: (inputs, { shared }) => {
      const [x, gate, up] = inputs;
      const [sharedGate, sharedUp] = inputs.slice(3, 3 + 2 * shared);
      const experts = inputs[3 + 2 * shared];
      const twins = (rank: number, a: Tensor | undefined, b: Tensor | undefined) =>
        isMatrix(a, rank) && isMatrix(b, rank) && sameShape(a.shape, b.shape) && sameDim(a.shape[rank - 1], x.shape[1]);
      if (!matches(x, "f32", 2) || !twins(3, gate, up) || !matches(experts, "i32", 2) || !sameDim(experts.shape[0], x.shape[0]))
        return null;
      if (shared === 1 && !twins(2, sharedGate, sharedUp)) return null;
      const h = f32(times(x.shape[0], Number(experts.shape[1])), gate.shape[1]);
      return shared === 1 ? [h, f32(x.shape[0], sharedGate.shape[0])] : [h];
    },
    gradient: AFTER_BACKWARD,
  },
  /** The weighted sum of the experts' products with h, plus the shared one's with hs if `shared` is 1, plus residual if `residual` is 1. */
  expertsDown: {
    params: ["shared", "residual"],
    outputs: (inputs, { shared, residual }) => {
      const [h, hs] = shared === 1 ? inputs : [inputs[0]];
      const [down, sharedDown] = shared === 1 ? inputs.slice(2) : [inputs[1]];
      const [experts, weights, added] = inputs.slice(shared === 1 ? 4 : 2);
      if (!matches(h, "f32", 2) || !isMatrix(down, 3) || !sameDim(h.shape[1], down.shape[2]) || !chosenFits(experts, weights)) return null;
      if (!sameDim(h.shape[0], times(experts.shape[0], Number(experts.shape[1])))) return null;
      const y = f32(experts.shape[0], down.shape[1]);
      if (
        shared === 1 &&
        !(
          matches(hs, "f32", 2) &&
          isMatrix(sharedDown, 2) &&
          sameDim(hs.shape[1], sharedDown.shape[1]) &&
          sameDim(sharedDown.shape[0], down.shape[1])
        )
      )
        return null;
      if (residual === 1 && !(matches(added, "f32", 2) && sameShape(added.shape, y.shape))) return null;
      return [y];
    },
    gradient: AFTER_BACKWARD,
  },
  /** Queries, keys and values of x, rotated; keys and values go to the cache: (x, wq, wk, wv, angles, keys, values, segments, pages) to q. */
  qkvRope: {
    outputs: ([x, wq, wk, wv, angles, keys, values, segments, pages]) =>
      matches(x, "f32", 2) &&
      [wq, wk, wv].every((w) => isMatrix(w, 2) && sameDim(w.shape[1], x.shape[1])) &&
      sameShape(wk.shape, wv.shape) &&
      matches(angles, "f32", 2) &&
      sameDim(angles.shape[0], x.shape[0]) &&
      cacheFits(keys, values, segments, pages) &&
      sameDim(angles.shape[1], keys.shape[3]) &&
      wk.shape[0] === Number(keys.shape[1]) * Number(keys.shape[3]) &&
      Number(wq.shape[0]) % Number(keys.shape[3]) === 0
        ? [f32(x.shape[0], wq.shape[0])]
        : null,
    gradient: SERVING,
    writes: [5, 6],
  },
  /** `rope` of queries and keys, and `pagedWrite`: (q, k, v, angles, keys, values, segments, pages) to q. */
  ropeWrite: {
    outputs: ([q, k, v, angles, keys, values, segments, pages]) =>
      isRows(q) &&
      isRows(k) &&
      isRows(v) &&
      sameShape(k.shape, v.shape) &&
      matches(angles, "f32", 2) &&
      sameDim(angles.shape[0], q.shape[0]) &&
      cacheFits(keys, values, segments, pages) &&
      sameDim(angles.shape[1], keys.shape[3]) &&
      k.shape[1] === Number(keys.shape[1]) * Number(keys.shape[3])
        ? [f32(...q.shape)]
        : null,
    gradient: SERVING,
    writes: [4, 5],
  },
  /** `cacheWrite` in this layout. */
  pagedWrite: {
    outputs: ([k, v, keys, values, segments, pages]) =>
      isRows(k) &&
      isRows(v) &&
      sameShape(k.shape, v.shape) &&
      cacheFits(keys, values, segments, pages) &&
      k.shape[1] === Number(keys.shape[1]) * Number(keys.shape[3])
        ? []
        : null,
    gradient: SERVING,
    writes: [2, 3],
  },
  /** `cacheRead` of keys and values and causal `attention` in one op that reads the cache in place. */
  pagedAttention: {
    outputs: ([q, keys, values, segments, pages]) =>
      isRows(q) && cacheFits(keys, values, segments, pages) && Number(q.shape[1]) % (Number(keys.shape[1]) * Number(keys.shape[3])) === 0
        ? [f32(...q.shape)]
        : null,
    gradient: SERVING,
  },
} satisfies Record<string, Op>;

export type FusedOpName = keyof typeof FUSED_OPS;
