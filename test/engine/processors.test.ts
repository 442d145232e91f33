/** Logits processors against transformers', and sampled tokens against their expected probabilities. */
import { beforeAll, describe, expect, test } from "vitest";
import type { Backend } from "../../src/backend/backend.ts";
import { instructionSets, nativeBackend } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { GREEDY, layOut, type Sampling } from "../../src/engine/sampling.ts";
import { Graph } from "../../src/graph/graph.ts";
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../../src/graph/ops/sampling.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { openGoldens } from "../goldens.ts";

const BACKENDS: [string, () => Backend][] = [
  ["reference", referenceBackend],
  ...instructionSets().map((isa): [string, () => Backend] => [isa, () => nativeBackend({ isa, threads: 2 })]),
];

/** Every row of `controls` on the same logits, as one step: processed logits [rows, vocab], tokens, log-probabilities. */
async function sample(backend: Backend, logits: Float32Array, history: readonly number[], controls: readonly Partial<Sampling>[]) {
  const laid = layOut(controls.map((c) => ({ sampling: { ...GREEDY, ...c }, tokens: history, promptCount: history.length })));
  const [vocab, outs] = [logits.length, controls.length];
  const g = new Graph();
  const sampling = {
    floats: g.input("floats", [symbol("outs"), SAMPLING_FLOATS.length], "f32"),
    ints: g.input("ints", [symbol("outs"), SAMPLING_INTS.length], "i32"),
    history: g.input("history", [symbol("history")], "i32"),
    biasIds: g.input("biasIds", [symbol("biases")], "i32"),
    biasValues: g.input("biasValues", [symbol("biases")], "f32"),
    masks: g.input("masks", [symbol("masks"), Math.ceil(vocab / 32)], "i32"),
  };
  const raw = g.input("logits", [symbol("outs"), vocab], "f32");
  const processed = g.processLogits(raw, sampling);
  const { ids, logprobs } = g.sample(raw, processed, sampling);
  const sizes = { outs, history: laid.history.length, biases: laid.biasIds.length, masks: 0 };
  for (const [name, t] of Object.entries({ processed, ids, logprobs })) g.output(name, t);
  const weights = await backend.load([]);
  const program = backend.prepare(g, sizes, weights, new Map());
  const inputs = { ...laid, logits: Float32Array.from({ length: outs * vocab }, (_, i) => logits[i % vocab]) };
  const result = { processed: new Float32Array(outs * vocab), ids: new Int32Array(outs), logprobs: new Float32Array(outs) };
  await program.run(sizes, inputs, result);
  program.dispose();
  weights.dispose();
  return result;
}

const PROCESSORS: [string, Partial<Sampling>][] = [
  ["temperature_0.7", { temperature: 0.7 }],
  ["top_k_20", { temperature: 1, topK: 20 }],
  ["top_p_0.8", { temperature: 1, topP: 0.8 }],
  ["min_p_0.1", { temperature: 1, minP: 0.1 }],
  ["repetition_penalty_1.3", { temperature: 1, repetitionPenalty: 1.3 }],
  ["repetition_penalty_1.3", { repetitionPenalty: 1.3 }],
  ["no_repeat_ngram_2", { temperature: 1, noRepeatNgram: 2 }],
  ["no_repeat_ngram_2", { noRepeatNgram: 2 }],
  ["all", { temperature: 0.8, repetitionPenalty: 1.05, topK: 50, topP: 0.8 }],
];

