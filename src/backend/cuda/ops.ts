/** The op table of the CUDA backend: fused ops, and ops that write their results in the format of the tensor cores. */
import { AFTER_BACKWARD, type Op, type OpTable } from "../../graph/call.ts";
import { products } from "../../graph/ops/matrix.ts";
import { OPS } from "../../graph/ops.ts";
import type { Dtype } from "../../tensor/dtype.ts";
import { FUSED_OPS } from "./fused.ts";

/** Activations of products: float32 as they are for few rows, else what the tensor cores multiply with weights of a format. */
function met(weight: Dtype): readonly Dtype[] {
  if (weight === "f32") return ["f32"];
  return weight === "f16" ? ["f32", "f16"] : ["f32", "bf16"];
}

const plain: OpTable = { ...OPS, ...products(met), ...FUSED_OPS };

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
  pagedAttention: 0,
};
/** Casts, and what the names of ops end with that include them. */
export const CASTS: Readonly<Record<string, string>> = { castBf16: "ToBf16", castF16: "ToF16" };

/** The op table with the GPU's rows. */
export const CUDA_TABLE: OpTable = {
  ...plain,
  ...Object.fromEntries(
    Object.entries(NARROWED).flatMap(([op, at]) => [
      [`${op}${CASTS.castBf16}`, narrowed(plain[op], at, "bf16")],
      [`${op}${CASTS.castF16}`, narrowed(plain[op], at, "f16")],
    ]),
  ),
};
