/** The test cases of CUDA's kernels: those of all backends that serve, lowered for it, and its fused ops. */
import { BLOCK_TOKENS } from "../../src/backend/backend.ts";
import { FUSED_OPS } from "../../src/backend/cuda/fused.ts";
import { CUDA_KERNELS, narrowedKernels } from "../../src/backend/reference/cuda.ts";
import { KERNELS } from "../../src/backend/reference/kernels.ts";
import type { OpTable, Tensor } from "../../src/graph/call.ts";
import { fuse } from "../../src/graph/fuse.ts";
import type { Graph } from "../../src/graph/graph.ts";
import { type Lowering, lower } from "../../src/graph/lower.ts";
import { OPS } from "../../src/graph/ops.ts";
import type { KvDtype } from "../../src/tensor/dtype.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { Builder, type Case, MATRIX_DTYPES, type MatrixDtype, noise } from "./builder.ts";
import { servingCases } from "./cases.ts";

export const CUDA_TABLE: OpTable = { ...OPS, ...FUSED_OPS };

/** The reference backend's kernels, with the cache in CUDA's layout. */
const WHOLE = { ...KERNELS, ...CUDA_KERNELS };
export const CUDA_REFERENCE = { ...WHOLE, ...narrowedKernels(WHOLE) };

const CUDA: Lowering = {
  table: CUDA_TABLE,
  product: () => null,
  activations: () => null,
  cache({ shape: [blocks, tokens, heads, dim] }) {
    const half = [blocks, heads, tokens, dim];
    return { keys: half, values: half };
  },
};

/** A case as CUDA's kernels run it before its own fusions. */
export function cudaGraph(c: Case): Graph {
  return lower(
    fuse(c.graph, () => true),
    CUDA,
  );
}

const DTYPES: readonly MatrixDtype[] = [...MATRIX_DTYPES, "fp8"];

export function cudaCases(): Case[] {
  return [...servingCases(DTYPES), ...routed(), ...combined(), ...feedForwards(), ...writes()];
}

const ROWS = [1, 2, 7, 16, 17, 100];

/** Largest differences of sums of products whose order is free; matrix units multiply in pairs of bfloat16 numbers. */
const PRODUCTS: Readonly<Record<MatrixDtype, number>> = { f32: 2e-6, f16: 1e-5, bf16: 1e-5, int8: 1e-5, int4: 1e-5, fp8: 1e-5 };

/** A sum, its norm and the router, at widths that are and are not multiples of four. */
function routed(): Case[] {
  return ROWS.flatMap((rows) =>
    [
      [64, 6, 2560, 1e-12],
      [64, 6, 130, 1e-12],
      [7, 2, 44, 0.45],
      [130, 40, 256, 0],
    ].map(([experts, k, hidden, normMin]) => {
      const b = new Builder(CUDA_TABLE);
      // The reference's choice must not depend on how logits are rounded: a few rows of noise have no near ties.
      const inputs = [
        b.rows("a", rows, hidden),
        b.rows("b", rows, hidden),
        b.weight("norm", [hidden]),
        b.weight("gate", [experts, hidden]),
      ];
      const outputs = b.g.call("addRmsNormRoute", [...inputs, b.weight("bias", [experts])], { eps: 1e-5, k, normMin });
      return b.done(`addRmsNormRoute rows ${rows} experts ${experts} of ${k} width ${hidden}`, outputs, { rows }, 3e-6);
    }),
  );
}

function combined(): Case[] {
  return ROWS.flatMap((rows) =>
    [
      [6, 2560],
      [2, 31],
      [9, 36],
    ].map(([k, n]) => {
      const b = new Builder(CUDA_TABLE);
      const input = (name: string, seed: number) => b.input(name, [symbol("rows", k), n], noise(rows * k * n, seed));
      const weights = () => b.input("weights", [symbol("rows"), k], noise(rows * k, 91));
      const [given, shared, residual] = [weights(), b.rows("shared", rows, n), b.rows("residual", rows, n)];
      const [sum] = b.g.call("combineAdd", [input("slots", 81), given, shared, residual]);
      const narrow = b.g.call("castBf16", [input("wide", 82)])[0];
      const both = b.g.call("combineAddNorm", [narrow, given, b.g.scale(shared, 2), b.g.scale(residual, 0.5), b.weight("norm", [n])], {
        eps: 1e-5,
      });
      return b.done(`combineAdd combineAddNorm rows ${rows} of ${k} width ${n}`, [sum, ...both], { rows }, 2e-6);
    }),
  );
}

