/**
 * The CUDA backend as far as it goes without a card: its library; its passes, whose graphs compute on the reference backend what the model
 * computes; and the figures of docs/gpu.md that follow from formats and plans.
 */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import { type LoadedModel, loadModel } from "../../src/api/load.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { openAddon } from "../../src/backend/addon.ts";
import type { Backend, Weights } from "../../src/backend/backend.ts";
import { cudaSystem } from "../../src/backend/cuda/cuda.ts";
import { FEW_ROWS, loweredForCuda } from "../../src/backend/cuda/lowering.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { Engine, kvBytesPerToken } from "../../src/engine/engine.ts";
import { Programs } from "../../src/engine/programs.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import type { Graph } from "../../src/graph/graph.ts";
import { plan } from "../../src/graph/plan.ts";
import { readConfig } from "../../src/model/config.ts";
import { ernie, parameterDtype } from "../../src/model/ernie.ts";
import { PRESETS } from "../../src/model/presets.ts";
import type { KvDtype } from "../../src/tensor/dtype.ts";
import type { SymbolValues } from "../../src/tensor/shape.ts";
import { storedBytes } from "../../src/tensor/stored.ts";
import { openGoldens, relativeError } from "../goldens.ts";
import { CUDA_REFERENCE } from "./cuda.ts";

const LIBRARY = fileURLToPath(new URL("../../native/build/mixtape_cuda.so", import.meta.url));
const compiler =
  spawnSync(process.env["NVCC"] ?? "nvcc", ["--version"]).status === 0 && process.env["MIXTAPE_CUDA"] !== "0" && process.arch === "x64";

describe.skipIf(!compiler && !existsSync(LIBRARY))("the library (needs nvcc)", () => {
  test("is built where nvcc is", () => {
    expect(existsSync(LIBRARY)).toBe(true);
  });

  test("opens on this machine, with a driver or without", () => {
    const { driver, runtime, cards, refused } = cudaSystem();
    expect(runtime).toMatch(/^\d+\.\d+$/);
    if (driver === null) expect({ cards, refused }).toEqual({ cards: [], refused: "there is no NVIDIA driver" });
    else expect(refused === "").toBe(cards.some((card) => card.refused === ""));
  });

  test("has kernels for all that its passes make of a model", async () => {
    cudaSystem();
    const kernels = new Set(openAddon().cudaOps());
    const used = new Set<string>();
    for (const variant of ["moe-tiny", "dense-bias"])
      for (const dtype of ["fp32", "fp16", "bf16", "fp8", "int8", "int4"]) {
        const { engine } = await lowered(variant, { dtype, has: (op) => kernels.has(op), used });
        const { ids } = await openGoldens(variant);
        await answer(engine, await ids(33), 3);
        await engine.embed(await ids(7));
      }
    expect(used.size).toBeGreaterThan(15);
    expect([...used].map((op) => op.replace(/To(Bf16|F16)$/, "")).filter((op) => !kernels.has(op))).toEqual([]);
  });
});

interface Lowered {
  readonly dtype?: string;
  readonly kvDtype?: KvDtype;
  readonly maxRows?: number;
  readonly has?: (op: string) => boolean;
  /** Receives the ops of the programs. */
  readonly used?: Set<string>;
}

const open: { dispose(): Promise<void> }[] = [];
afterEach(async () => {
  for (const each of open.splice(0)) await each.dispose();
});

/** The reference backend behind the GPU's passes. */
function passed({ has = () => true, used = new Set() }: Lowered): Backend {
  const backend = referenceBackend(CUDA_REFERENCE);
  return {
    ...backend,
    prepare(graph, capacity, ...rest) {
      const rows = (capacity["rows"] ?? 0) <= FEW_ROWS ? FEW_ROWS : Number.POSITIVE_INFINITY;
      const through = loweredForCuda(graph, rows, has);
      for (const { op } of through.calls) used.add(op);
      return backend.prepare(through, capacity, ...rest);
    },
  };
}

/** A model behind the GPU's passes, and as it is traced. */
async function lowered(variant: string, options: Lowered = {}): Promise<{ engine: Engine; plain: LoadedModel }> {
  const { dtype = "fp32", kvDtype = "f32", maxRows = 512 } = options;
  const { folder } = await openGoldens(variant);
  const plain = await loadModel(folder, { dtype, device: "reference", kv_cache_tokens: 512, kv_cache_dtype: "fp32" });
  const { model, weights } = plain;
  const backend = passed(options);
  const dtypes = new Map(weights.map((w) => [w.name, w.dtype]));
  const dtypeOf = (name: string) => dtypes.get(name) as "f32";
  const engine = new Engine({ model, backend, weights: await backend.load(weights), dtypeOf, kvDtype, kvTokens: 512, maxRows });
  open.push(plain.engine, engine);
  return { engine, plain };
}

