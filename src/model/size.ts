/** Counts a model's parameters and the memory it takes, from its config alone. */

import { blockBytes } from "../tensor/quantized.ts";
import type { ErnieConfig } from "./config.ts";
import { parameterDtype, parameters } from "./ernie.ts";

export interface Size {
  /** `active`: those used for one token, counting only as many experts as are chosen. */
  readonly parameters: { readonly total: number; readonly active: number };
  /** Bytes of the weights in each format, and of the KV cache in fp16. */
  readonly memory: {
    readonly fp32: number;
    readonly bf16: number;
    /** Of int8, and of fp8. */
    readonly int8: number;
    /** Embedding and head in int8, as `mixtape quantize` writes them. */
    readonly int4: number;
    readonly kv_per_token: number;
    readonly kv_longest: number;
  };
}

export function measure(config: ErnieConfig): Size {
  const sum = { total: 0, active: 0, fp32: 0, bf16: 0, int8: 0, int4: 0 };
  for (const parameter of parameters(config)) {
    const { shape, experts, kind } = parameter;
    const count = shape.reduce((a, b) => a * b, 1);
    sum.total += count;
    sum.active += experts && config.moe ? (count / experts) * config.moe.chosen : count;
    sum.fp32 += count * 4;
    sum.bf16 += count * (kind === "matrix" ? 2 : 4);
    const [n, k] = shape.slice(-2);
    const inBlocks = (dtype: "int8" | "int4") => (kind === "matrix" ? (experts ?? 1) * blockBytes(dtype, n, k) : count * 4);
    sum.int8 += inBlocks("int8");
    sum.int4 += inBlocks(parameterDtype(parameter, "int4") === "int4" ? "int4" : "int8");
  }
  const kv = 2 * config.layers * config.kvHeads * config.headDim * 2;
  const { total, active, fp32, bf16, int8, int4 } = sum;
  return { parameters: { total, active }, memory: { fp32, bf16, int8, int4, kv_per_token: kv, kv_longest: kv * config.maxPositions } };
}
