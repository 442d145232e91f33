/** The ops of the CPU's lowering, as plain loops: activations in its formats, and attention with its cache layout. */
import { roundBf16 } from "../../tensor/dtype.ts";
import { GROUP } from "../../tensor/quantized.ts";
import type { CpuOpName } from "../cpu.ts";
import { forEachRow, pageOf, rounded } from "./attention.ts";
import { MATRIX_KERNELS } from "./matrix.ts";
import { type Kernel, type Operand, softmax } from "./operand.ts";

const { linear, groupedLinear, gatedLinear, groupedGatedLinear } = MATRIX_KERNELS;

export const CPU_KERNELS: Readonly<Record<CpuOpName, Kernel>> = {
  // Activations are stored as the float32 numbers that they represent, so the products are the same.
  linear,
  groupedLinear,
  gatedLinear,
  groupedGatedLinear,
  tiledLinear: linear,
  tiledGroupedLinear: groupedLinear,

  toBf16Pair([x], [y]) {
    x.data.forEach((v, i) => {
      const first = roundBf16(v);
      y.data[i] = first + roundBf16(v - first);
    });
  },

  toInt8([x], [y]) {
    const [rows, k] = x.dims;
    for (let r = 0; r < rows; r++) y.data.set(rounded(x.data.subarray(r * k, (r + 1) * k), GROUP), r * k);
  },

  pagedWrite([k, v, keys, values, segments, pages]) {
    const [, heads, tokens, dim] = values.dims;
    const inBytes = keys.dtype === "int8kv";
    forEachRow(segments, (s, row, position) => {
      const block = pageOf(pages, s, position, tokens) * heads * dim * tokens;
      const t = position % tokens;
      for (let h = 0; h < heads; h++) {
        const at = (row * heads + h) * dim;
        const [key, value] = [k, v].map(({ data }) => data.subarray(at, at + dim));
        const put = inBytes ? [rounded(key, GROUP), rounded(value, dim)] : [key, value];
        for (let d = 0; d < dim; d++) {
          keys.data[block + keyAt(keys, h, d, t)] = put[0][d];
          values.data[block + (h * tokens + t) * dim + d] = put[1][d];
        }
      }
    });
  },

  pagedAttention([q, keys, values, segments, pages], [y]) {
    const [, kvHeads, tokens, dim] = values.dims;
    const heads = q.dims[1] / dim;
    const inBytes = keys.dtype === "int8kv";
    forEachRow(segments, (s, row, position) => {
      for (let h = 0; h < heads; h++) {
        const kv = Math.floor(h / (heads / kvHeads));
        const at = (row * heads + h) * dim;
        const query = q.data.subarray(at, at + dim);
        const met = inBytes ? rounded(query, GROUP) : query;
        const scores: number[] = [];
        for (let t = 0; t <= position; t++) {
          const block = pageOf(pages, s, t, tokens) * kvHeads * dim * tokens;
          let score = 0;
          for (let d = 0; d < dim; d++) score += met[d] * keys.data[block + keyAt(keys, kv, d, t % tokens)];
          scores.push(score / Math.sqrt(dim));
        }
        const p = softmax(scores);
        for (let d = 0; d < dim; d++) {
          let sum = 0;
          for (let t = 0; t <= position; t++) {
            const block = pageOf(pages, s, t, tokens) * kvHeads * dim * tokens;
            sum += p[t] * values.data[block + (kv * tokens + (t % tokens)) * dim + d];
          }
          y.data[at + d] = sum;
        }
      }
    });
  },
};

/** Index of a key's number in its block: ordered by dim, or by token for int8. */
function keyAt({ dims, dtype }: Operand, head: number, d: number, t: number): number {
  return (head * dims[2] + (dtype === "int8kv" ? t : d)) * dims[3] + (dtype === "int8kv" ? d : t);
}
