/** The optimiser's steps: clipping of the global gradient norm, moments in both formats, and weight decay. */
import { expect, test } from "vitest";
import { nativeBackend } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { backward } from "../../src/graph/backward.ts";
import { Graph } from "../../src/graph/graph.ts";
import { decodeDynamic, encodeDynamic, SIGNED, UNSIGNED } from "../../src/tensor/dynamic.ts";
import { adamw, adamwRates, momentName, momentStates, update } from "../../src/train/optimiser.ts";

const OPTIONS = { learningRate: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weightDecay: 0.5 };

/** One step on the loss 3 p.x + 4 q.x with x = (1, 0): a gradient of norm 5. */
async function step(clip: number | null) {
  const g = new Graph();
  const [p, q] = [g.state("p", [2], "f32"), g.state("q", [2], "f32")];
  const x = g.input("x", [2], "f32");
  g.output("loss", g.add(g.scale(g.dot(p, x), 3), g.scale(g.dot(q, x), 4)));
  const graph = adamw(backward(g, "loss", ["p", "q"]), ["p", "q"], clip);
  const backend = referenceBackend();
  const names = ["p", "q"].flatMap((n) => [n, momentName(n, "m"), momentName(n, "v")]);
  const states = new Map(names.map((name) => [name, backend.state("f32", [2])]));
  for (const name of ["p", "q"]) states.get(name)?.write(Float32Array.of(2, 2));
  const program = backend.prepare(graph, {}, await backend.load([]), states);
  const norm = new Float32Array(1);
  await program.run({}, { x: Float32Array.of(1, 0), rates: adamwRates(OPTIONS, 1) }, clip === null ? {} : { gradientNorm: norm });
  return { norm: norm[0], read: (name: string) => [...(states.get(name)?.read() ?? [])] };
}

test("the global gradient norm is clipped, in the moments too", async () => {
  const { norm, read } = await step(0.5);
  expect(norm).toBeCloseTo(5, 5);
  expect(read("m.p")[0]).toBeCloseTo(0.1 * 3 * 0.1, 6); // (1 - beta1) * gradient * 0.5 / 5
  expect(read("m.q")[0]).toBeCloseTo(0.1 * 4 * 0.1, 6);
  expect(read("v.q")[0]).toBeCloseTo(0.01 * 0.4 ** 2, 6);
});

test("a norm below the limit is not changed", async () => {
  const [held, free] = [await step(100), await step(null)];
  for (const name of ["p", "q", "m.p", "v.p", "m.q", "v.q"]) expect(held.read(name)).toEqual(free.read(name));
});

test("decay is decoupled, and the first step is the learning rate", async () => {
  const { read } = await step(null);
  expect(read("p")[0]).toBeCloseTo(2 * (1 - 0.1 * 0.5) - 0.1, 5);
  expect(read("p")[1]).toBeCloseTo(2 * (1 - 0.1 * 0.5), 5); // no gradient: decay alone
});

/**
 * The levels of dynamic 8-bit numbers as https://arxiv.org/abs/2110.02861 describes them, in float64: a sign or none, zeros for the decade, an
 * indicator, and a fraction that is linear between 0.1 and 1, of which each level is the middle of its interval.
 */
function publishedLevels(signed: boolean): number[] {
  const levels = [0, 1];
  for (let zeros = 0; zeros < 7; zeros++) {
    const bits = 6 - zeros + (signed ? 0 : 1);
    for (let fraction = 0; fraction < 2 ** bits; fraction++) {
      const [low, high] = [0, 1].map((end) => 0.1 + (0.9 * (fraction + end)) / 2 ** bits);
      levels.push(((low + high) / 2) * 10 ** -zeros);
      if (signed) levels.push(-((low + high) / 2) * 10 ** -zeros);
    }
  }
  return levels.sort((a, b) => a - b);
}

test("8-bit numbers have the published levels, and each number gets the nearest one", () => {
  for (const signed of [true, false]) {
    const levels = publishedLevels(signed);
    expect(levels).toHaveLength(256);
    levels.forEach((level, code) => {
      expect(Math.abs(decodeDynamic(code, signed, 1) - level)).toBeLessThanOrEqual(1e-7 * Math.abs(level));
    });
    const values = Float32Array.from({ length: 256 }, (_, i) => (signed && i % 3 === 0 ? -1 : 1) * 10 ** (-i / 32) * 0.7);
    const codes = new Uint8Array(256);
    const scale = encodeDynamic(values, signed, codes);
    expect(scale).toBeCloseTo(0.7, 6);
    values.forEach((x, i) => {
      const nearest = Math.min(...levels.map((level) => Math.abs(level * scale - x)));
      expect(Math.abs(decodeDynamic(codes[i], signed, scale) - x)).toBeLessThanOrEqual(nearest + 1e-6 * Math.abs(x));
    });
  }
  expect(SIGNED.levels).toHaveLength(129);
  expect(UNSIGNED.levels).toHaveLength(256);
  expect([...codesOf(new Float32Array(3), true)]).toEqual([127, 127, 127]);
});

