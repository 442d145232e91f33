/** The minimum work of a model's steps: bytes of weights to read and operations to do, from the formats and shapes of its weights. */
import type { MachineLimits } from "../backend/native.ts";
import type { ErnieConfig } from "../model/config.ts";
import { measure, type Size } from "../model/size.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { storedBytes } from "../tensor/stored.ts";

export interface LoadedWeight {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
}

/** Multiplications and additions, by the kind of arithmetic. */
export interface Operations {
  readonly int8: number;
  readonly float: number;
}

export interface Work {
  readonly parameters: Size["parameters"];
  /** Bytes of all weights, and of those read to generate one token. */
  readonly weightBytes: number;
  readonly tokenBytes: number;
  /** Operations of each prompt token, and of the head, which runs only for the last one. */
  readonly tokenOperations: Operations;
  readonly headOperations: Operations;
}

const EMBEDDING = "model.embed_tokens.weight";

export function workOf(config: ErnieConfig, weights: readonly LoadedWeight[]): Work {
  const head = config.tied ? EMBEDDING : "lm_head.weight";
  const layers = weights.filter((w) => w.name !== EMBEDDING && w.name !== "lm_head.weight");
  const heads = weights.filter((w) => w.name === head);
  return {
    parameters: measure(config).parameters,
    weightBytes: weights.reduce((sum, w) => sum + storedBytes(w.dtype, w.shape), 0),
    // One row of the embedding is negligible, but the head is read whole.
    tokenBytes: [...layers, ...heads].reduce((sum, w) => sum + bytesRead(w, config, 1), 0),
    tokenOperations: operations(layers, config),
    headOperations: operations(heads, config),
  };
}

/** Bytes of a weight that a step of `rows` tokens reads. For stacked experts: the expected share chosen, if all are equally likely. */
export function bytesRead(weight: LoadedWeight, { moe }: ErnieConfig, rows: number): number {
  const share = weight.shape.length === 3 && moe ? 1 - (1 - moe.chosen / moe.experts) ** rows : 1;
  return storedBytes(weight.dtype, weight.shape) * share;
}

/** Operations of one token with these weights' matrices. */
export function operations(weights: readonly LoadedWeight[], { moe }: ErnieConfig): Operations {
  const sum = { int8: 0, float: 0 };
  for (const { shape, dtype } of weights) {
    if (shape.length < 2) continue;
    const met = shape.length === 3 && moe ? moe.chosen : 1;
    const [n, k] = shape.slice(-2);
    sum[dtype === "int8" || dtype === "int4" ? "int8" : "float"] += 2 * met * n * k;
  }
  return sum;
}

/** Tokens per second if generation reads weights as fast as the machine can. */
export function generationLimit(work: Work, limits: MachineLimits): number {
  return limits.readBytesPerSecond / work.tokenBytes;
}

/** Tokens per second if a prompt's matrix products run at the arithmetic peak. Attention is not counted. */
export function promptLimit(work: Work, limits: MachineLimits, tokens: number): number {
  const { tokenOperations: each, headOperations: once } = work;
  const seconds =
    (each.int8 * tokens + once.int8) / limits.int8OpsPerSecond + (each.float * tokens + once.float) / limits.floatOpsPerSecond;
  return tokens / seconds;
}
