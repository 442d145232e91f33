/** Tracing: the result shapes of each op, and its errors for inputs that do not fit. */
import { describe, expect, test } from "vitest";
import type { OpTable } from "../../src/graph/call.ts";
import { checked, Graph, ShapeError, type Tensor } from "../../src/graph/graph.ts";
import { OPS } from "../../src/graph/ops.ts";
import type { Dtype } from "../../src/tensor/dtype.ts";
import { type Dim, showShape, symbol } from "../../src/tensor/shape.ts";

const rows = symbol("rows");

function setUp() {
  const g = new Graph();
  const x = (...shape: Dim[]) => g.input("x", shape, "f32");
  const i = (...shape: Dim[]) => g.input("i", shape, "i32");
  const w = (dtype: Dtype, ...shape: Dim[]) => g.weight("w", shape, dtype);
  return { g, x, i, w };
}
type Parts = ReturnType<typeof setUp>;

describe("shapes that fit", () => {
  test.each<[string, (p: Parts) => Tensor, string]>([
    ["embed", ({ g, i, w }) => g.embed(i(rows), w("bf16", 100, 64)), "f32[rows,64]"],
    ["linear", ({ g, x, w }) => g.linear(x(rows, 64), w("f32", 10, 64), w("f32", 10)), "f32[rows,10]"],
    ["linear bf16", ({ g, x, w }) => g.linear(x(rows, 64), w("bf16", 10, 64)), "f32[rows,10]"],
    ["linear int8", ({ g, x, w }) => g.linear(x(rows, 64), w("int8", 10, 64)), "f32[rows,10]"],
    ["rope", ({ g, x, i }) => g.rope(x(rows, 96), g.angles(i(rows), 32, 1e4)), "f32[rows,96]"],
    ["gather", ({ g, x, i }) => g.gather(x(rows, 7), i(symbol("outs"))), "f32[outs,7]"],
    [
      "a mixture",
      ({ g, x, w }) => {
        const h = x(rows, 64);
        const r = g.route(h, w("f32", 8, 64), w("f32", 8), 2, 0);
        const { order, offsets } = g.group(r.experts, 8);
        expect(showShape(order.shape)).toBe("[2*rows]");
        expect(showShape(offsets.shape)).toBe("[9]");
        const up = g.groupedLinear(h, w("f32", 8, 32, 64), order, offsets, 2);
        expect(showShape(up.shape)).toBe("[2*rows,32]");
        return g.combine(g.groupedLinear(up, w("f32", 8, 64, 32), order, offsets, 1), r.weights);
      },
      "f32[rows,64]",
    ],
  ])("%s", (_name, make, expected) => {
    const y = make(setUp());
    expect(`${y.dtype}${showShape(y.shape)}`).toBe(expected);
  });
});

