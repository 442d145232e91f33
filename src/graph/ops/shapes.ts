/** Shape predicates shared by the rows of the op table. */
import type { Dtype } from "../../tensor/dtype.ts";
import { type Dim, type Shape, sameShape } from "../../tensor/shape.ts";
import type { Result, Tensor } from "../call.ts";

export const f32 = (...shape: Dim[]): Result => ({ shape, dtype: "f32" });
export const i32 = (...shape: Dim[]): Result => ({ shape, dtype: "i32" });

export function matches(t: Tensor | undefined, dtype: Dtype, rank: number): t is Tensor {
  return t?.dtype === dtype && t.shape.length === rank;
}

/** Whether all are float32 and of the same shape. */
export function alike(...tensors: readonly (Tensor | undefined)[]): boolean {
  const [first] = tensors;
  return first !== undefined && tensors.every((t) => t?.dtype === "f32" && sameShape(t.shape, first.shape));
}

/** An optional bias vector, or a stack of them. */
export function biasFits(bias: Tensor | undefined, shape: Shape): boolean {
  return !bias || (bias.dtype === "f32" && sameShape(bias.shape, shape));
}

/** Formats of weight matrices. */
const MATRIX: ReadonlySet<Dtype> = new Set(["f32", "f16", "bf16", "int8", "int4", "fp8"]);

/** Whether activations [rows, n] are in float32 or, beside a bfloat16 matrix, in bfloat16. */
export function isActivation(x: Tensor | undefined, w: Tensor): x is Tensor {
  return x?.shape.length === 2 && (x.dtype === "f32" || (x.dtype === "bf16" && w.dtype === "bf16"));
}

export function isMatrix(t: Tensor | undefined, rank: number): t is Tensor {
  return t !== undefined && MATRIX.has(t.dtype) && t.shape.length === rank;
}
