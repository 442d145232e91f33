/** Each pass on its own: what it changes in small graphs, what it leaves alone, and that whole models compute the same after it. */
import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { BLOCK_TOKENS, type Numbers, type WeightSource } from "../../src/backend/backend.ts";
import { CPU } from "../../src/backend/cpu.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { locate } from "../../src/checkpoint/names.ts";
import { fuse } from "../../src/graph/fuse.ts";
import { Graph, type Tensor } from "../../src/graph/graph.ts";
import { lower } from "../../src/graph/lower.ts";
import { needed } from "../../src/graph/needed.ts";
import { plan } from "../../src/graph/plan.ts";
import { remat } from "../../src/graph/remat.ts";
import { type ErnieConfig, readConfig } from "../../src/model/config.ts";
import { ernie } from "../../src/model/ernie.ts";
import { linear } from "../../src/model/linear.ts";
import { PRESETS } from "../../src/model/presets.ts";
import type { Dtype } from "../../src/tensor/dtype.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { trainingStep } from "../../src/train/step.ts";
import { openGoldens, relativeError } from "../goldens.ts";

const rows = symbol("rows");
/** What serving fuses. */
const all = (op: string) => !/^add(Grouped)?Linear/.test(op);
const ops = (g: Graph) => g.calls.map((c) => c.op);

describe("fuse", () => {
  const pair = (g: Graph, x: Tensor, z = x, bias?: Tensor) => {
    const [gate, up] = [g.linear(x, g.weight("gate", [8, 4], "bf16"), bias), g.linear(z, g.weight("up", [8, 4], "bf16"))];
    return { gate, up, y: g.siluMul(gate, up) };
  };
  const made = (change: (g: Graph, x: Tensor) => Tensor) => {
    const g = new Graph();
    g.output("y", change(g, g.input("x", [rows, 4], "f32")));
    return ops(fuse(g, all));
  };

  test("gate, up and siluMul become one product", () => {
    expect(made((g, x) => pair(g, x).y)).toEqual(["gatedLinear"]);
  });

  test("also by expert, if both products use the same experts", () => {
    const g = new Graph();
    const x = g.input("x", [rows, 4], "f32");
    const experts = g.input("experts", [rows, 2], "i32");
    const { order, offsets } = g.group(experts, 3);
    const up = (name: string, o = order) => g.groupedLinear(x, g.weight(name, [3, 8, 4], "int8"), o, offsets, 2);
    g.output("y", g.siluMul(up("gate"), up("up")));
    g.output("z", g.siluMul(up("gate2"), up("up2", g.group(experts, 3).order)));
    expect(ops(fuse(g, all))).toEqual(["group", "groupedGatedLinear", "groupedLinear", "group", "groupedLinear", "siluMul"]);
  });

  test("not with a bias, with different activations, or if something else reads a product", () => {
    const unfused = ["linear", "linear", "siluMul"];
    expect(made((g, x) => pair(g, x, x, g.weight("bias", [8], "f32")).y)).toEqual(unfused);
    expect(made((g, x) => pair(g, x, g.input("z", [rows, 4], "f32")).y)).toEqual(unfused);
    expect(made((g, x) => (({ gate, y }) => g.add(gate, y))(pair(g, x)))).toEqual([...unfused, "add"]);
    const g = new Graph();
    const { up, y } = pair(g, g.input("x", [rows, 4], "f32"));
    g.output("y", y);
    g.output("up", up);
    expect(ops(fuse(g, all))).toEqual(unfused);
  });

  test("a sum and its norm become one op, with the sum still a result", () => {
    const g = new Graph();
    const [a, b] = [g.input("a", [rows, 4], "f32"), g.input("b", [rows, 4], "f32")];
    const sum = g.add(a, b);
    g.output("y", g.add(g.rmsNorm(sum, g.weight("w", [4], "f32"), 1e-5), sum));
    expect(ops(fuse(g, all))).toEqual(["addRmsNorm", "add"]);
  });

  test("an adapter's narrow product, or its gradient, and a sum become one op, if nothing else reads the product", () => {
    const fused = (change: (g: Graph, x: Tensor, y: Tensor) => Tensor) => {
      const g = new Graph();
      g.output("y", g.scale(change(g, g.input("x", [rows, 16], "f32"), g.input("y", [rows, 300], "f32")), 1));
      return ops(fuse(g, () => true));
    };
    const b = (g: Graph, dtype: Dtype = "f32") => g.weight("b", [300, 16], dtype);
    expect(fused((g, x, y) => g.add(y, g.linear(x, b(g))))).toEqual(["addLinear", "scale"]);
    expect(fused((g, x, y) => g.add(g.linear(x, b(g)), y))).toEqual(["addLinear", "scale"]);
    expect(fused((g, x, y) => g.add(x, g.call("linearT", [y, b(g)])[0]))).toEqual(["linearT", "add", "scale"]); // sums of 300 numbers
    expect(fused((g, x, y) => g.add(y, g.call("linearT", [x, g.weight("a", [16, 300], "f32")])[0]))).toEqual(["addLinearT", "scale"]);
    expect(fused((g, x, y) => g.add(y, g.linear(x, b(g, "int8"))))).toEqual(["linear", "add", "scale"]);
    expect(fused((g, x, y) => g.add(y, g.linear(x, b(g), g.weight("bias", [300], "f32"))))).toEqual(["linear", "add", "scale"]);
    expect(
      fused((g, x, y) => {
        const product = g.linear(x, b(g));
        return g.add(g.add(y, product), product);
      }),
    ).toEqual(["linear", "add", "add", "scale"]);
    // A sum that became part of a product cannot become part of a norm.
    expect(fused((g, x, y) => g.rmsNorm(g.add(y, g.linear(x, b(g))), g.weight("norm", [300], "f32"), 1e-5))).toEqual([
      "addLinear",
      "rmsNorm",
      "scale",
    ]);
  });

  test("not if the sum is read before its norm", () => {
    const g = new Graph();
    const sum = g.add(g.input("a", [rows, 4], "f32"), g.input("b", [rows, 4], "f32"));
    const early = g.scale(sum, 2);
    g.output("y", g.add(g.rmsNorm(sum, g.weight("w", [4], "f32"), 1e-5), early));
    expect(ops(fuse(g, all))).toEqual(["add", "scale", "rmsNorm", "add"]);
  });

  test("only what the backend has a kernel for", () => {
    const g = new Graph();
    g.output("y", pair(g, g.input("x", [rows, 4], "f32")).y);
    expect(ops(fuse(g, (op) => op !== "gatedLinear"))).toEqual(["linear", "linear", "siluMul"]);
  });
});