/** The relative errors of the rows, smallest first. */
function byRow(actual: Float32Array, expected: Float32Array, rows: number): number[] {
  const width = expected.length / rows;
  const row = (of: Float32Array, i: number) => of.subarray(i * width, (i + 1) * width);
  return Array.from({ length: rows }, (_, i) => relativeError(row(actual, i), row(expected, i))).sort((a, b) => a - b);
}

async function answer(engine: Engine, tokens: readonly number[], most: number, adapter?: string): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: most, adapter })) ids.push(id);
  return ids;
}

describe.each(["moe-tiny", "dense-tiny", "moe-ragged", "dense-bias"])("%s behind the GPU's passes", (variant) => {
  test.each([
    ["many", 512],
    ["few", FEW_ROWS],
  ])("in steps of %s rows, float32 weights give the recorded logits and tokens", async (_, maxRows) => {
    const goldens = await openGoldens(variant);
    const { engine } = await lowered(variant, { maxRows });
    for (const n of [7, 33]) {
      const { logits } = await engine.inspect(await goldens.ids(n));
      expect(relativeError(logits, (await goldens.tensor(`forward.${n}.logits`)).data)).toBeLessThan(2e-5);
      expect(await answer(engine, await goldens.ids(n), 6)).toEqual(goldens.greedy[n].slice(0, 6));
    }
  });

  test.each(["bf16", "int8", "int4"])("%s weights: few rows compute with float32 activations, many with bfloat16 ones", async (dtype) => {
    const goldens = await openGoldens(variant);
    const tokens = await goldens.ids(33);
    const few = await lowered(variant, { dtype, maxRows: FEW_ROWS });
    const expected = (await few.plain.engine.inspect(tokens)).logits;
    expect(relativeError((await few.engine.inspect(tokens)).logits, expected)).toBeLessThan(2e-5);
    const many = await lowered(variant, { dtype });
    const errors = byRow((await many.engine.inspect(tokens)).logits, expected, tokens.length);
    // Where two experts nearly tie, rounding may choose the other, and that row is another sum: the median row has no such tie.
    expect(variant.startsWith("moe") ? errors[errors.length >> 1] : errors[errors.length - 1]).toBeLessThan(3e-2);
    expect(errors[0]).toBeGreaterThan(1e-5); // else nothing was rounded
  });
});

test("few rows become fused products and paged attention, many rows results in the products' format", async () => {
  const tokens = await (await openGoldens("moe-tiny")).ids(33);
  const [few, many] = [new Set<string>(), new Set<string>()];
  await (await lowered("moe-tiny", { dtype: "bf16", maxRows: FEW_ROWS, used: few })).engine.inspect(tokens);
  await (await lowered("moe-tiny", { dtype: "bf16", used: many })).engine.inspect(tokens);
  for (const op of ["qkvRope", "pagedAttention", "expertsGated", "expertsDown", "addRmsNormRoute"]) expect(few).toContain(op);
  expect([...few].filter((op) => /Bf16|^rope$|^cacheWrite$|^combine$|^groupedLinear$/.test(op))).toEqual([]);
  for (const op of ["ropeWrite", "pagedAttentionToBf16", "groupedGatedLinearToBf16", "combineAddNormToBf16"]) expect(many).toContain(op);
  expect([...many].filter((op) => /^(qkvRope|expertsGated|expertsDown)$/.test(op))).toEqual([]);
});

test.each([
  ["bf16", 2e-2],
  ["int8kv", 2e-2],
  ["fp8kv", 0.15],
] as const)("a cache of %s is rounded where it is written", async (kvDtype, most) => {
  const goldens = await openGoldens("dense-tiny");
  const { engine } = await lowered("dense-tiny", { kvDtype });
  const error = relativeError((await engine.inspect(await goldens.ids(33))).logits, (await goldens.tensor("forward.33.logits")).data);
  expect(error).toBeGreaterThan(1e-5);
  expect(error).toBeLessThan(most);
});

