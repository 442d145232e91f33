/** Attention over whole sequences, its gradient, and the cache, as plain loops. */
import { roundActivations } from "../../tensor/quantized.ts";
import type { Numbers } from "../backend.ts";
import { accumulate, dot, type Kernel, type Operand, softmax } from "./operand.ts";

/** A query of a head: its row, and the key rows that it sees. */
interface Query {
  readonly at: number;
  readonly row: number;
  readonly head: number;
  /** Offset in k or v of the head's part of the first row that the query sees, and the stride between rows. */
  readonly first: number;
  readonly stride: number;
  readonly count: number;
}

/** Calls `visit` for each head of each row. */
function forEachQuery(q: Operand, k: Operand, segments: Operand, dim: number, causal: boolean, visit: (query: Query) => void): void {
  const [heads, kvHeads] = [q.dims[1] / dim, k.dims[1] / dim];
  let before = 0; // keys of earlier sequences
  for (let s = 0; s < segments.dims[0]; s++) {
    const [first, rows, position] = segments.data.subarray(s * 3, s * 3 + 3);
    for (let i = 0; i < rows; i++)
      for (let head = 0; head < heads; head++) {
        const kv = Math.floor(head / (heads / kvHeads));
        const row = first + i;
        const count = causal ? position + i + 1 : position + rows;
        visit({ at: (row * heads + head) * dim, row, head, first: (before * kvHeads + kv) * dim, stride: kvHeads * dim, count });
      }
    before += position + rows;
  }
}

export const ATTENTION_KERNELS = {
  attention([q, k, v, segments], [y, logsumexp], { dim, causal }) {
    forEachQuery(q, k, segments, dim, causal === 1, ({ at, row, head, first, stride, count }) => {
      const scores = Array.from({ length: count }, (_, t) => dot(q.data, at, k.data, first + t * stride, dim) / Math.sqrt(dim));
      const p = softmax(scores);
      for (let d = 0; d < dim; d++) {
        let sum = 0;
        for (let t = 0; t < count; t++) sum += p[t] * v.data[first + t * stride + d];
        y.data[at + d] = sum;
      }
      const top = scores.reduce((a, b) => Math.max(a, b));
      logsumexp.data[row * (q.dims[1] / dim) + head] = top + Math.log(scores.reduce((sum, s) => sum + Math.exp(s - top), 0));
    });
  },

  // p = exp(s - logsumexp), D = dy . y: ds = p (dy . v - D), dq = ds k / sqrt(dim), dk = ds q / sqrt(dim), dv = p dy
  attentionGrad([dy, q, k, v, y, logsumexp, segments], [dq, dk, dv], { dim, causal }) {
    const [sumK, sumV] = [new Float64Array(k.data.length), new Float64Array(v.data.length)];
    dq.data.fill(0);
    const scale = 1 / Math.sqrt(dim);
    forEachQuery(q, k, segments, dim, causal === 1, ({ at, row, head, first, stride, count }) => {
      const D = dot(dy.data, at, y.data, at, dim);
      const lse = logsumexp.data[row * (q.dims[1] / dim) + head];
      for (let t = 0; t < count; t++) {
        const key = first + t * stride;
        const p = Math.exp(dot(q.data, at, k.data, key, dim) * scale - lse);
        const ds = p * (dot(dy.data, at, v.data, key, dim) - D) * scale;
        accumulate(dq.data, at, ds, k.data, key, dim);
        for (let d = 0; d < dim; d++) {
          sumK[key + d] += ds * q.data[at + d];
          sumV[key + d] += p * dy.data[at + d];
        }
      }
    });
    dk.data.set(sumK);
    dv.data.set(sumV);
  },

  cacheWrite([k, v, keys, values, segments, pages]) {
    const [, tokens, heads, dim] = keys.dims;
    const width = heads * dim;
    forEachRow(segments, (s, row, position) => {
      const to = (pageOf(pages, s, position, tokens) * tokens + (position % tokens)) * width;
      const [key, value] = [k, v].map(({ data }) => data.subarray(row * width, (row + 1) * width));
      keys.data.set(stored(key, keys.dtype), to);
      values.data.set(stored(value, values.dtype), to);
    });
  },

  cacheRead([cache, segments, pages], [y]) {
    const [, tokens, heads, dim] = cache.dims;
    const width = heads * dim;
    let to = 0;
    for (let s = 0; s < segments.dims[0]; s++) {
      const [, rows, position] = segments.data.subarray(s * 3, s * 3 + 3);
      for (let t = 0; t < position + rows; t++, to++) {
        const from = (pageOf(pages, s, t, tokens) * tokens + (t % tokens)) * width;
        y.data.set(cache.data.subarray(from, from + width), to * width);
      }
    }
  },
} satisfies Record<string, Kernel>;

/** A row as a cache of this format stores it. Int8 rounds in groups that depend on the layout; here each row is one group. */
function stored(row: Numbers, dtype: Operand["dtype"]): Numbers {
  return dtype === "int8kv" ? rounded(row, row.length) : row;
}

/** Calls `visit(sequence, row, position)` for each row of a step; a segment is (first row, number of rows, position of the first row). */
export function forEachRow(segments: Operand, visit: (sequence: number, row: number, position: number) => void): void {
  for (let s = 0; s < segments.dims[0]; s++) {
    const [first, rows, position] = segments.data.subarray(s * 3, s * 3 + 3);
    for (let i = 0; i < rows; i++) visit(s, first + i, position + i);
  }
}

export function pageOf(pages: Operand, sequence: number, position: number, tokens: number): number {
  const page = Math.floor(position / tokens);
  if (page >= pages.dims[1]) throw new Error(`internal: position ${position} of sequence ${sequence} has no page`);
  return pages.data[sequence * pages.dims[1] + page];
}

/** A copy rounded to 255 steps, with one scale per `span` numbers. */
export function rounded(x: Numbers, span: number): Float32Array {
  const copy = Float32Array.from(x);
  roundActivations(copy, span);
  return copy;
}
