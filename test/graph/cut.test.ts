// A part of a graph computes what the whole graph computes there, and holds nothing else.
import { expect, test } from "vitest";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { cut } from "../../src/graph/cut.ts";
import { Graph } from "../../src/graph/graph.ts";
import { symbol } from "../../src/tensor/shape.ts";

function traced() {
  const g = new Graph();
  const rows = symbol("rows");
  const x = g.input("x", [rows, 4], "f32");
  const first = g.scale(x, 2);
  const second = g.within("layers.1", () => g.add(first, first));
  const third = g.scale(second, -1);
  g.output("third", third);
  return { g, x, first, second, third };
}

async function run(graph: Graph, inputs: Record<string, Float32Array>, outputs: readonly string[]) {
  const backend = referenceBackend();
  const weights = await backend.load([]);
  const program = backend.prepare(graph, { rows: 2 }, weights, new Map());
  const results = Object.fromEntries(outputs.map((name) => [name, new Float32Array(8)]));
  await program.run({ rows: 2 }, inputs, results);
  return results;
}

test("computes what the whole graph does, from a value in its middle", async () => {
  const { g, first, second } = traced();
  const x = Float32Array.from({ length: 8 }, (_, i) => i - 3);
  const part = cut(g, new Map([["given", first]]), new Map([["wanted", second]]));
  expect(part.calls.map((c) => [c.op, c.scope])).toEqual([["add", "layers.1"]]);
  expect([...part.outputs.keys()]).toEqual(["wanted"]);
  const { wanted } = await run(part, { given: x.map((v) => 2 * v) }, ["wanted"]);
  expect([...wanted]).toEqual([...x.map((v) => 4 * v)]);
  expect([...(await run(g, { x }, ["third"])).third]).toEqual([...wanted.map((v) => -v)]); // the whole graph is as it was
});

test("keeps the calls that write a state which the part reads, and no others", () => {
  const g = new Graph();
  const rows = symbol("rows");
  const half = (name: string) => g.state(name, [4, 32, 1, 8], "f32");
  const segments = g.input("segments", [symbol("sequences"), 3], "i32");
  const pages = g.input("pages", [symbol("sequences"), symbol("pages")], "i32");
  let x = g.input("x", [rows, 8], "f32");
  const values = [x];
  for (const name of ["a", "b"]) {
    const cache = { keys: half(`keys.${name}`), values: half(`values.${name}`) };
    g.cacheWrite(x, x, cache, segments, pages);
    const keys = g.cacheRead(cache.keys, segments, pages, symbol("context"));
    const read = g.cacheRead(cache.values, segments, pages, symbol("context"));
    x = g.attention(x, keys, read, segments, 8).y;
    values.push(x);
  }
  const part = cut(g, new Map([["hidden", values[1]]]), new Map([["next", values[2]]]));
  expect(part.calls.map((c) => c.op)).toEqual(["cacheWrite", "cacheRead", "cacheRead", "attention"]);
  const states = new Set(part.calls.flatMap((c) => c.inputs).flatMap((t) => (t.kind === "state" ? [t.name] : [])));
  expect(states).toEqual(new Set(["keys.b", "values.b"]));
});