describe("lower", () => {
  test("activations are converted once for all weights that need it, and only for those", () => {
    const g = new Graph();
    const x = g.input("x", [rows, 64], "f32");
    const formats: Dtype[] = ["bf16", "int8", "f16", "bf16", "int4", "f32"];
    formats.forEach((dtype, i) => {
      g.output(`${i}`, g.linear(x, g.weight(`w${i}`, [8, 64], dtype)));
    });
    expect(ops(lower(g, CPU))).toEqual(["toBf16Pair", "linear", "toInt8", "linear", "linear", "linear", "linear", "linear"]);
  });

  const cached = (dtype: Dtype, also?: (g: Graph, parts: { keys: Tensor; logsumexp: Tensor }) => void) => {
    const g = new Graph();
    const [segments, pages] = [
      g.input("segments", [symbol("sequences"), 3], "i32"),
      g.input("pages", [symbol("sequences"), symbol("pages")], "i32"),
    ];
    const half = (name: string) => g.state(name, [9, BLOCK_TOKENS, 2, 16], dtype);
    const cache = { keys: half("keys"), values: half("values") };
    const row = (name: string, heads: number) => g.input(name, [rows, heads * 16], "f32");
    g.cacheWrite(row("k", 2), row("v", 2), cache, segments, pages);
    const keys = g.cacheRead(cache.keys, segments, pages, symbol("context"));
    const values = g.cacheRead(cache.values, segments, pages, symbol("context"));
    const { y, logsumexp } = g.attention(row("q", 4), keys, values, segments, 16);
    g.output("y", y);
    also?.(g, { keys, logsumexp });
    return lower(g, CPU);
  };

  test("attention reads the cache in place; int8 keys are laid out like values", () => {
    expect(ops(cached("f16"))).toEqual(["pagedWrite", "pagedAttention"]);
    const shapes = (dtype: Dtype) =>
      cached(dtype)
        .calls[1].inputs.slice(1, 3)
        .map((t) => t.shape);
    expect(shapes("f16")).toEqual([
      [9, 2, 16, BLOCK_TOKENS],
      [9, 2, BLOCK_TOKENS, 16],
    ]);
    expect(shapes("int8kv")).toEqual([
      [9, 2, BLOCK_TOKENS, 16],
      [9, 2, BLOCK_TOKENS, 16],
    ]);
  });

  test("attention whose parts are read elsewhere stays unchanged", () => {
    const read = cached("f16", (g, { keys }) => g.output("keys", g.scale(keys, 2)));
    expect(ops(read)).toContain("attention");
    const denominators = cached("f16", (g, { logsumexp }) => g.output("logsumexp", g.scale(logsumexp, 2)));
    expect(ops(denominators)).toContain("attention");
  });

  test("kernels are looked up after lowering: preparing a program names a missing one", async () => {
    const g = new Graph();
    const x = g.input("x", [rows, 4], "f32");
    g.output("y", x.shape.length ? g.scale(x, 2) : x);
    const strange = g.branch({ ...g.table, shrug: { outputs: () => [], gradient: "tests" } });
    for (const call of g.calls) strange.push(call);
    strange.call("shrug", []);
    const backend = referenceBackend();
    const weights = await backend.load([]);
    expect(() => backend.prepare(strange, { rows: 1 }, weights, new Map())).toThrow("no kernel for the op 'shrug'");
  });
});