describe("shapes that do not agree", () => {
  test.each<[(p: Parts) => unknown, string]>([
    [({ g, x }) => g.add(x(rows, 4), x(rows, 5)), "add: shapes do not agree: f32[rows,4], f32[rows,5]"],
    [({ g, x }) => g.add(x(rows, 4), x(symbol("outs"), 4)), "add: shapes do not agree: f32[rows,4], f32[outs,4]"],
    [({ g, x }) => g.add(x(rows, 4), x(symbol("rows", 2), 4)), "add: shapes do not agree: f32[rows,4], f32[2*rows,4]"],
    [({ g, x, i }) => g.siluMul(x(rows, 4), i(rows, 4)), "siluMul: shapes do not agree: f32[rows,4], i32[rows,4]"],
    [({ g, x, w }) => g.linear(x(3, 4), w("f32", 6, 5)), "linear: shapes do not agree: f32[3,4], f32[6,5]"],
    [({ g, x, w }) => g.linear(x(3, 4), w("f32", 6, 4), w("f32", 5)), "linear: shapes do not agree: f32[3,4], f32[6,4], f32[5]"],
    [({ g, x, w }) => g.linear(x(3, 4), w("bf16", 6, 5)), "linear: shapes do not agree: f32[3,4], bf16[6,5]"],
    [({ g, x, w }) => g.linear(x(3, 4), w("int8", 6, 5)), "linear: shapes do not agree: f32[3,4], int8[6,5]"],
    [({ g, x }) => g.reshape(x(rows, 4), [symbol("rows"), 5]), "reshape: shapes do not agree: f32[rows,4]"],
    [({ g, x }) => g.reshape(x(rows, 4), [symbol("outs"), 4]), "reshape: shapes do not agree: f32[rows,4]"],
    [({ g, x }) => g.slice(x(9, 4), 0, 7, 3), "slice: shapes do not agree: f32[9,4]"],
    [({ g, x }) => g.transpose(x(9, 4), 0, 2), "transpose: shapes do not agree: f32[9,4]"],
    [
      ({ g, x, i, w }) => g.crossEntropy(x(rows, 4), w("f32", 9, 4), i(3), 8),
      "crossEntropy: shapes do not agree: f32[rows,4], f32[9,4], i32[3]",
    ],
    [({ g, x, w }) => g.embed(x(rows), w("f32", 9, 4)), "embed: shapes do not agree: f32[rows], f32[9,4]"],
    [({ g, x, w }) => g.rmsNorm(x(rows, 4), w("f32", 5), 0), "rmsNorm: shapes do not agree: f32[rows,4], f32[5]"],
    [({ g, i }) => g.angles(i(rows), 7, 1e4), "angles: shapes do not agree: i32[rows]"],
    [({ g, x, i }) => g.rope(x(rows, 40), g.angles(i(rows), 16, 1e4)), "rope: shapes do not agree: f32[rows,40], f32[rows,16]"],
    [({ g, x, w }) => g.route(x(rows, 4), w("f32", 3, 4), w("f32", 3), 4, 0), "route: shapes do not agree: f32[rows,4], f32[3,4], f32[3]"],
    [({ g, x }) => g.combine(x(symbol("rows", 3), 4), x(rows, 2)), "combine: shapes do not agree: f32[3*rows,4], f32[rows,2]"],
    [({ g, x }) => g.gather(x(rows, 4), x(rows)), "gather: shapes do not agree: f32[rows,4], f32[rows]"],
    [({ g, x }) => g.group(x(rows, 2), 8), "group: shapes do not agree: f32[rows,2]"],
  ])("case %#", (make, message) => {
    const parts = setUp();
    const calls = () => parts.g.calls.filter((c) => c.op !== "angles").length;
    let error: unknown;
    try {
      make(parts);
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(ShapeError);
    expect((error as Error).message).toBe(message);
    expect(calls(), "a call that does not fit is not recorded").toBe(0);
  });

  test("attention: keys of other heads, a cache of another format, pages of other sequences", () => {
    const { g, x, i } = setUp();
    const segments = i(symbol("sequences"), 3);
    const cache = (dtype: "f16" | "f32", heads: number) => g.state("cache", [9, 32, heads, 16], dtype);
    const read = (pages: Dim) => g.cacheRead(cache("f16", 2), segments, i(pages, 4), symbol("context"));
    const keys = read(symbol("sequences"));
    expect(showShape(keys.shape)).toBe("[context,32]");
    const { y, logsumexp } = g.attention(x(rows, 64), keys, keys, segments, 16);
    expect([showShape(y.shape), showShape(logsumexp.shape)]).toEqual(["[rows,64]", "[rows,4]"]);
    expect(() => g.attention(x(rows, 48), keys, keys, segments, 16)).toThrow(
      "attention: shapes do not agree: f32[rows,48], f32[context,32]",
    );
    expect(() => read(symbol("others"))).toThrow(/^cacheRead: shapes do not agree: f16\[9,32,2,16\]/);
    const write = (other: Tensor) =>
      g.cacheWrite(x(rows, 32), x(rows, 32), { keys: cache("f16", 2), values: other }, segments, i(symbol("sequences"), 4));
    write(cache("f16", 2));
    expect(() => write(cache("f32", 2))).toThrow(/^cacheWrite: shapes do not agree/);
    expect(() => write(cache("f16", 3))).toThrow(/^cacheWrite: shapes do not agree/);
  });

  test("a missing parameter is an internal error", () => {
    const { g, x, w } = setUp();
    expect(() => g.call("rmsNorm", [x(rows, 4), w("f32", 4)])).toThrow("internal: rmsNorm needs the parameter 'eps'");
  });

  test("every op that takes inputs rejects an empty list", () => {
    for (const [op, { params = [] }] of Object.entries(OPS as OpTable))
      if (op !== "fill") expect(() => new Graph().call(op, [], Object.fromEntries(params.map((name) => [name, 2]))), op).toThrow();
  });
});

test("an op without a gradient says why", () => {
  for (const [op, { gradient }] of Object.entries(OPS as OpTable))
    if (typeof gradient === "string") expect(gradient.length, op).toBeGreaterThan(10);
});

test("calls carry the scope in which they were traced and the states that they use", () => {
  const { g, x, i } = setUp();
  const cache = { keys: g.state("k", [9, 32, 2, 16], "f16"), values: g.state("v", [9, 32, 2, 16], "f16") };
  const [segments, pages] = [i(symbol("sequences"), 3), i(symbol("sequences"), 4)];
  g.within("layers.3", () => {
    g.cacheWrite(x(rows, 32), x(rows, 32), cache, segments, pages);
    g.cacheRead(cache.keys, segments, pages, symbol("context"));
  });
  g.add(x(rows, 2), x(rows, 2));
  const [write, read, add] = g.calls;
  expect([write.scope, read.scope, add.scope]).toEqual(["layers.3", "layers.3", ""]);
  expect(write.effects.writes).toEqual([cache.keys, cache.values]);
  expect([read.effects.reads, read.effects.writes]).toEqual([[cache.keys], []]);
  expect(add.effects).toEqual({ reads: [], writes: [] });
});

test("an output must be computed, and have one name", () => {
  const { g, x } = setUp();
  const y = g.scale(x(rows, 2), 2);
  g.output("a", y);
  expect(() => g.output("b", y)).toThrow("internal: the output b would be a second name or value of 'a'");
  expect(() => g.output("a", g.scale(y, 2))).toThrow("internal: the output a would be a second name or value of 'a'");
  expect(() => g.output("y", x(rows, 2))).toThrow("internal: the output y is not a computed value");
});

describe("a broken graph is caught and the pass named", () => {
  const pair = () => {
    const { g, x } = setUp();
    const a = g.add(x(rows, 4), x(rows, 4));
    const b = g.scale(a, 2);
    g.output("y", b);
    return { g, a, b };
  };

  test("a value of another shape", () => {
    const { g, b } = pair();
    const next = g.branch();
    next.push(g.calls[0]);
    next.push({ ...g.calls[1], op: "sumRows", outputs: [b], params: {} });
    expect(() => checked(next, "fuse")).toThrow("internal: fuse: sumRows: sumRows computes f32[4], not f32[rows,4]");
  });

  test("inputs that do not agree", () => {
    const { g } = pair();
    const next = g.branch();
    next.push(g.calls[0]);
    next.push({ ...g.calls[1], inputs: [], scope: "layers.1" });
    expect(() => checked(next, "lower")).toThrow("internal: lower: scale of layers.1: scale: shapes do not agree: ");
  });

  test("a value that is used before it is computed, never computed, or computed twice", () => {
    const { g } = pair();
    const [add, scale] = g.calls;
    const of = (...calls: (typeof add)[]) => {
      const next = g.branch();
      for (const c of calls) next.push(c);
      return () => checked(next, "remat");
    };
    expect(of(scale, add)).toThrow("internal: remat: scale uses the value 2 (f32[rows,4]) before it is computed");
    expect(of(add)).toThrow("internal: remat: nothing computes the output 'y' (f32[rows,4])");
    expect(of(add, scale, scale)).toThrow("internal: remat: scale computes the value 3 (f32[rows,4]) again");
    expect(of(add, scale)).not.toThrow();
  });
});
