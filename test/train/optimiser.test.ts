/** The optimiser's steps: clipping of the global gradient norm, moments, and weight decay. */
import { expect, test } from "vitest";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { backward } from "../../src/graph/backward.ts";
import { Graph } from "../../src/graph/graph.ts";
import { adamw, adamwRates, momentName } from "../../src/train/optimiser.ts";

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
