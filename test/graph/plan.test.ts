/** The planner: live values are never overwritten, memory is reused, and programs compute what their graphs describe. */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, describe, expect, test } from "vitest";
import type { Backend, Numbers, WeightSource } from "../../src/backend/backend.ts";
import { instructionSets, nativeBackend } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import type { OpTable } from "../../src/graph/call.ts";
import { Graph, type Tensor } from "../../src/graph/graph.ts";
import { OPS } from "../../src/graph/ops.ts";
import { ARENA_UNIT, bytesOf, PLACES, plan, VALUE_WORDS } from "../../src/graph/plan.ts";
import { elements, type SymbolValues, symbol } from "../../src/tensor/shape.ts";
import { noise } from "../backend/builder.ts";
import { relativeError } from "../goldens.ts";
import { type RandomGraph, randomGraph, WIDTHS } from "./random.ts";

const folder = mkdtempSync(join(tmpdir(), "mixtape-plan-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Each workspace value's location, and the calls between which it or a view of it is live. */
function placements(graph: Graph, capacity: SymbolValues) {
  const p = plan(graph, capacity);
  const word = (t: Tensor, w: number) => p.values[t.id * VALUE_WORDS + w];
  const root = (t: Tensor) => (word(t, 0) === PLACES.view ? graph.values[word(t, 1)] : t);
  const placed = graph.values
    .filter((t) => t.kind === "computed" && word(t, 0) === PLACES.arena)
    .map((t) => {
      const uses = graph.calls.flatMap((c, i) => ([...c.inputs, ...c.outputs].some((u) => root(u) === t) ? [i] : []));
      const from = word(t, 1) * ARENA_UNIT;
      return { t, from, to: from + bytesOf(t, capacity), first: uses[0], last: uses[uses.length - 1] };
    });
  return { plan: p, placed, root };
}
type Placed = ReturnType<typeof placements>["placed"][number];

/** Whether `b` may have taken over the memory of `a`: its call is the last to read it, and computes in place. */
function takesOver(graph: Graph, a: Placed, b: Placed): boolean {
  const call = graph.calls[b.first];
  const places = (OPS as OpTable)[call.op].inPlace ?? [];
  return a.last === b.first && call.outputs[0] === b.t && places.some((i) => call.inputs[i] === a.t) && a.from === b.from;
}

describe("random graphs", () => {
  test("no two live values overlap, and all are within the arena", () => {
    fc.assert(
      fc.property(randomGraph, ({ graph, outputs, rows }) => {
        const { plan: p, placed } = placements(graph, { rows });
        for (const t of outputs)
          expect(
            placed.some((x) => x.t === t),
            "what a run can return is no view",
          ).toBe(true);
        for (const [i, a] of placed.entries()) {
          expect(a.from % ARENA_UNIT).toBe(0);
          expect(a.to).toBeLessThanOrEqual(p.arenaBytes);
          for (const b of placed.slice(i + 1)) {
            const together = a.first <= b.last && b.first <= a.last;
            if (together && !takesOver(graph, a, b) && !takesOver(graph, b, a))
              expect(a.to <= b.from || b.to <= a.from, `values ${a.t.id} and ${b.t.id} of ${graph.calls.length} calls`).toBe(true);
          }
        }
      }),
      { numRuns: 500, seed: 1 },
    );
  });

  test("the arena is no larger than all values together, and no smaller than the largest live set", () => {
    fc.assert(
      fc.property(randomGraph, ({ graph, rows }) => {
        const { plan: p, placed } = placements(graph, { rows });
        const size = (x: { from: number; to: number }) => Math.ceil((x.to - x.from) / ARENA_UNIT) * ARENA_UNIT;
        const alive = graph.calls.map((_, i) => {
          const here = placed.filter((x) => x.first <= i && x.last >= i);
          return here.filter((x) => !here.some((y) => takesOver(graph, y, x))).reduce((n, x) => n + size(x), 0);
        });
        expect(p.arenaBytes).toBeLessThanOrEqual(placed.reduce((n, x) => n + size(x), 0));
        expect(p.arenaBytes).toBeGreaterThanOrEqual(Math.max(0, ...alive));
      }),
      { numRuns: 300, seed: 2 },
    );
  });

  test("planned and run natively, or call by call on the reference: the same numbers", async () => {
    const backends: Backend[] = [...instructionSets().map((isa) => nativeBackend({ isa, threads: 1 })), nativeBackend({ threads: 2 })];
    const reference = referenceBackend();
    await fc.assert(
      fc.asyncProperty(randomGraph, async (random) => {
        const wanted = await run(random, reference);
        for (const backend of backends)
          for (const [o, y] of (await run(random, backend)).entries())
            expect(relativeError(y, wanted[o]), `${backend.name}, output ${o}`).toBeLessThan(1e-4);
      }),
      { numRuns: 60, seed: 3 },
    );
    for (const backend of backends) backend.dispose();
  });
});

/** Runs with room for more rows than there are, as the engine does. */
async function run({ graph, outputs, weights, rows }: RandomGraph, backend: Backend): Promise<Float32Array[]> {
  const file = join(folder, "weights.bin");
  let offset = 0;
  const pieces: Float32Array[] = [];
  const sources = weights.map((t): WeightSource => {
    const shape = t.shape.map(Number);
    const values = noise(elements(shape), t.id);
    const part = { file, offset, bytes: values.byteLength };
    pieces.push(values, new Float32Array((16 - (values.length % 16)) % 16));
    offset += Math.ceil(values.byteLength / 64) * 64;
    return { name: t.name ?? "", stored: "f32", dtype: "f32", shape, parts: [part] };
  });
  writeFileSync(file, Buffer.concat(pieces.map((p) => Buffer.from(p.buffer))));
  const loaded = await backend.load(sources);
  const program = backend.prepare(graph, { rows: rows + 7 }, loaded, new Map());
  const index = Int32Array.from({ length: rows }, (_, i) => (i * 7) % rows);
  const inputs = { index, ...Object.fromEntries(WIDTHS.map((w) => [`x${w}`, noise(rows * w, w)])) };
  const results = outputs.map((t) => new Float32Array(elements(t.shape, { rows })));
  await program.run({ rows }, inputs, Object.fromEntries(results.map((r, i) => [`${i}`, r])));
  // Requesting outputs one by one gives the same results.
  for (const [i, whole] of results.entries()) {
    const alone = new Float32Array(whole.length);
    await program.run({ rows }, inputs, { [`${i}`]: alone });
    expect(alone, `${backend.name}, output ${i} alone`).toEqual(whole);
  }
  program.dispose();
  loaded.dispose();
  return results;
}

describe("memory is reused", () => {
  const row = (n: number) => n * 64 * 4;
  const chain = (length: number) => {
    const g = new Graph();
    let x = g.input("x", [symbol("rows"), 64], "f32");
    const input = x;
    for (let i = 0; i < length; i++) x = g.gather(g.add(x, input), g.input("index", [symbol("rows")], "i32"));
    g.output("y", x);
    return plan(g, { rows: 8 });
  };

  test("a chain of any length takes the memory of two values", () => {
    expect(chain(3).arenaBytes).toBe(row(16));
    expect(chain(200).arenaBytes).toBe(row(16));
  });

  test("an op that supports it reuses the memory of an input at its last use, unless a run can return that input", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 64], "f32");
    const a = g.add(x, x);
    const b = g.siluMul(g.scale(a, 2), x);
    g.output("y", g.rmsNorm(b, g.weight("w", [64], "f32"), 1e-5));
    expect(plan(g, { rows: 8 }).arenaBytes).toBe(row(8));
    g.output("a", a);
    expect(plan(g, { rows: 8 }).arenaBytes).toBe(row(16));
  });

  test("an op does not write over a view that it also reads", () => {
    const g = new Graph();
    const x = g.add(g.input("x", [8, 64], "f32"), g.input("x2", [8, 64], "f32"));
    g.output("y", g.replaceRows(x, g.slice(x, 0, 1, 2), g.input("index", [2], "i32")));
    expect(plan(g, {}).arenaBytes).toBe(row(16));
  });

  test("the memory of an unused result is free after its call", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 16], "f32");
    const route = () => g.route(x, g.weight("gate", [16, 16], "f32"), g.weight("bias", [16], "f32"), 4, 0);
    g.output("a", route().weights);
    g.output("b", route().weights);
    const one = 16 * 16 * 4 + 2 * 16 * 4 * 4; // logits, experts, weights of 16 rows
    expect(plan(g, { rows: 16 }).arenaBytes).toBe(one);
  });

  test("twice the rows take twice the workspace", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 64], "f32");
    g.output("y", g.add(g.siluMul(x, x), g.gather(x, g.input("index", [symbol("rows")], "i32"))));
    expect(plan(g, { rows: 64 }).arenaBytes).toBe(2 * plan(g, { rows: 32 }).arenaBytes);
  });

  test("scratch for logits is sized by the picked rows", () => {
    const g = new Graph();
    const x = g.gather(g.scale(g.input("x", [symbol("rows"), 64], "f32"), 2), g.input("picked", [symbol("outs")], "i32"));
    g.output("logits", g.linear(x, g.weight("head", [100_000, 64], "f32")));
    expect(plan(g, { rows: 512, outs: 1 }).arenaBytes).toBeLessThan(600_000);
  });
});

