/** Adapters on every kind of matrix, including routed experts': the branch equals the merged weights, and its gradients are correct. */
import { readFileSync } from "node:fs";
import { beforeAll, expect, test } from "vitest";
import type { Backend, Numbers, State, WeightSource, Weights } from "../../src/backend/backend.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { readWeight } from "../../src/backend/reference/weights.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { locate } from "../../src/checkpoint/names.ts";
import { gradientName } from "../../src/graph/backward.ts";
import { Graph } from "../../src/graph/graph.ts";
import { readConfig } from "../../src/model/config.ts";
import { type Adapters, ernie } from "../../src/model/ernie.ts";
import { linear } from "../../src/model/linear.ts";
import type { Model } from "../../src/model/model.ts";
import { elements, symbol } from "../../src/tensor/shape.ts";
import { trainingStep } from "../../src/train/step.ts";
import { noise } from "../backend/builder.ts";
import { openGoldens, relativeError } from "../goldens.ts";

const ROWS = 12;
const RANK = 3;
const SCALE = 0.7;
const where = (accepts: RegExp, dropout: number): Adapters => ({
  at: ({ name }) => (accepts.test(name) ? { rank: RANK, scale: SCALE, dropout } : null),
});
const EXPERTS = where(/layers\.2\.mlp\.experts\.(gate|up|down)_proj$/, 0);
const EVERYTHING = where(/^model\.layers\.2\./, 0.25);
const VOCABULARY = where(/^(model\.embed_tokens|lm_head)$/, 0.25);

let backend: Backend;
let sources: WeightSource[];
let weights: Weights;
let open: (adapters: Adapters | null) => Model;
let inputs: Record<string, Numbers>;

beforeAll(async () => {
  const { folder, ids } = await openGoldens("moe-tiny");
  const config = readConfig(JSON.parse(readFileSync(`${folder}/config.json`, "utf8")));
  open = (adapters) => ernie(config, adapters);
  backend = referenceBackend();
  const located = locate(open(null).parameters, await openCheckpoint(folder)).sources;
  sources = [...located.values()].map((s) => ({ name: s.name, stored: s.dtype, dtype: "f32" as const, shape: s.shape, parts: s.parts }));
  weights = await backend.load(sources);
  const tokens = (await ids(33)).slice(0, ROWS + 1);
  inputs = {
    ids: Int32Array.from(tokens.slice(0, ROWS)),
    labels: Int32Array.from(tokens.slice(1)),
    weights: new Float32Array(ROWS).fill(1 / ROWS),
    positions: Int32Array.from({ length: ROWS }, (_, i) => i),
    segments: Int32Array.of(0, ROWS, 0),
    seed: Int32Array.of(11, 7),
  };
});

/** States with repeatable noise for every adapter, and their numbers. */
function adapters(model: Model) {
  const values = new Map(
    model.parameters.filter((p) => p.kind === "adapter").map((p, i) => [p.name, noise(elements(p.shape), i).map((x) => x * 0.3)]),
  );
  const states = new Map<string, State>();
  for (const p of model.parameters.filter((q) => values.has(q.name))) {
    const state = backend.state("f32", p.shape);
    state.write(values.get(p.name) as Float32Array);
    states.set(p.name, state);
  }
  return { values, states };
}

async function logitsOf(model: Model, states: ReadonlyMap<string, State>): Promise<Float32Array> {
  const g = new Graph();
  const { hiddenStates, head } = model.forward(
    g,
    ({ name, shape }) => (states.has(name) ? g.state(name, shape, "f32") : g.weight(name, shape, "f32")),
    {
      ids: g.input("ids", [symbol("rows")], "i32"),
      positions: g.input("positions", [symbol("rows")], "i32"),
      segments: g.input("segments", [1, 3], "i32"),
      cache: null,
    },
  );
  g.output("logits", linear(g, hiddenStates[hiddenStates.length - 1], head));
  const logits = new Float32Array(ROWS * model.vocabSize);
  await backend.prepare(g, { rows: ROWS }, weights, states).run({ rows: ROWS }, inputs, { logits });
  return logits;
}