test.each([
  ["many", 512],
  ["few", FEW_ROWS],
])("adapters, beside the base in steps of %s rows, compute what they compute on the CPU", async (_, maxRows) => {
  const goldens = await openGoldens("moe-tiny");
  const { engine } = await lowered("moe-tiny", { maxRows });
  const cpu = await AutoModelForCausalLM.from_pretrained(goldens.folder, {
    dtype: "fp32",
    device: "cpu",
    threads: 1,
    kv_cache_tokens: 512,
  });
  open.push(cpu);
  await cpu.load_adapter(`${goldens.folder}/lora-final`, { adapter_name: "tuned" });
  await engine.loadAdapter("tuned", cpu.engine.adapterBranches("tuned"));
  const tokens = await goldens.ids(33);
  const of = async (e: Engine, adapter?: string) => (await e.inspect(tokens, {}, { adapter })).logits;
  expect(relativeError(await of(engine, "tuned"), await of(cpu.engine, "tuned"))).toBeLessThan(1e-4);
  expect(relativeError(await of(engine), await of(cpu.engine))).toBeLessThan(1e-4);
  expect(relativeError(await of(cpu.engine, "tuned"), await of(cpu.engine))).toBeGreaterThan(1e-2);
  const asked = [undefined, "tuned", "tuned", undefined].map((adapter, i) => ({ adapter, tokens: tokens.slice(i) }));
  const alone = await Promise.all(asked.map((a) => answer(cpu.engine, a.tokens, 5, a.adapter)));
  expect(await Promise.all(asked.map((a) => answer(engine, a.tokens, 5, a.adapter)))).toEqual(alone);
});

describe("docs/gpu.md", () => {
  const text = readFileSync(new URL("../../docs/gpu.md", import.meta.url), "utf8");
  const models = [
    ["21B", "ERNIE-4.5-21B-A3B", "21b-a3b"],
    ["0.3B", "ERNIE-4.5-0.3B", "0.3b"],
  ] as const;
  const rounded = (bytes: number, unit: number, digits: number) => (bytes / unit).toPrecision(digits);

  test("how many rows are few", () => {
    expect(text).toContain(`for up to ${FEW_ROWS} rows, and for more`);
    expect(text).toContain(`**Up to ${FEW_ROWS} rows in a step**`);
    expect(text).toContain(`**More than ${FEW_ROWS} rows**`);
  });

  test.each(models)("the memory of %s's weights by format", (_, name, preset) => {
    const { parameters } = ernie(readConfig(PRESETS[preset]));
    const sizes = (["f32", "bf16", "int8", "int4"] as const).map((dtype) => {
      const bytes = parameters.reduce((sum, p) => sum + storedBytes(parameterDtype(p, dtype), p.shape), 0);
      return bytes < 10e9 ? (bytes / 1e9).toFixed(2) : (bytes / 1e9).toFixed(1);
    });
    expect(text).toContain(`| ${name} | ${sizes.join(" | ")} |`);
  });

  test.each(models)("the memory of %s's keys and values", (label, _, preset) => {
    const model = ernie(readConfig(PRESETS[preset]));
    for (const [name, dtype] of [
      ["bf16", "bf16"],
      ["int8", "int8kv"],
      ["fp8", "fp8kv"],
    ] as const) {
      const bytes = kvBytesPerToken(model, dtype);
      const contexts = [4096, 32_768, 131_072].map((tokens) => `${((bytes * tokens) / 1e9).toFixed(2)} GB`);
      expect(text).toContain(`| ${label}, ${name} | ${rounded(bytes, 1e3, 3)} kB | ${contexts.join(" | ")} |`);
    }
  });

  test.each(models)("the workspace of %s", (_label, _name, preset) => {
    const model = ernie(readConfig(PRESETS[preset]));
    const arenas: number[] = [];
    const backend = {
      state: () => ({ bytes: 0, dispose() {} }),
      prepare(graph: Graph, capacity: SymbolValues) {
        arenas.push(
          plan(
            loweredForCuda(graph, (capacity["rows"] ?? 0) <= FEW_ROWS ? FEW_ROWS : Number.POSITIVE_INFINITY, () => true),
            capacity,
          ).arenaBytes,
        );
        return {};
      },
    } as unknown as Backend;
    const programs = new Programs(model, (name) => (/norm|mlp\.gate\.weight|bias/.test(name) ? "f32" : "bf16"), backend, {} as Weights, {
      dtype: "bf16",
      blocks: 64,
    });
    for (const [rows, outs] of [
      [1, 1],
      [16, 16],
      [256, 256],
      [8192, 16],
      [8192, 8192],
    ])
      programs.for(rows, outs);
    const column = preset === "21b-a3b" ? 1 : 2;
    const told = [...text.matchAll(/^\| [\d,]+, [\d,]+ \| ([\d.]+) (MB|GB) \| ([\d.]+) (MB|GB) \|$/gm)].map(
      (m) => Number(m[2 * column - 1]) * (m[2 * column] === "GB" ? 1e9 : 1e6),
    );
    expect(told).toHaveLength(arenas.length);
    for (const [i, bytes] of told.entries()) expect(Math.abs(arenas[i] / bytes - 1)).toBeLessThan(0.05);
  });
});