describe("views", () => {
  const place = (g: Graph, t: Tensor) => {
    const { values } = plan(g, { rows: 8 });
    return [...values.subarray(t.id * VALUE_WORDS, t.id * VALUE_WORDS + 3)];
  };

  test("of views, of inputs, of weights in one part: no calls, and cumulative offsets", () => {
    const g = new Graph();
    const x = g.input("x", [10, 6], "f32");
    const part = g.slice(x, 0, 2, 4); // from element 12 on
    const flat = g.reshape(g.slice(part, 0, 1, 2), [12]); // from element 18 on
    const bias = g.reshape(g.weight("bias", [1, 6], "f32"), [6]);
    g.output("y", g.rmsNorm(g.reshape(flat, [2, 6]), bias, 0));
    expect(place(g, flat)).toEqual([PLACES.view, x.id, 18 * 4]);
    expect(plan(g, {}).calls.map((c) => c.op)).toEqual(["rmsNorm"]);
  });

  test("a transpose is a view if all but one of the axes that it spans have size 1", () => {
    const g = new Graph();
    const x = g.scale(g.input("x", [4, 1, 5, 1], "f32"), 1);
    const turns = [g.transpose(x, 0, 1), g.transpose(x, 2, 3), g.transpose(x, 0, 2), g.transpose(x, 1, 3)];
    turns.forEach((t, i) => {
      g.output(`${i}`, g.scale(t, 2));
    });
    expect(turns.map((t) => place(g, t)[0] === PLACES.view)).toEqual([true, true, false, true]);
    expect(place(g, turns[0])[1], "none of what it reads").toBe(x.id);
  });

  test("a slice across rows is not a view, and neither is an output", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 6], "f32");
    const columns = g.slice(x, 1, 2, 3);
    g.output("columns", g.scale(columns, 2));
    g.output("whole", g.reshape(x, [symbol("rows"), 3, 2]));
    expect(plan(g, { rows: 8 }).calls.map((c) => c.op)).toEqual(["slice", "scale", "reshape"]);
  });
});