test("adapters are named as in PEFT, and stacked like the experts that they adapt", () => {
  const found = open(EXPERTS).parameters.filter((p) => p.kind === "adapter");
  const shapes = Object.fromEntries(found.map((p) => [p.name.replace("model.layers.2.mlp.experts.", ""), [...p.shape]]));
  expect(shapes).toEqual({
    "gate_proj.lora_A.weight": [8, RANK, 64],
    "gate_proj.lora_B.weight": [8, 32, RANK],
    "up_proj.lora_A.weight": [8, RANK, 64],
    "up_proj.lora_B.weight": [8, 32, RANK],
    "down_proj.lora_A.weight": [8, RANK, 32],
    "down_proj.lora_B.weight": [8, 64, RANK],
  });
});

test("branches of routed experts' gate, up and down compute the same as merged weights", async () => {
  const model = open(EXPERTS);
  const { values, states } = adapters(model);
  const plain = open(null);
  const merged = new Map<string, State>();
  for (const name of plain.parameters.map((p) => p.name).filter((n) => /layers\.2\.mlp\.experts/.test(n))) {
    const source = sources.find((s) => s.name === name) as WeightSource;
    const w = await readWeight(source);
    const [experts, out, into] = source.shape;
    const [a, b] = ["A", "B"].map((half) => values.get(name.replace(".weight", `.lora_${half}.weight`)) as Float32Array);
    for (let e = 0; e < experts; e++)
      for (let i = 0; i < out; i++)
        for (let j = 0; j < into; j++)
          for (let r = 0; r < RANK; r++) w[(e * out + i) * into + j] += SCALE * b[(e * out + i) * RANK + r] * a[(e * RANK + r) * into + j];
    const state = backend.state("f32", source.shape);
    state.write(w);
    merged.set(name, state);
  }
  const adapted = await logitsOf(model, states);
  expect(relativeError(adapted, await logitsOf(plain, merged))).toBeLessThan(1e-5);
  expect(relativeError(adapted, await logitsOf(plain, new Map()))).toBeGreaterThan(1e-2);
});

test.each([
  ["of a mixture layer: attention, router, experts, shared experts", EVERYTHING, 2 * (4 + 1 + 3 + 3)],
  ["beside the one matrix of embedding and head", VOCABULARY, 2 * 2],
])(
  "gradients of every adapter %s agree with finite differences, dropout and remat included",
  async (_which, chosen, count) => {
    const model = open(chosen);
    const { values, states } = adapters(model);
    expect(values.size).toBe(count);
    const { graph, trained } = trainingStep(model, { trains: (p) => p.kind === "adapter", dtypeOf: () => "f32", chunk: 5 });
    for (const { name, shape } of trained) for (const m of ["m", "v"]) states.set(`${m}.${name}`, backend.state("f32", shape));
    const program = backend.prepare(graph, { rows: ROWS }, weights, states);
    const found = Object.fromEntries(trained.map((p) => [gradientName(p.name), new Float32Array(elements(p.shape))]));
    const still = { ...inputs, rates: Float32Array.of(0, 0.9, 0.9, 1e-8, 0, 1, 1) }; // with a rate of 0 the optimiser leaves them unchanged
    const loss = async (also = {}) => {
      const out = new Float32Array(1);
      await program.run({ rows: ROWS, sequences: 1 }, still, { loss: out, ...also });
      return out[0];
    };
    await loss(found);
    for (const [name, numbers] of values) {
      const gradient = found[gradientName(name)];
      // Along the gradient the slope is the gradient's norm: one number that any wrong entry changes.
      const norm = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
      const step = 5e-3; // small, so that no row changes its experts
      const at = async (by: number) => {
        states.get(name)?.write(numbers.map((x, i) => x + (by * gradient[i]) / norm));
        return loss();
      };
      const slope = ((await at(step)) - (await at(-step))) / (2 * step);
      states.get(name)?.write(numbers);
      expect(Math.abs(slope / norm - 1), `${name}: ${slope} for ${norm}`).toBeLessThan(2e-2);
    }
  },
  120_000,
);
