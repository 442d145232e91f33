/** The operands of the reference backend's kernels, and loops that the kernels share. */
import type { Params } from "../../graph/call.ts";
import type { Dtype } from "../../tensor/dtype.ts";
import type { Numbers } from "../backend.ts";

export interface Operand {
  readonly dims: readonly number[];
  readonly data: Numbers;
  readonly dtype: Dtype;
}

/** Must write every element of every output. Half-precision and int8 values are stored as the float32 numbers that they represent. */
export type Kernel = (inputs: readonly Operand[], outputs: readonly Operand[], params: Params) => void;

export function dot(a: Numbers, i: number, b: Numbers, j: number, n: number): number {
  let sum = 0;
  for (let k = 0; k < n; k++) sum += a[i + k] * b[j + k];
  return sum;
}

/** to[j ...] += by * from[i ...], n numbers. */
export function accumulate(to: Numbers, j: number, by: number, from: Numbers, i: number, n: number): void {
  for (let k = 0; k < n; k++) to[j + k] += by * from[i + k];
}

export function softmax(x: readonly number[]): number[] {
  const top = x.reduce((a, b) => Math.max(a, b));
  const e = x.map((v) => Math.exp(v - top));
  const total = e.reduce((a, b) => a + b);
  return e.map((v) => v / total);
}

/** Row `r` of a matrix, without copying. */
export function row({ dims, data }: Operand, r: number): Numbers {
  return data.subarray(r * dims[1], (r + 1) * dims[1]);
}

/** Calls `visit(expert, slot)` for each slot, in expert order. */
export function forEachSlot(order: Operand, offsets: Operand, visit: (expert: number, slot: number) => void): void {
  for (let e = 0; e + 1 < offsets.dims[0]; e++) for (let i = offsets.data[e]; i < offsets.data[e + 1]; i++) visit(e, order.data[i]);
}
