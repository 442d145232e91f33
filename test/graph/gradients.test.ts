/** Every gradient rule against finite differences, with random small shapes: on the reference backend, and the native one's against it. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, describe, expect, test } from "vitest";
import type { Backend, Numbers, WeightSource } from "../../src/backend/backend.ts";
import { nativeBackend } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { backward, gradientName } from "../../src/graph/backward.ts";
import type { OpTable } from "../../src/graph/call.ts";
import { Graph, type Tensor } from "../../src/graph/graph.ts";
import { OPS } from "../../src/graph/ops.ts";
import { elements, symbol } from "../../src/tensor/shape.ts";
import { MATRIX_DTYPES, type MatrixDtype, noise } from "../backend/builder.ts";
import { writeWeights } from "../backend/run.ts";

const folder = mkdtempSync(join(tmpdir(), "mixtape-gradients-"));
const native = nativeBackend({ threads: 2 });
afterAll(() => {
  native.dispose();
  rmSync(folder, { recursive: true });
});

/** A graph under test: trained states, whose gradients are compared, and its other inputs. */
class Subject {
  readonly g = new Graph();
  readonly states = new Map<string, Float32Array>();
  readonly weights = new Map<string, { dtype: MatrixDtype; shape: number[]; values: Float32Array }>();
  readonly inputs: Record<string, Numbers> = {};
  readonly sizes: Record<string, number>;
  #seed: number;

  constructor(seed: number, sizes: Record<string, number>) {
    this.#seed = seed;
    this.sizes = sizes;
  }