describe.each(["moe-tiny", "dense-tiny", "moe-bias", "dense-bias", "moe-ragged"])("processors on %s", (variant) => {
  let logits: Float32Array;
  let history: number[];
  const recorded: Float32Array[] = [];
  beforeAll(async () => {
    const goldens = await openGoldens(variant);
    const all = await goldens.tensor("forward.33.logits");
    logits = Float32Array.from(all.data.subarray(32 * all.shape[2]));
    history = await goldens.ids(33);
    for (const [name] of PROCESSORS) recorded.push((await goldens.tensor(`processors.${name}`)).data as Float32Array);
  });

  test.each(BACKENDS)("%s", async (_name, open) => {
    const backend = open();
    const { processed, ids } = await sample(
      backend,
      logits,
      history,
      PROCESSORS.map(([, controls]) => controls),
    );
    PROCESSORS.forEach(([name, { temperature = 0 }], r) => {
      const row = processed.subarray(r * logits.length, (r + 1) * logits.length);
      const forbidden = (x: Float32Array) => [...x.keys()].filter((i) => x[i] === Number.NEGATIVE_INFINITY);
      expect(forbidden(row), name).toEqual(forbidden(recorded[r]));
      const worst = Math.max(...[...row].map((x, i) => (x === recorded[r][i] ? 0 : Math.abs(x - recorded[r][i]))));
      expect(worst, name).toBeLessThan(1e-5);
      if (temperature === 0) expect(ids[r], name).toBe(row.indexOf(Math.max(...row)));
      expect(row[ids[r]], `${name}: what is forbidden is not chosen`).toBeGreaterThan(Number.NEGATIVE_INFINITY);
    });
    // The recordings do forbid and penalise tokens, so that matching them is meaningful.
    expect(forbiddenCount(recorded)).toBeGreaterThan(logits.length);
    backend.dispose();
  });
});

function forbiddenCount(rows: readonly Float32Array[]): number {
  return rows.reduce((n, row) => n + row.filter((x) => x === Number.NEGATIVE_INFINITY).length, 0);
}