/** The experts of each row, with and without shared ones, and a sum that a product continues. */
function feedForwards(): Case[] {
  return DTYPES.flatMap((dtype) =>
    ROWS.flatMap((rows) =>
      [
        [5, 2, 48, 44, 0],
        [8, 3, 128, 192, 1],
      ].map(([experts, k, width, hidden, shared]) => {
        const b = new Builder(CUDA_TABLE);
        const chosen = b.input(
          "experts",
          [symbol("rows"), k],
          Int32Array.from({ length: rows * k }, (_, i) => (Math.floor(i / k) * 3 + (i % k)) % experts),
        );
        const x = b.rows("x", rows, hidden);
        const stack = (name: string, n: number, depth: number) => b.weight(name, [experts, n, depth], dtype);
        const matrix = (name: string, n: number, depth: number) => (shared ? [b.weight(name, [n, depth], dtype)] : []);
        const opens = [stack("gate", width, hidden), stack("up", width, hidden)];
        const common = [...matrix("sharedGate", 2 * width, hidden), ...matrix("sharedUp", 2 * width, hidden)];
        const h = b.g.call("expertsGated", [x, ...opens, ...common, chosen], { shared });
        const weights = b.input("weights", [symbol("rows"), k], noise(rows * k, 71));
        const downs = [stack("down", hidden, width), ...matrix("sharedDown", hidden, 2 * width)];
        const residual = b.rows("residual", rows, hidden);
        const [y] = b.g.call("expertsDown", [...h, ...downs, chosen, weights, residual], { shared, residual: 1 });
        const [bare] = b.g.call("expertsDown", [...h, ...downs, chosen, weights], { shared, residual: 0 });
        const [added] = b.g.call("linearAdd", [x, b.weight("w", [hidden, hidden], dtype), residual]);
        return b.done(
          `experts ${dtype} rows ${rows} of ${experts}${shared ? " shared" : ""}`,
          [...h, y, bare, added],
          { rows },
          PRODUCTS[dtype],
        );
      }),
    ),
  );
}

const KV_TOLERANCES: Readonly<Record<KvDtype, number>> = { f32: 1e-5, f16: 2e-3, bf16: 1e-2, int8kv: 1e-2, fp8kv: 4e-2 };

/** Rotated keys and values of several sequences in unordered pages, read back by attention. */
function writes(): Case[] {
  return (Object.keys(KV_TOLERANCES) as KvDtype[]).flatMap((dtype) =>
    [[1], [1, 1, 1], [7, 1], [31, 33, 2]].flatMap((counts) =>
      [
        [4, 2, 16, 40],
        [10, 2, 128, 256],
      ].map(([heads, kvHeads, dim, hidden]) => {
        const b = new Builder(CUDA_TABLE);
        const rows = counts.reduce((a, c) => a + c);
        const pagesEach = Math.max(3, Math.ceil(Math.max(...counts) / BLOCK_TOKENS)); // no power of two, so that room for 4 is another width
        const starts = counts.map((_, s) => counts.slice(0, s).reduce((a, c) => a + c, 0));
        const segments = b.input("segments", [symbol("sequences"), 3], Int32Array.from(counts.flatMap((c, s) => [starts[s], c, 0])));
        const blocks = counts.length * pagesEach + 1;
        const pages = b.input(
          "pages",
          [symbol("sequences"), symbol("pages")],
          Int32Array.from({ length: counts.length * pagesEach }, (_, i) => blocks - 1 - i),
        );
        const positions = b.input(
          "positions",
          [symbol("rows")],
          Int32Array.from(counts.flatMap((c) => Array.from({ length: c }, (_, i) => i))),
        );
        const angles = b.g.angles(positions, dim, 500000);
        const half = (name: string): Tensor => b.state(name, [blocks, kvHeads, BLOCK_TOKENS, dim], dtype);
        const place = (name: string) => [half(`${name}.keys`), half(`${name}.values`), segments, pages];
        const [one, two] = [place("one"), place("two")];
        const [q, k, v] = [b.rows("q", rows, heads * dim), b.rows("k", rows, kvHeads * dim), b.rows("v", rows, kvHeads * dim)];
        const [turned] = b.g.call("ropeWrite", [q, k, v, angles, ...one]);
        const [read] = b.g.call("pagedAttention", [turned, ...one]);
        const matrices = ["wq", "wk", "wv"].map((name, i) => b.weight(name, [(i ? kvHeads : heads) * dim, hidden], "bf16"));
        const [made] = b.g.call("qkvRope", [b.rows("x", rows, hidden), ...matrices, angles, ...two]);
        const [met] = b.g.call("pagedAttention", [made, ...two]);
        return b.done(
          `ropeWrite qkvRope ${dtype} heads ${heads}/${kvHeads} dim ${dim} rows ${counts}`,
          [turned, read, made, met],
          { rows, sequences: counts.length, pages: pagesEach, context: rows },
          KV_TOLERANCES[dtype],
        );
      }),
    ),
  );
}
