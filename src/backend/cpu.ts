/** How graphs are lowered for the CPU's kernels: activation formats, and the layout of keys and values within blocks. */
import { AFTER_BACKWARD, BACKWARD, FIRST_ORDER, type Op, type OpTable, SERVING, type Tensor } from "../graph/call.ts";
import { fuse } from "../graph/fuse.ts";
import type { Graph } from "../graph/graph.ts";
import { type Lowering, lower } from "../graph/lower.ts";
import { pagesFit } from "../graph/ops/attention.ts";
import { products } from "../graph/ops/matrix.ts";
import { f32, matches } from "../graph/ops/shapes.ts";
import { OPS } from "../graph/ops.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { sameShape } from "../tensor/shape.ts";
import type { Defaults } from "./backend.ts";

const ACTIVATIONS: Partial<Record<Dtype, Dtype>> = { bf16: "bf16pair", int8: "int8row", int4: "int8row" };

/** An op that converts activations to another format. */
function converted(dtype: Dtype): Op {
  return { outputs: ([x]) => (matches(x, "f32", 2) ? [{ shape: x.shape, dtype }] : null), gradient: FIRST_ORDER };
}

/** Keys are transposed within a block so that scores of adjacent tokens are adjacent in memory; int8 keys are laid out like values. */
function cacheFits(keys: Tensor | undefined, values: Tensor | undefined, segments: Tensor | undefined, pages: Tensor | undefined): boolean {
  if (keys?.shape.length !== 4 || values?.shape.length !== 4) return false;
  const [blocks, heads, tokens, dim] = values.shape;
  return (
    keys.dtype === values.dtype &&
    sameShape(keys.shape, keys.dtype === "int8kv" ? values.shape : [blocks, heads, dim, tokens]) &&
    pagesFit(segments, pages)
  );
}

const CPU_OPS = {
  ...products((weight) => [ACTIVATIONS[weight] ?? "f32"]),
  /** `linear` and `groupedLinear` of many rows with matrices of floats, for training; sums run in another order. */
  tiledLinear: { ...products().linear, gradient: AFTER_BACKWARD },
  tiledGroupedLinear: { ...products().groupedLinear, gradient: AFTER_BACKWARD },
  /** Numbers as sums of two bfloat16 numbers, exact to 2^-17. */
  toBf16Pair: converted("bf16pair"),
  /** Int8 with 255 steps, in groups of 64 (see `tensor/quantized.ts`). */
  toInt8: converted("int8row"),
  /** `cacheWrite` in the CPU's layout. */
  pagedWrite: {
    outputs: ([k, v, keys, values, segments, pages]) =>
      matches(k, "f32", 2) &&
      matches(v, "f32", 2) &&
      sameShape(k.shape, v.shape) &&
      cacheFits(keys, values, segments, pages) &&
      k.shape[1] === Number(values.shape[1]) * Number(values.shape[3])
        ? []
        : null,
    gradient: SERVING,
    writes: [2, 3],
  },
  /** `cacheRead` of keys and values and causal `attention` in one op that reads the cache in place. */
  pagedAttention: {
    outputs: ([q, keys, values, segments, pages]) =>
      matches(q, "f32", 2) &&
      cacheFits(keys, values, segments, pages) &&
      Number(q.shape[1]) % (Number(values.shape[1]) * Number(values.shape[3])) === 0
        ? [f32(...q.shape)]
        : null,
    gradient: SERVING,
  },
} satisfies Record<string, Op>;

export type CpuOpName = keyof typeof CPU_OPS;

/** The op table with the CPU's rows. */
export const CPU_TABLE: OpTable = { ...OPS, ...CPU_OPS };

export const CPU: Lowering = {
  table: CPU_TABLE,
  product: () => null,
  activations(weight) {
    if (weight === "bf16") return "toBf16Pair";
    return weight === "int8" || weight === "int4" ? "toInt8" : null;
  },
  cache({ dtype, shape: [blocks, tokens, heads, dim] }) {
    const values = [blocks, heads, tokens, dim];
    return { keys: dtype === "int8kv" ? values : [blocks, heads, dim, tokens], values };
  },
};

/**
 * A graph with gradients computes many rows at once, and nothing requires that a row's result be the same in a smaller step: its products
 * with matrices of floats are tiled. Those with int8 and int4 matrices are the same as when serving, activations rounded to int8 included, so
 * that what is trained is what will be served; their gradients pass straight through the rounding.
 */
const TRAINING: Lowering = {
  ...CPU,
  product(op, weight) {
    if (weight === "int8" || weight === "int4") return null;
    return op === "linear" ? "tiledLinear" : op === "groupedLinear" ? "tiledGroupedLinear" : null;
  },
};

/** The ops that `fuse` makes of products and their activation when serving: when training, the products' results are needed again. */
const GATED = new Set(["gatedLinear", "groupedGatedLinear"]);
/** And of products and sums when training. */
const ADDED = new Set(["addLinear", "addLinearT", "addGroupedLinear"]);

/** int8 for quantised models: their cache is as exact as their weights, and read in half the time. */
export const CPU_DEFAULTS: Defaults = {
  rows: 512,
  cacheShare: 1 / 2,
  kvDtypes: ["f32", "f16", "int8kv"],
  matrixDtype: (stored) => (stored === "fp8" ? "bf16" : stored), // which holds fp8 exactly
  kvDtype: (embedding) => (embedding === "f32" ? "f32" : embedding === "int8" || embedding === "int4" ? "int8kv" : "f16"),
};

/** The CPU's passes before planning. @param has whether there is a kernel for an op */
export function lowered(graph: Graph, has: (op: string) => boolean): Graph {
  const trains = graph.calls.some((call) => call.scope.startsWith(BACKWARD));
  return lower(
    fuse(graph, (op) => has(op) && !(trains ? GATED : ADDED).has(op)),
    trains ? TRAINING : CPU,
  );
}