describe("draws", () => {
  const vocab = 24;
  const logits = Float32Array.from({ length: vocab }, (_, i) => 2.5 * Math.sin(i * 1.7));
  const softmax = (x: ArrayLike<number>) => {
    const e = Array.from(x, (v) => Math.exp(v));
    const total = e.reduce((a, b) => a + b);
    return e.map((v) => v / total);
  };
  const DRAWS = 20_000;
  // Consecutive seeds, as with num_return_sequences; distant seeds; and one seed at many steps (the history's length is the step).
  const KINDS: [string, (i: number) => Partial<Sampling>][] = [
    ["seeds in a row", (i) => ({ seed: i })],
    ["seeds far apart", (i) => ({ seed: (i * 7919 * 2 ** 31 + i) % 2 ** 53 })],
  ];
  const SHAPES: [string, Partial<Sampling>, (p: number[]) => number[]][] = [
    ["temperature 1", { temperature: 1 }, (p) => p],
    ["temperature 2", { temperature: 2 }, () => softmax(logits.map((x) => x / 2))],
    ["top_k 5", { temperature: 1, topK: 5 }, (p) => renormalised(p, (x, best) => x >= best[4])],
    ["min_p 0.3", { temperature: 1, minP: 0.3 }, (p) => renormalised(p, (x, best) => x >= 0.3 * best[0])],
  ];
  const renormalised = (p: number[], keep: (x: number, best: number[]) => boolean) => {
    const best = [...p].sort((a, b) => b - a);
    const kept = p.map((x) => (keep(x, best) ? x : 0));
    const total = kept.reduce((a, b) => a + b);
    return kept.map((x) => x / total);
  };
  /** Sum of (seen - expected)^2 / expected; close to the number of degrees of freedom if the draws are right. */
  const chiSquare = (counts: number[], p: number[], n: number) =>
    p.reduce((sum, x, i) => (x > 0 ? sum + (counts[i] - n * x) ** 2 / (n * x) : sum), 0);

  test.each(KINDS)("%s: frequencies match the probabilities", async (_name, seedOf) => {
    const backend = nativeBackend({ threads: 2 });
    for (const [name, controls, expected] of SHAPES) {
      const rows = Array.from({ length: DRAWS }, (_, i) => ({ ...controls, ...seedOf(i) }));
      const { ids } = await sample(backend, logits, [], rows);
      const counts = new Array(vocab).fill(0);
      for (const id of ids) counts[id]++;
      const p = expected(softmax(logits));
      p.forEach((x, i) => {
        if (x === 0) expect(counts[i], `${name}: token ${i} is ruled out`).toBe(0);
      });
      const freedom = p.filter((x) => x > 0).length - 1;
      // Mean `freedom`, standard deviation sqrt(2 freedom): exceeding 4 deviations is very unlikely, and the seeds are fixed.
      expect(chiSquare(counts, p, DRAWS), name).toBeLessThan(freedom + 4 * Math.sqrt(2 * freedom));
    }
    backend.dispose();
  });

  test("one seed, successive steps: neither tokens nor adjacent pairs show a pattern", async () => {
    const backend = nativeBackend({ threads: 2 });
    const even = new Float32Array(4); // four tokens, equally likely
    const ids: number[] = [];
    for (let step = 0; step < 4000; step++) {
      // Only the length of the history matters here, so the tokens are all 0.
      ids.push(
        (await sample(backend, even, new Array(step % 2000).fill(0), [{ temperature: 1, seed: 5 + Math.floor(step / 2000) }])).ids[0],
      );
      if (step === 600) break;
    }
    const quarter = new Array(4).fill(0.25);
    const singles = new Array(4).fill(0);
    const pairs = new Array(16).fill(0);
    ids.forEach((id, i) => {
      singles[id]++;
      if (i) pairs[ids[i - 1] * 4 + id]++;
    });
    expect(chiSquare(singles, quarter, ids.length)).toBeLessThan(3 + 4 * Math.sqrt(6));
    expect(chiSquare(pairs, new Array(16).fill(1 / 16), ids.length - 1)).toBeLessThan(15 + 4 * Math.sqrt(30));
    backend.dispose();
  });

  test.each(BACKENDS)("the token is -1 if every token is ruled out: %s", async (_name, open) => {
    const backend = open();
    const logitBias = new Map(Array.from({ length: vocab }, (_, id) => [id, Number.NEGATIVE_INFINITY]));
    const { ids, logprobs } = await sample(backend, logits, [], [{ logitBias }, { logitBias, temperature: 1, topP: 0.5 }, {}]);
    expect([...ids]).toEqual([-1, -1, logits.indexOf(Math.max(...logits))]);
    expect([...logprobs.subarray(0, 2)]).toEqual([Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY]);
    backend.dispose();
  });

  test("many tokens: draws match the running sum of probabilities, in all instruction sets", async () => {
    const wide = Float32Array.from({ length: 5003 }, (_, i) => 3 * Math.sin(i * 1.7) + (i % 97 === 0 ? 4 : 0));
    const rows = Array.from({ length: 200 }, (_, i) => ({ temperature: 1, seed: i * 1_000_003, ...(i % 2 ? { topP: 0.7 } : {}) }));
    const drawn: number[][] = [];
    for (const [, open] of BACKENDS) {
      const backend = open();
      drawn.push([...(await sample(backend, wide, [], rows)).ids]);
      backend.dispose();
    }
    for (const ids of drawn) expect(ids).toEqual(drawn[0]);
    expect(new Set(drawn[0]).size).toBeGreaterThan(100);
    expect(Math.max(...drawn[0])).toBeGreaterThan(4500);
  });

  test("all instruction sets and the reference draw the same tokens", async () => {
    const rows = Array.from({ length: 500 }, (_, i) => ({ temperature: 1.3, topP: 0.9, seed: i * 1_000_003 }));
    const drawn: number[][] = [];
    for (const [, open] of BACKENDS) {
      const backend = open();
      drawn.push([...(await sample(backend, logits, [3, 4], rows)).ids]);
      backend.dispose();
    }
    for (const ids of drawn) expect(ids).toEqual(drawn[0]);
  });
});