function codesOf(values: Float32Array, signed: boolean): Uint8Array {
  const codes = new Uint8Array(values.length);
  expect(encodeDynamic(values, signed, codes)).toBe(0);
  return codes;
}

/** Five steps on `count` numbers, in float64, with moments rounded block by block to the published levels. */
function published(start: Float32Array, gradients: readonly Float32Array[]) {
  const { learningRate, beta1, beta2, eps, weightDecay } = OPTIONS;
  const p = Float64Array.from(start);
  const [m, v] = [new Float64Array(p.length), new Float64Array(p.length)];
  const round = (x: Float64Array, levels: readonly number[]) => {
    for (let from = 0; from < x.length; from += 256) {
      const block = x.subarray(from, from + 256);
      const top = block.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
      block.forEach((b, i) => {
        block[i] = top * levels.reduce((near, level) => (Math.abs(level * top - b) < Math.abs(near * top - b) ? level : near), 0);
      });
    }
  };
  const [signed, unsigned] = [publishedLevels(true), publishedLevels(false)];
  gradients.forEach((g, step) => {
    for (let i = 0; i < p.length; i++) {
      m[i] = beta1 * m[i] + (1 - beta1) * g[i];
      v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2;
      const rate = m[i] / (1 - beta1 ** (step + 1)) / (Math.sqrt(v[i] / (1 - beta2 ** (step + 1))) + eps);
      p[i] += -learningRate * weightDecay * p[i] - learningRate * rate;
    }
    round(m, signed);
    round(v, unsigned);
  });
  return p;
}

test.each(["reference", "native"])("steps with 8-bit moments follow the published rule, %s backend", async (which) => {
  const count = 5000;
  const backend = which === "reference" ? referenceBackend() : nativeBackend({ threads: 2 });
  const hash = (i: number) => ((Math.imul(i + 1, 2654435761) >>> 0) / 2 ** 32) * 2 - 1;
  const start = Float32Array.from({ length: count }, (_, i) => hash(i));
  const gradients = Array.from({ length: 5 }, (_, s) => Float32Array.from(start, (_, i) => hash(7 * i + 91 * s) * 10 ** -(i % 6)));
  const g = new Graph();
  update(
    g,
    [{ name: "p", parameter: g.state("p", [count], "f32"), gradient: g.input("gradient", [count], "f32") }],
    null,
    undefined,
    "8bit",
  );
  const held = momentStates("p", [count], "8bit");
  expect(held.map((s) => s.name)).toEqual(["m8.p", "v8.p", "m8.scales.p", "v8.scales.p"]);
  const states = new Map(
    [{ name: "p", dtype: "f32" as const, shape: [count] }, ...held].map((s) => [s.name, backend.state(s.dtype, s.shape)]),
  );
  states.get("p")?.write(start);
  const program = backend.prepare(g, {}, await backend.load([]), states);
  for (const [s, gradient] of gradients.entries()) await program.run({}, { gradient, rates: adamwRates(OPTIONS, s + 1) }, {});
  const [actual, wanted] = [states.get("p")?.read() as Float32Array, published(start, gradients)];
  backend.dispose();
  // Where two levels are equally near, float32 may take the other one.
  const off = [...actual.keys()].filter((i) => Math.abs(actual[i] - wanted[i]) > 1e-5);
  expect(off.length).toBeLessThan(count / 500);
  for (const i of off) expect(Math.abs(actual[i] - wanted[i])).toBeLessThan(5 * OPTIONS.learningRate);
});

test("small parameters and embeddings keep float32 moments", () => {
  for (const [name, shape] of [
    ["p", [4095]],
    ["model.embed_tokens.weight", [100, 100]],
  ] as const)
    expect(momentStates(name, shape, "8bit")).toEqual(momentStates(name, shape, "f32"));
  expect(momentStates("p", [64, 64], "8bit").map((s) => s.shape[0])).toEqual([1024, 1024, 16, 16]);
});
