/** Attention over whole sequences and its gradient, and the KV cache used for serving. */
import { sameDim, sameShape } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op, SERVING, type Tensor } from "../call.ts";
import { f32, matches } from "./shapes.ts";

/** [sequences, 3]: first row, number of rows, position of the first row. */
function segmentsFit(segments: Tensor | undefined): segments is Tensor {
  return matches(segments, "i32", 2) && sameDim(segments.shape[1], 3);
}

/** Segments, and pages [sequences, pages]: each sequence's cache blocks in order. */
export function pagesFit(segments: Tensor | undefined, pages: Tensor | undefined): boolean {
  return segmentsFit(segments) && matches(pages, "i32", 2) && sameDim(segments.shape[0], pages.shape[0]);
}

/** Half of a cache as traced: [blocks, tokens per block, heads, head width]. */
function isCache(t: Tensor | undefined): t is Tensor {
  return t?.kind === "state" && t.shape.length === 4;
}

function fits(q: Tensor | undefined, k: Tensor | undefined, v: Tensor | undefined, segments: Tensor | undefined, dim: number): boolean {
  return (
    matches(q, "f32", 2) &&
    matches(k, "f32", 2) &&
    matches(v, "f32", 2) &&
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
   * all. Returns y, shaped like q, and the logarithm of each softmax's denominator, [rows, heads]. With `pairs` 1 the operands of products
   * may be taken for sums of two bfloat16 numbers, exact to 2^-16, where processors multiply those much faster.
   */
  attention: {
    params: ["dim", "causal", "pairs"],
    outputs: ([q, k, v, segments], { dim }) =>
      fits(q, k, v, segments, dim) ? [f32(...q.shape), f32(q.shape[0], Number(q.shape[1]) / dim)] : null,
    gradient: (emit, { inputs: [q, k, v, segments], outputs: [y, logsumexp], params }, [dy]) =>
      dy ? [...emit("attentionGrad", [dy, q, k, v, y, logsumexp, segments], params), null] : [null, null, null, null],
  },
  /** Gradients of q, k and v, computed from y and logsumexp without storing the score matrix (https://arxiv.org/abs/2205.14135). */
  attentionGrad: {
    params: ["dim", "causal", "pairs"],
    outputs: ([dy, q, k, v, y, logsumexp, segments], { dim }) =>
      fits(q, k, v, segments, dim) &&
      matches(dy, "f32", 2) &&
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
