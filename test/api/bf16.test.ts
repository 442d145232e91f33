/**
 * Half precision and int8 against recorded runs of transformers on the same BF16 checkpoint: `weights` computed in
 * float32 with the weights as stored, `all` with every activation rounded to BF16 as well.
 */
import { fileURLToPath } from "node:url";
import { beforeAll, describe, expect, test } from "vitest";
import { type LoadOptions, loadModel } from "../../src/api/load.ts";
import { instructionSets } from "../../src/backend/native.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import type { Inspection } from "../../src/engine/engine.ts";
import { get } from "../checkpoint/craft.ts";

const LENGTHS = [1, 7, 33, 130];
const BACKENDS: [string, LoadOptions][] = [
  ["reference", { device: "reference" }],
  ...instructionSets().map((isa): [string, LoadOptions] => [isa, { isa, threads: 1 }]),
];
const folderOf = (model: string) => fileURLToPath(new URL(`../fixtures/bf16/${model}`, import.meta.url));

interface Recording {
  readonly ids: number[];
  readonly weights: Float32Array;
  readonly all: Float32Array;
}

async function recordings(model: string): Promise<Recording[]> {
  const { tensors } = await readHeader(`${folderOf(model)}/goldens.safetensors`);
  const bytes = async (name: string) => {
    const b = await readTensor(get(tensors, name));
    return b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength) as ArrayBuffer;
  };
  return Promise.all(
    LENGTHS.map(async (n) => ({
      ids: [...new Int32Array(await bytes(`forward.${n}.input_ids`))],
      weights: new Float32Array(await bytes(`weights.${n}.logits`)),
      all: new Float32Array(await bytes(`all.${n}.logits`)),
    })),
  );
}

async function inspectAll(model: string, recorded: readonly Recording[], options: LoadOptions): Promise<Inspection[]> {
  const { engine } = await loadModel(folderOf(model), { kv_cache_tokens: 256, ...options });
  const out: Inspection[] = [];
  for (const { ids } of recorded) out.push(await engine.inspect(ids, { routing: true }));
  await engine.dispose();
  return out;
}

/** The largest difference at each position, as a share of the largest absolute logit overall. */
function errors(actual: Float32Array, expected: Float32Array, positions: number): number[] {
  expect(actual.length).toBe(expected.length);
  const vocab = expected.length / positions;
  const top = expected.reduce((a, x) => Math.max(a, Math.abs(x)), 0);
  return Array.from({ length: positions }, (_, p) => {
    let worst = 0;
    for (let i = p * vocab; i < (p + 1) * vocab; i++) worst = Math.max(worst, Math.abs(actual[i] - expected[i]));
    return Number.isFinite(worst) ? worst / top : Number.POSITIVE_INFINITY;
  });
}

/** Positions whose experts differ from those of `other` in any layer. */
function reroutedAt(a: Inspection, b: Inspection, position: number): boolean {
  return a.routing.some((layer, l) => {
    const k = layer.experts.length / (layer.logits.length / 8);
    const chosen = (x: Int32Array) => [...x.subarray(position * k, (position + 1) * k)].sort().join();
    return chosen(layer.experts) !== chosen(b.routing[l].experts);
  });
}

const over = (all: readonly number[][], bound: number) => all.flat().filter((e) => !(e < bound)).length;

describe("dense", () => {
  let recorded: Recording[];
  beforeAll(async () => {
    recorded = await recordings("dense");
  });

  test.each(BACKENDS)("%s", async (_name, options) => {
    const worst = async (dtype: string, recording: "weights" | "all", extra: LoadOptions = {}) => {
      const out = await inspectAll("dense", recorded, { ...options, dtype, ...extra });
      return Math.max(...out.flatMap((o, i) => errors(o.logits, recorded[i][recording], LENGTHS[i])));
    };
    expect(await worst("auto", "weights")).toBeLessThan(2e-2);
    expect(await worst("auto", "all")).toBeLessThan(2e-2);
    expect(await worst("fp32", "weights")).toBeLessThan(1e-5); // the same numbers, computed in another order
    expect(await worst("fp16", "weights")).toBeLessThan(2e-3); // the KV cache is in FP16, products in FP32
    expect(await worst("fp16", "weights", { kv_cache_dtype: "fp32" })).toBeLessThan(1e-4);
    expect(await worst("int8", "weights")).toBeLessThan(5e-2);
  });
});

describe("mixture", () => {
  let recorded: Recording[];
  let exact: Inspection[];
  beforeAll(async () => {
    recorded = await recordings("moe");
    exact = await inspectAll("moe", recorded, { device: "reference", dtype: "fp32" });
  });

  test("in float32 the stored weights give the recorded logits, so the fixture is right", () => {
    exact.forEach((o, i) => {
      expect(Math.max(...errors(o.logits, recorded[i].weights, LENGTHS[i]))).toBeLessThan(1e-5);
    });
  });

  // Random experts are all about as likely, so rounding now and then chooses others, and then that position's logits differ
  // by up to a third, whoever computes: even the exact run is further than 2e-2 from `all` at 4 of the 171 positions.
  test.each(BACKENDS)("%s", async (_name, options) => {
    const run = (dtype: string, extra: LoadOptions = {}) => inspectAll("moe", recorded, { ...options, dtype, ...extra });
    const errorsOf = (out: readonly Inspection[], recording: "weights" | "all") =>
      out.map((o, i) => errors(o.logits, recorded[i][recording], LENGTHS[i]));

    const bf16 = await run("auto");
    expect(over(errorsOf(bf16, "weights"), 2e-3), "activations keep their precision, so no experts change").toBe(0);
    const toAll = errorsOf(bf16, "all");
    expect(over(toAll, 2e-2)).toBeLessThanOrEqual(6);
    expect(over(toAll.slice(0, 2), 2e-2), "prompts of 1 and 7").toBe(0);

    expect(over(errorsOf(await run("fp16"), "weights"), 2e-3)).toBe(0);

    const int8 = await run("int8");
    const far = errorsOf(int8, "weights").map((row, i) => row.filter((e, p) => !(e < 8e-2) && !reroutedAt(int8[i], exact[i], p)));
    expect(far.flat(), "beyond 8e-2 with the same experts").toEqual([]);
    expect(over(errorsOf(int8, "weights"), 8e-2), "beyond 8e-2 at all, of 171").toBeLessThanOrEqual(34);
  });
});