describe("needed", () => {
  test("calls that the outputs depend on, in order, and those that write a state", () => {
    const g = new Graph();
    const x = g.input("x", [4], "f32");
    const [p, m, v] = ["p", "m", "v"].map((name) => g.state(name, [4], "f32"));
    const a = g.scale(x, 2);
    const b = g.scale(a, 3);
    const c = g.scale(x, 4);
    g.output("b", b);
    g.output("c", c);
    const scales = () => needed(g, ["c"]).map((call) => call.params.by ?? call.op);
    expect(scales()).toEqual([4]);
    g.call("adamw", [p, a, m, v, g.input("rates", [7], "f32")]);
    expect(scales()).toEqual([2, 4, "adamw"]);
    expect(() => needed(g, ["d"])).toThrow("internal: the program has no output 'd'");
  });
});

describe("remat", () => {
  const trains = (p: { name: string }) => !p.name.endsWith("e_score_correction_bias");
  const step = (checkpointing: boolean) => trainingStep(ernie(CONFIG), { trains, dtypeOf: () => "f32", checkpointing });

  test("layers are recomputed, but not their routing", () => {
    const [again, held] = [step(true).graph, step(false).graph];
    const count = (g: Graph, op: string) => ops(g).filter((o) => o === op).length;
    for (const op of ["attention", "siluMul"]) expect(count(again, op), op).toBe(2 * count(held, op));
    for (const op of ["route", "group", "embed", "crossEntropy"]) expect(count(again, op), op).toBe(count(held, op));
    expect(remat(again, () => false).calls).toEqual(again.calls);
  });

  test("the workspace no longer grows by every layer's activations", () => {
    const capacity = { rows: 2048, sequences: 1 };
    const bytes = (checkpointing: boolean, layers: number) => {
      const model = ernie({ ...CONFIG, layers, moe: { ...(CONFIG.moe as NonNullable<ErnieConfig["moe"]>), endLayer: layers - 1 } });
      const { graph } = trainingStep(model, { trains: (p) => p.name.endsWith("q_proj.weight"), dtypeOf: () => "f32", checkpointing });
      return plan(graph, capacity).arenaBytes;
    };
    const perLayer = (checkpointing: boolean) => (bytes(checkpointing, 12) - bytes(checkpointing, 6)) / 6;
    expect(perLayer(true)).toBeLessThan(perLayer(false) / 8);
  });
});

