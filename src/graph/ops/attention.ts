/** Attention over whole sequences and its gradient, and the KV cache used for serving. */
import { sameDim, sameShape } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op, SERVING, type Tensor } from "../call.ts";
import { alikeX } from "./matrix.ts";
import { f32, matches } from "./shapes.ts";

/** [sequences, 3]: first row, number of rows, position of the first row. */
function segmentsFit(segments: Tensor | undefined): segments is Tensor {
  return matches(segments, "i32", 2) && sameDim(segments.shape[1], 3);
}

/** Segments, and pages [sequences, pages]: each sequence's cache blocks in order. */
function pagesFit(segments: Tensor | undefined, pages: Tensor | undefined): boolean {
  return segmentsFit(segments) && matches(pages, "i32", 2) && sameDim(segments.shape[0], pages.shape[0]);
}

/** Half of a cache as traced: [blocks, tokens per block, heads, head width]. */
function isCache(t: Tensor | undefined): t is Tensor {
  return t?.kind === "state" && t.shape.length === 4;
}

function fits(q: Tensor | undefined, k: Tensor | undefined, v: Tensor | undefined, segments: Tensor | undefined, dim: number): boolean {
  return (
    (q?.dtype === "f32" || q?.dtype === "bf16") &&
    [q, k, v].every((t) => matches(t, q.dtype, 2)) &&
    k !== undefined &&
    v !== undefined &&
    sameShape(k.shape, v.shape) &&
    Number(k.shape[1]) % dim === 0 &&
    Number(q.shape[1]) % Number(k.shape[1]) === 0 &&
    segmentsFit(segments)
  );
}

export const ATTENTION_OPS = {
  /**
   * Grouped-query attention, softmax(q k^T / sqrt(dim)) v within each sequence (https://arxiv.org/abs/2305.13245): q [rows,
   * heads * dim], k and v [context, kv heads * dim], segments [sequences, 3]. A sequence has `position of the first row + rows`
   * keys, which are consecutive rows of k, one sequence after another. With `causal` 1 a row sees keys up to its own position, else
   * all. Returns y, shaped like q, and the logarithm of each softmax's denominator, [rows, heads]. If q, k and v are in bfloat16, so are
   * probabilities in their product with v.
   */
  attention: {
    params: ["dim", "causal"],
    outputs: ([q, k, v, segments], { dim }) =>
      fits(q, k, v, segments, dim) ? [f32(...q.shape), f32(q.shape[0], Number(q.shape[1]) / dim)] : null,
    gradient: (emit, { inputs: [q, k, v, segments], outputs: [y, logsumexp], params }, [dy]) =>
      dy ? [...emit("attentionGrad", [alikeX(emit, q, dy), q, k, v, y, logsumexp, segments], params), null] : [null, null, null, null],
  },
  /**
   * Gradients of q, k and v, computed from y and logsumexp without storing the score matrix (https://arxiv.org/abs/2205.14135). If these are in
   * bfloat16, so is dy, and those of the scores are for their products.
   */
  attentionGrad: {
    params: ["dim", "causal"],
    outputs: ([dy, q, k, v, y, logsumexp, segments], { dim }) =>
      fits(q, k, v, segments, dim) &&
      matches(dy, q?.dtype ?? "f32", 2) &&
      q !== undefined &&
      k !== undefined &&
      v !== undefined &&
      matches(y, "f32", 2) &&
      sameShape(dy.shape, q.shape) &&
      sameShape(y.shape, q.shape) &&
      matches(logsumexp, "f32", 2)
        ? [f32(...q.shape), f32(...k.shape), f32(...v.shape)]
        : null,
    gradient: FIRST_ORDER,
  },
  /** Stores the keys and values of this step's rows in their sequences' pages. */
  cacheWrite: {
    outputs: ([k, v, keys, values, segments, pages]) =>
      matches(k, "f32", 2) &&
      matches(v, "f32", 2) &&
      sameShape(k.shape, v.shape) &&
      isCache(keys) &&
      isCache(values) &&
      keys.dtype === values.dtype &&
      sameShape(keys.shape, values.shape) &&
      k.shape[1] === Number(keys.shape[2]) * Number(keys.shape[3]) &&
      pagesFit(segments, pages)
        ? []
        : null,
    gradient: SERVING,
    writes: [2, 3],
  },
  /** The cached keys or values of each sequence up to its last row, one sequence after another: [context, heads * dim]. */
  cacheRead: {
    outputs: ([cache, segments, pages], _params, { context }) =>
      isCache(cache) && pagesFit(segments, pages) && context !== undefined
        ? [f32(context, Number(cache.shape[2]) * Number(cache.shape[3]))]
        : null,
    gradient: SERVING,
  },
} satisfies Record<string, Op>;