describe("what is rejected", () => {
  test("a value without a bound", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 4], "f32");
    g.output("y", g.add(g.add(x, x), x));
    expect(() => plan(g, {})).toThrow("internal: the result f32[rows,4] of add has no bound: its sizes have no capacity");
  });

  test("more dimensions than a record holds", () => {
    const g = new Graph();
    const x = g.input("x", [1, 2, 1, 2, 1], "f32");
    g.output("y", g.scale(x, 2));
    expect(() => plan(g, {})).toThrow("internal: the value x (f32[1,2,1,2,1]) has more than 4 dimensions");
  });

  test("sizes beyond 32 bits", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows", 2 ** 31), 4], "f32");
    g.output("y", g.dot(g.reshape(x, [symbol("rows", 2 ** 33)]), g.reshape(x, [symbol("rows", 2 ** 33)])));
    expect(() => plan(g, { rows: 1 })).toThrow(/^internal: the value x \(f32\[2147483648\*rows,4\]\) needs the number 2147483648/);
  });

  const prepared = async (backend: Backend) => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 4], "f32");
    g.output("y", g.add(x, x));
    return backend.prepare(g, { rows: 4 }, await backend.load([]), new Map());
  };

  test("more rows than there is room for", async () => {
    const backend = nativeBackend({ threads: 1 });
    const program = await prepared(backend);
    const [x, y] = [new Float32Array(20).fill(1), new Float32Array(20)];
    await expect(program.run({ rows: 5 }, { x }, { y })).rejects.toThrow("internal: a size of 5 exceeds the plan's 4");
    await program.run({ rows: 4 }, { x }, { y });
    expect([...y]).toEqual([...new Array(16).fill(2), 0, 0, 0, 0]);
    backend.dispose();
  });

  test("arrays that are too short, of another type, missing, or for an unknown output", async () => {
    for (const backend of [nativeBackend({ threads: 1 }), referenceBackend()]) {
      const program = await prepared(backend);
      const right = new Float32Array(16);
      const attempt = async (inputs: Record<string, Numbers>, outputs: Record<string, Numbers>) =>
        program.run({ rows: 4 }, inputs, outputs);
      await expect(attempt({ x: new Float32Array(15) }, { y: right }), backend.name).rejects.toThrow(
        /^internal: the input 'x' \(f32\[rows,4\]\) needs 64 bytes of f32, not 60 of Float32Array/,
      );
      await expect(attempt({ x: right }, { y: new Int32Array(16) })).rejects.toThrow(
        /^internal: the output 'y' \(f32\[rows,4\]\) needs 64 bytes of f32, not 64 of Int32Array/,
      );
      await expect(attempt({}, { y: right })).rejects.toThrow(/^internal: .*'x'.* not given/);
      await expect(attempt({ x: right }, { z: right })).rejects.toThrow("internal: the program has no output 'z'");
      backend.dispose();
    }
  });
});