const CONFIG = readConfig(PRESETS["21b-a3b"] as Record<string, unknown>);

/** A prompt of 33 tokens, traced as the engine traces it, with weights in a format. */
describe.each(["moe-tiny", "dense-bias"])("a whole model: %s", (variant) => {
  let run: (dtype: Dtype, pass: (g: Graph) => Graph) => Promise<Float32Array>;
  beforeAll(async () => {
    const goldens = await openGoldens(variant);
    const model = ernie(readConfig(JSON.parse(readFileSync(`${goldens.folder}/config.json`, "utf8"))));
    const { sources } = locate(model.parameters, await openCheckpoint(goldens.folder));
    const kinds = new Map(model.parameters.map((p) => [p.name, p.kind]));
    const ids = Int32Array.from(await goldens.ids(33));
    run = async (dtype, pass) => {
      const of = (name: string): Dtype => (kinds.get(name) === "matrix" ? dtype : "f32");
      const g = new Graph();
      const half = (name: string) => g.state(name, [2, BLOCK_TOKENS, model.cache.heads, model.cache.width], "f32");
      const forward = model.forward(g, ({ name, shape }) => g.weight(name, shape, of(name)), {
        ids: g.input("ids", [rows], "i32"),
        positions: g.input("positions", [rows], "i32"),
        segments: g.input("segments", [1, 3], "i32"),
        cache: {
          pages: g.input("pages", [1, 2], "i32"),
          context: symbol("context"),
          layers: Array.from({ length: model.layers }, (_, i) => ({ keys: half(`keys.${i}`), values: half(`values.${i}`) })),
        },
      });
      g.output("logits", linear(g, forward.hiddenStates[model.layers], forward.head));
      const backend = referenceBackend();
      const weights = await backend.load(
        [...sources.values()].map(
          (s): WeightSource => ({ name: s.name, stored: s.dtype, dtype: of(s.name), shape: s.shape, parts: s.parts }),
        ),
      );
      const states = g.values
        .filter((t) => t.kind === "state")
        .map((t) => [t.name as string, backend.state(t.dtype, t.shape.map(Number))] as const);
      const program = backend.prepare(pass(g), { rows: 33 }, weights, new Map(states));
      const logits = new Float32Array(33 * model.vocabSize);
      const inputs: Record<string, Numbers> = {
        ids,
        positions: ids.map((_, i) => i),
        segments: Int32Array.of(0, 33, 0),
        pages: Int32Array.of(1, 0),
      };
      await program.run({ rows: 33, context: 33 }, inputs, { logits });
      return logits;
    };
  });

  test("fused: bit-identical", async () => {
    expect(await run("f32", (g) => fuse(g, all))).toEqual(await run("f32", (g) => g));
  });

  test.each([
    ["f32", 1e-6],
    ["f16", 1e-6],
    ["bf16", 1e-4], // activations are bfloat16 pairs, exact to 2^-17
  ] as const)("lowered: the same numbers from %s weights", async (dtype, tolerance) => {
    const traced = await run(dtype, (g) => g);
    expect(relativeError(await run(dtype, (g) => lower(g, CPU)), traced)).toBeLessThan(tolerance);
    expect(await run(dtype, (g) => lower(fuse(g, all), CPU))).toEqual(await run(dtype, (g) => lower(g, CPU)));
  });

  test("lowered: only activations for int8 weights are rounded", async () => {
    const traced = await run("int8", (g) => g);
    const error = relativeError(await run("int8", (g) => lower(fuse(g, all), CPU)), traced);
    expect(error).toBeGreaterThan(0);
    expect(error).toBeLessThan(0.1);
  });
});
