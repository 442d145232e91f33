/** Tracing: what each op makes of its inputs, and what it says of inputs that do not fit. */
import { describe, expect, test } from "vitest";
import { Graph, ShapeError, type Tensor } from "../../src/graph/graph.ts";
import { OPS, type OpName } from "../../src/graph/ops.ts";
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
    [({ g, x, w }) => g.linear(x(3, 4), w("bf16", 6, 5)), "linear: shapes do not agree: bf16pair[3,4], bf16[6,5]"],
    [({ g, x, w }) => g.linear(x(3, 4), w("int8", 6, 5)), "linear: shapes do not agree: int8row[3,4], int8[6,5]"],
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
    const calls = () => parts.g.calls.filter((c) => !["toBf16Pair", "toInt8", "angles"].includes(c.op)).length;
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

  test("attention: a cache of other heads, pages of other sequences", () => {
    const cacheOf = ({ g }: Parts, heads: number, dim: number, values: readonly Dim[] = [9, heads, 32, dim]) => ({
      keys: g.state("k", [9, heads, dim, 32], "f16"),
      values: g.state("v", values, "f16"),
    });
    const run = (p: Parts, cache: ReturnType<typeof cacheOf>, pages: Dim) =>
      p.g.attention(p.x(rows, 64), cache, p.i(symbol("sequences"), 3), p.i(pages, 4));
    const fits = setUp();
    expect(showShape(run(fits, cacheOf(fits, 2, 16), symbol("sequences")).shape)).toBe("[rows,64]");
    for (const [heads, dim, values, pages] of [
      [3, 16, undefined, symbol("sequences")],
      [2, 16, [9, 2, 16, 32], symbol("sequences")],
      [2, 16, undefined, symbol("others")],
    ] as const) {
      const p = setUp();
      expect(() => run(p, cacheOf(p, heads, dim, values), pages)).toThrow(/^attention: shapes do not agree: f32\[rows,64\], f16\[9,/);
    }
  });

  test("a parameter that is not given is a bug of ours", () => {
    const { g, x, w } = setUp();
    expect(() => g.call("rmsNorm", [x(rows, 4), w("f32", 4)])).toThrow("internal: rmsNorm needs the parameter 'eps'");
  });

  test("any op refuses no inputs at all", () => {
    for (const op of Object.keys(OPS) as OpName[]) {
      const params = Object.fromEntries(OPS[op].params.map((name) => [name, 2]));
      expect(() => new Graph().call(op, [], params), op).toThrow();
    }
  });
});

test("activations are converted once for all weights that need it", () => {
  const { g, x, w } = setUp();
  const h = x(rows, 64);
  for (let i = 0; i < 3; i++) g.linear(h, w("bf16", 8, 64));
  for (let i = 0; i < 2; i++) g.linear(h, w("int8", 8, 64));
  g.linear(h, w("f16", 8, 64));
  expect(g.calls.map((c) => c.op)).toEqual(["toBf16Pair", "linear", "linear", "linear", "toInt8", "linear", "linear", "linear"]);
});