  /** Trained numbers between -1 and 1. States cannot have symbolic shapes, so rows are numbers here. */
  trained(shape: number[], values = noise(elements(shape), this.#seed++)): Tensor {
    const name = `p${this.states.size}`;
    this.states.set(name, values);
    return this.g.state(name, shape, "f32");
  }

  frozen(shape: number[], dtype: MatrixDtype): Tensor {
    const name = `w${this.weights.size}`;
    this.weights.set(name, { dtype, shape, values: noise(elements(shape), this.#seed++) });
    return this.g.weight(name, shape, dtype);
  }

  given(shape: number[], values: Numbers): Tensor {
    const name = `x${Object.keys(this.inputs).length}`;
    this.inputs[name] = values;
    return this.g.input(name, shape, values instanceof Int32Array ? "i32" : "f32");
  }

  whole(shape: number[], below: number): Tensor {
    return this.given(
      shape,
      Int32Array.from(noise(elements(shape), this.#seed++), (x) => Math.floor(((x + 1) / 2) * below) % below),
    );
  }

  /** The loss: the sum of all results times random numbers. */
  loss(results: readonly Tensor[]): void {
    const terms = results.map((t) => {
      const count = elements(t.shape);
      return this.g.dot(this.g.reshape(t, [count]), this.given([count], noise(count, this.#seed++)));
    });
    this.g.output(
      "loss",
      this.g.scale(
        terms.reduce((a, b) => this.g.add(a, b)),
        1,
      ),
    );
  }
}

/** A program that computes the subject's loss and gradients, its states, and the gradients that it finds. */
async function gradientsOn(backend: Backend, subject: Subject, sources: readonly WeightSource[]) {
  const weights = await backend.load(sources);
  const names = [...subject.states.keys()];
  const graph = backward(subject.g, "loss", names);
  const states = new Map(
    graph.values.filter((t) => t.kind === "state").map((t) => [t.name as string, backend.state("f32", t.shape.map(Number))]),
  );
  for (const [name, values] of subject.states) states.get(name)?.write(values);
  const program = backend.prepare(graph, subject.sizes, weights, states);
  const gradients = new Map([...subject.states].map(([name, values]) => [name, new Float32Array(values.length).fill(Number.NaN)]));
  await program.run(subject.sizes, subject.inputs, Object.fromEntries([...gradients].map(([name, data]) => [gradientName(name), data])));
  return { program, states, gradients };
}

/** Largest difference between rule and finite differences, and between the two backends, relative to the largest slope of the parameter. */
async function compare(subject: Subject, step: number): Promise<number> {
  const sources = await writeWeights(subject, join(folder, "weights.bin"));
  const { program, states, gradients } = await gradientsOn(referenceBackend(), subject, sources);
  const others = await gradientsOn(native, subject, sources);
  others.program.dispose();
  const loss = async () => {
    const out = new Float32Array(1);
    await program.run(subject.sizes, subject.inputs, { loss: out });
    return out[0];
  };
  let worst = 0;
  for (const [name, values] of subject.states) {
    const slopes: number[] = [];
    for (const i of values.keys()) {
      const at = async (by: number) => {
        const moved = values.slice();
        moved[i] += by;
        states.get(name)?.write(moved);
        return { loss: await loss(), x: moved[i] };
      };
      const [up, down] = [await at(step), await at(-step)];
      slopes.push((up.loss - down.loss) / (up.x - down.x));
    }
    states.get(name)?.write(values);
    const top = Math.max(0.1, ...slopes.map(Math.abs));
    const [found, other] = [gradients, others.gradients].map((all) => all.get(name) as Float32Array);
    for (const [i, slope] of slopes.entries()) {
      if (Number.isNaN(found[i] + other[i])) return Number.POSITIVE_INFINITY;
      if (Math.abs(other[i] - found[i]) > 1e-5 * top) return Number.POSITIVE_INFINITY;
      worst = Math.max(worst, Math.abs(slope - found[i]) / top);
    }
  }
  return worst;
}

const size = (max: number) => fc.integer({ min: 1, max });
const shapes = fc.record({ seed: fc.nat(1e6), rows: size(5), n: size(6), k: size(6), more: size(3) });
type Shapes = typeof shapes extends fc.Arbitrary<infer T> ? T : never;

/** By op: a graph in which the gradients of all its differentiable inputs are taken. */
const RULES: Record<string, (s: Subject, shape: Shapes) => Tensor[]> = {
  linear: (s, { rows, n, k, more }) => [s.g.linear(s.trained([rows, k]), s.trained([n, k]), more > 1 ? s.trained([n]) : undefined)],
  linearT: (s, { rows, n, k }) => [s.g.linearT(s.trained([rows, n]), s.trained([n, k]))],
  groupedLinear: (s, { rows, n, k, more }) => {
    const experts = more + 1;
    const { order, offsets } = s.g.group(s.whole([rows, 2], experts), experts);
    const bias = more > 1 ? s.trained([experts, n]) : undefined;
    return [s.g.groupedLinear(s.trained([rows, k]), s.trained([experts, n, k]), order, offsets, 2, bias)];
  },
  embed: (s, { rows, n, k }) => [s.g.embed(s.whole([rows], n), s.trained([n, k]))],
  gather: (s, { rows, n, k }) => [s.g.gather(s.trained([n, k]), s.whole([rows], n))],
  rmsNorm: (s, { rows, n }) => [s.g.rmsNorm(s.trained([rows, n + 1]), s.trained([n + 1]), 1e-2)],
  add: (s, { rows, n }) => {
    const x = s.trained([rows, n]);
    return [s.g.add(s.g.add(x, s.trained([rows, n])), x)];
  },
  scale: (s, { rows, n }) => [s.g.scale(s.trained([rows, n]), -1.7)],
  siluMul: (s, { rows, n }) => [s.g.siluMul(s.trained([rows, n]), s.trained([rows, n]))],
  dropout: (s, { seed, rows, n }) => [s.g.dropout(s.trained([rows, n]), s.given([2], Int32Array.of(seed, 3)), 0.4, 5)],
  rope: (s, { rows, k, more }) => [s.g.rope(s.trained([rows, 2 * k * more]), s.g.angles(s.whole([rows], 50), 2 * k, 100))],
  ropeT: (s, { rows, k, more }) => s.g.call("ropeT", [s.trained([rows, 2 * k * more]), s.g.angles(s.whole([rows], 50), 2 * k, 100)]),
  attention: (s, { seed, rows, n, k, more }) => {
    // Two separate sequences, or one that continues an earlier part.
    const [first, context] = seed % 2 ? [[0, rows, 0, rows, n, 0], rows + n] : [[0, rows + n, more], rows + n + more];
    const segments = s.given([first.length / 3, 3], Int32Array.from(first));
    const kv = 1 + (seed % 2);
    const { y, logsumexp } = s.g.attention(
      s.trained([rows + n, 2 * kv * k]),
      s.trained([context, kv * k]),
      s.trained([context, kv * k]),
      segments,
      k,
      seed % 3 !== 0,
    );
    void logsumexp;
    return [y];
  },
  route: (s, { rows, k, more, seed }) => {
    // Biases far apart, so that a small step never changes which experts are chosen.
    const bias = s.g.reshape(
      s.given(
        [1, more + 2],
        Float32Array.from({ length: more + 2 }, (_, i) => ((i * 7) % (more + 2)) * 3),
      ),
      [more + 2],
    );
    const { logits, weights } = s.g.route(s.trained([rows, k]), s.trained([more + 2, k]), bias, 2, seed % 2 ? 0.9 : 1e-12);
    return seed % 3 ? [weights] : [weights, logits];
  },
  combine: (s, { rows, n, more }) => [s.g.combine(s.trained([rows * more, n]), s.trained([rows, more]))],
  replaceRows: (s, { rows, n }) => {
    const index = Int32Array.from({ length: rows }, (_, i) => 2 * i);
    return [s.g.replaceRows(s.trained([2 * rows, n]), s.trained([rows, n]), s.given([rows], index))];
  },
  crossEntropy: (s, { seed, rows, n, k, more }) => {
    const labels = s.given(
      [rows],
      Int32Array.from({ length: rows }, (_, r) => ((seed + r) % (n + 2)) - 1),
    );
    return [s.g.crossEntropy(s.trained([rows, k]), s.trained([n + 1, k]), labels, more, seed % 2 ? s.trained([n + 1]) : undefined)];
  },
  adaptedCrossEntropy: (s, { seed, rows, n, k, more }) => {
    const labels = s.given(
      [rows],
      Int32Array.from({ length: rows }, (_, r) => ((seed + r) % (n + 2)) - 1),
    );
    const branch = { low: s.trained([rows, more]), up: s.trained([n + 1, more]) };
    const bias = seed % 2 ? s.frozen([n + 1], "f32") : undefined;
    return [s.g.adaptedCrossEntropy(s.trained([rows, k]), s.frozen([n + 1, k], "f32"), labels, branch, more, bias)];
  },
  scatterRows: (s, { rows, n, k }) => [s.g.scatterRows(s.trained([rows, n]), s.whole([rows], k), k)],
  mul: (s, { rows, n }) => [s.g.mul(s.trained([rows, n]), s.trained([rows, n]))],
  softplus: (s, { rows, n }) => [s.g.softplus(s.g.scale(s.trained([rows, n]), 5))],
  scaleColumns: (s, { rows, n, more }) => [s.g.scaleColumns(s.trained([rows, n]), s.trained([n]), more > 1 ? s.trained([n]) : undefined)],
  routerLoad: (s, { rows, n, more }) => {
    const { probability, z } = s.g.routerLoad(s.trained([rows, n + 2]), 2);
    return more === 1 ? [probability] : more === 2 ? [z] : [probability, z];
  },
  dot: (s, { n }) => [s.g.dot(s.trained([n]), s.trained([n]))],
  reshape: (s, { rows, n }) => [s.g.reshape(s.trained([rows, 2 * n]), [2, rows * n])],
  slice: (s, { rows, n, k }) => [s.g.slice(s.trained([rows + 1, n + k]), 0, 1, rows), s.g.slice(s.trained([rows, n + k]), 1, k, n)],
  transpose: (s, { rows, n, k }) => [s.g.transpose(s.trained([rows, n, k]), 0, 2)],
};

/** Straight-through gradients of a rounding cannot be compared with finite differences. */
const STRAIGHT = ["castF32", "castBf16", "castF16"];
/** Constants for gradients, whatever their slope. */
const CONSTANT = ["inverseNorms"];

describe("finite differences", () => {
  test("every op with a gradient is covered", () => {
    const rules = Object.entries(OPS as OpTable).flatMap(([op, { gradient }]) => (typeof gradient === "string" ? [] : [op]));
    expect([...Object.keys(RULES), ...STRAIGHT, ...CONSTANT].sort()).toEqual(rules.sort());
  });

  test.each(Object.entries(RULES))("%s", async (_op, make) => {
    await fc.assert(
      fc.asyncProperty(shapes, async (shape) => {
        const subject = new Subject(shape.seed, {});
        subject.loss(make(subject, shape));
        expect(await compare(subject, 2e-3)).toBeLessThan(4e-3);
      }),
      { numRuns: 12, seed: 1 },
    );
  });

  test.each(MATRIX_DTYPES)("inputs of products with frozen %s weights, and nothing else is computed", async (dtype) => {
    const subject = new Subject(5, {});
    const [rows, n, k, experts] = [4, 17, 70, 3];
    const { order, offsets } = subject.g.group(subject.whole([rows, 2], experts), experts);
    const x = subject.trained([rows, k]);
    const y = subject.g.linear(x, subject.frozen([n, k], dtype), subject.frozen([n], "f32"));
    const z = subject.g.groupedLinear(x, subject.frozen([experts, n, k], dtype), order, offsets, 2);
    subject.loss([y, z]);
    expect(await compare(subject, 1e-2)).toBeLessThan(1e-3);
    const ops = backward(subject.g, "loss", ["p0"]).calls.map((c) => c.op);
    expect(ops).toEqual(expect.arrayContaining(["linearT", "groupedLinearT"]));
    expect(ops.filter((op) => /outer|Outer|sumRows|SumRows/.test(op))).toEqual([]);
  });

  test("a frozen head costs only the gradient of its input", async () => {
    const subject = new Subject(6, {});
    const x = subject.trained([5, 33]);
    subject.loss([subject.g.crossEntropy(x, subject.frozen([40, 33], "int8"), subject.whole([5], 40), 2)]);
    expect(await compare(subject, 1e-2)).toBeLessThan(1e-3);
    const grad = backward(subject.g, "loss", ["p0"]).calls.find((c) => c.op === "crossEntropyGrad");
    expect(grad?.outputs.length).toBe(1);
  });

  test("the lengths of rows are constants: gradients flow beside them", async () => {
    const subject = new Subject(8, {});
    const [a, b, m] = [subject.trained([2, 5]), subject.trained([4, 2]), subject.trained([4])];
    const by = subject.g.mul(m, subject.g.inverseNorms(subject.frozen([4, 5], "f32"), a, b, 1.5));
    const y = subject.g.scaleColumns(subject.g.linear(subject.g.linear(subject.given([3, 5], noise(15, 4)), a), b), by);
    subject.loss([y]);
    const sources = await writeWeights(subject, join(folder, "weights.bin"));
    const { gradients } = await gradientsOn(referenceBackend(), subject, sources);
    const others = await gradientsOn(native, subject, sources);
    others.program.dispose();
    // The same with the lengths given as numbers has finite differences.
    const lengths = new Float32Array(4);
    const w = subject.weights.get("w0")?.values as Float32Array;
    const [va, vb] = ["p0", "p1"].map((name) => subject.states.get(name) as Float32Array);
    for (let i = 0; i < 4; i++) {
      let sum = 0;
      for (let j = 0; j < 5; j++) sum += (w[i * 5 + j] + 1.5 * (vb[i * 2] * va[j] + vb[i * 2 + 1] * va[5 + j])) ** 2;
      lengths[i] = 1 / Math.sqrt(sum);
    }
    const constant = new Subject(8, {});
    const [a2, b2, m2] = [constant.trained([2, 5]), constant.trained([4, 2]), constant.trained([4])];
    const x2 = constant.given([3, 5], noise(15, 4));
    const by2 = constant.g.mul(m2, constant.given([4], lengths));
    const y2 = constant.g.scaleColumns(constant.g.linear(constant.g.linear(x2, a2), b2), by2);
    const weights = subject.inputs[Object.keys(subject.inputs).at(-1) as string];
    constant.g.output("loss", constant.g.scale(constant.g.dot(constant.g.reshape(y2, [12]), constant.given([12], weights)), 1));
    expect(await compare(constant, 2e-3)).toBeLessThan(1e-3);
    const expected = await gradientsOn(referenceBackend(), constant, []);
    for (const [name, values] of expected.gradients)
      for (const found of [gradients.get(name), others.gradients.get(name)] as Float32Array[])
        for (const [i, value] of values.entries()) expect(Math.abs(found[i] - value), `${name} ${i}`).toBeLessThan(1e-5);
  });

  test.each(STRAIGHT)("%s passes gradients straight through", async (op) => {
    const subject = new Subject(7, {});
    const [y] = subject.g.call(op, [subject.trained([3, 4])]);
    const [back] = subject.g.call("castF32", [y]);
    const numbers = noise(12, 9);
    subject.g.output("loss", subject.g.scale(subject.g.dot(subject.g.reshape(back, [12]), subject.given([12], numbers)), 1));
    const backend = referenceBackend();
    const state = backend.state("f32", [3, 4]);
    const found = new Float32Array(12);
    const program = backend.prepare(backward(subject.g, "loss", ["p0"]), {}, await backend.load([]), new Map([["p0", state]]));
    await program.run({}, subject.inputs, { [gradientName("p0")]: found });
    expect(found).toEqual(numbers);
  });
});

describe("what backward rejects, and what it omits", () => {
  const rows = symbol("rows");

  test("a loss that is missing, not a scalar, or independent of the trained states; a missing state", () => {
    const g = new Graph();
    const [p, q] = [g.state("p", [4], "f32"), g.state("q", [4], "f32")];
    g.output("loss", g.dot(p, p));
    g.output("rows", g.scale(p, 2));
    g.output("other", g.dot(q, q));
    expect(() => backward(g, "lost", ["p"])).toThrow("internal: backward: there is no output 'lost'");
    expect(() => backward(g, "rows", ["p"])).toThrow("internal: backward: the loss 'rows' is f32[4], it must be f32[1]");
    expect(() => backward(g, "loss", ["q"])).toThrow("internal: backward: the loss 'loss' does not depend on 'q'");
    expect(() => backward(g, "loss", ["r"])).toThrow("internal: backward: there is no state 'r' to train");
  });

  test("a path through an op without a gradient: the error names the op, its layer and the reason", () => {
    const g = new Graph();
    const cache = { keys: g.state("k", [2, 32, 1, 4], "f32"), values: g.state("v", [2, 32, 1, 4], "f32") };
    const [segments, pages] = [g.input("segments", [1, 3], "i32"), g.input("pages", [1, 2], "i32")];
    const x = g.within("layers.7", () => g.cacheRead(cache.keys, segments, pages, rows));
    g.output("loss", g.dot(g.reshape(x, [symbol("rows", 4)]), g.input("w", [symbol("rows", 4)], "f32")));
    expect(() => backward(g, "loss", ["k"])).toThrow(/^internal: backward: cacheRead of layers\.7 has no gradient: used when serving only/);
  });

  test("frozen branches get no calls", () => {
    const g = new Graph();
    const x = g.input("x", [rows, 4], "f32");
    const frozen = g.within("layers.0", () => g.linear(x, g.weight("w", [4, 4], "f32")));
    const y = g.within("layers.1", () => g.linear(frozen, g.state("p", [4, 4], "f32")));
    g.output("loss", g.dot(g.reshape(y, [symbol("rows", 4)]), g.input("w2", [symbol("rows", 4)], "f32")));
    const scopes = backward(g, "loss", ["p"]).calls.map((c) => c.scope);
    expect(scopes.filter((s) => s === "backward/layers.0")).toEqual([]);
    expect(scopes.filter((s) => s === "backward/layers.1").length).toBe(1);
  });
});
