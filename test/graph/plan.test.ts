/** The planner: nothing that is needed later is overwritten, memory is used again, and programs compute what graphs say. */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, describe, expect, test } from "vitest";
import type { Backend, Numbers, WeightSource } from "../../src/backend/backend.ts";
import { instructionSets, nativeBackend } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference.ts";
import { Graph } from "../../src/graph/graph.ts";
import { ARENA_UNIT, bytesOf, type Plan, plan, VALUE_WORDS } from "../../src/graph/plan.ts";
import { elements, symbol } from "../../src/tensor/shape.ts";
import { noise } from "../backend/cases.ts";
import { relativeError } from "../goldens.ts";
import { type RandomGraph, randomGraph, WIDTHS } from "./random.ts";

const ARENA = 0;
const folder = mkdtempSync(join(tmpdir(), "mixtape-plan-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Where each computed value lies in the arena, and from which call to which it is needed. */
function placements(p: Plan) {
  return p.graph.values
    .filter((t) => t.kind === "computed" && p.values[t.id * VALUE_WORDS] === ARENA && !p.outputs.includes(t))
    .map((t) => {
      const uses = p.graph.calls.flatMap((c, i) => (c.inputs.includes(t) || c.outputs.includes(t) ? [i] : []));
      const from = p.values[t.id * VALUE_WORDS + 1] * ARENA_UNIT;
      return { t, from, to: from + bytesOf(t, p.capacity), first: uses[0], last: uses[uses.length - 1] };
    });
}

describe("random graphs", () => {
  test("no two values that are alive at once overlap, and all lie within the arena", () => {
    fc.assert(
      fc.property(randomGraph, ({ graph, outputs, rows }) => {
        const p = plan(graph, outputs, { rows });
        const placed = placements(p);
        const computed = graph.values.filter((t) => t.kind === "computed");
        expect(placed.length).toBe(computed.length - outputs.length);
        for (const [i, a] of placed.entries()) {
          expect(a.from % ARENA_UNIT).toBe(0);
          expect(a.to).toBeLessThanOrEqual(p.arenaBytes);
          for (const b of placed.slice(i + 1)) {
            const together = a.first <= b.last && b.first <= a.last;
            if (together)
              expect(a.to <= b.from || b.to <= a.from, `values ${a.t.id} and ${b.t.id} of ${graph.calls.length} calls`).toBe(true);
          }
        }
      }),
      { numRuns: 500, seed: 1 },
    );
  });

  test("the arena is no larger than all values side by side, and no smaller than what is alive at the fullest call", () => {
    fc.assert(
      fc.property(randomGraph, ({ graph, outputs, rows }) => {
        const p = plan(graph, outputs, { rows });
        const placed = placements(p);
        const size = (x: { from: number; to: number }) => Math.ceil((x.to - x.from) / ARENA_UNIT) * ARENA_UNIT;
        const alive = graph.calls.map((_, i) => placed.filter((x) => x.first <= i && x.last >= i).reduce((n, x) => n + size(x), 0));
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
async function run({ graph, outputs, weights, rows }: RandomGraph, backend: Backend): Promise<Numbers[]> {
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
  const program = backend.prepare(plan(graph, outputs, { rows: rows + 7 }), loaded, new Map());
  const inputs = [Int32Array.from({ length: rows }, (_, i) => (i * 7) % rows), ...WIDTHS.map((w) => noise(rows * w, w))];
  const results = outputs.map((t) => new Float32Array(elements(t.shape, { rows })));
  await program.run({ rows }, inputs, results);
  program.dispose();
  loaded.dispose();
  return results;
}

describe("memory is used again", () => {
  const chain = (length: number) => {
    const g = new Graph();
    let x = g.input("x", [symbol("rows"), 64], "f32");
    const input = x;
    for (let i = 0; i < length; i++) x = g.add(x, input);
    return plan(g, [x], { rows: 8 });
  };

  test("a chain of any length takes two values' room", () => {
    expect(chain(3).arenaBytes).toBe(2 * 8 * 64 * 4);
    expect(chain(200).arenaBytes).toBe(2 * 8 * 64 * 4);
  });

  test("what is handed over takes no room in the arena", () => {
    expect(chain(1).arenaBytes).toBe(0);
  });

  test("an output that nobody reads is free again after its call", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 16], "f32");
    const route = () => g.route(x, g.weight("gate", [16, 16], "f32"), g.weight("bias", [16], "f32"), 4, 0);
    const [a, b] = [route(), route()];
    const one = 16 * 16 * 4 + 2 * 16 * 4 * 4; // logits, experts, weights of 16 rows
    const p = plan(g, [a.weights, b.weights], { rows: 16 });
    expect(p.arenaBytes).toBe(one - 16 * 4 * 4);
  });

  test("twice the rows, twice the arena", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 64], "f32");
    const y = g.add(g.siluMul(x, x), g.add(x, x));
    expect(plan(g, [y], { rows: 64 }).arenaBytes).toBe(2 * plan(g, [y], { rows: 32 }).arenaBytes);
  });
});

describe("what is refused", () => {
  test("a symbol without a capacity", () => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 4], "f32");
    expect(() => plan(g, [g.add(g.add(x, x), x)], {})).toThrow("internal: no value for the size 'rows'");
  });

  const prepared = async (backend: Backend) => {
    const g = new Graph();
    const x = g.input("x", [symbol("rows"), 4], "f32");
    return backend.prepare(plan(g, [g.add(x, x)], { rows: 4 }), await backend.load([]), new Map());
  };

  test("more rows than there is room for", async () => {
    const backend = nativeBackend({ threads: 1 });
    const program = await prepared(backend);
    const [x, y] = [new Float32Array(20).fill(1), new Float32Array(20)];
    await expect(program.run({ rows: 5 }, [x], [y])).rejects.toThrow("internal: a size of 5 is beyond the plan's 4");
    await program.run({ rows: 4 }, [x], [y]);
    expect([...y]).toEqual([...new Array(16).fill(2), 0, 0, 0, 0]);
    backend.dispose();
  });

  test("arrays that are too short, of another kind, or too few", async () => {
    const backend = nativeBackend({ threads: 1 });
    const program = await prepared(backend);
    const right = new Float32Array(16);
    const attempt = async (inputs: Numbers[], outputs: Numbers[]) => program.run({ rows: 4 }, inputs, outputs);
    await expect(attempt([new Float32Array(15)], [right])).rejects.toThrow("internal: input 0 (x) does not fit its shape");
    await expect(attempt([right], [new Int32Array(16)])).rejects.toThrow(/^internal: output 0 \(\d\) does not fit its shape/);
    await expect(attempt([], [right])).rejects.toThrow("internal: 0 inputs for 1");
    backend.dispose();
  });
});
