// `mixtape bench` on tiny models: what it prints, cuts and rejects. The figures depend on the machine.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { instructionSets, machineLimits } from "../../src/backend/native.ts";
import type { BenchResult } from "../../src/cli/report.ts";
import { ratios, type Spread, spread } from "../../src/cli/spread.ts";
import { generationLimit, promptLimit, workOf } from "../../src/cli/work.ts";
import { readConfig } from "../../src/model/config.ts";
import { parameterDtype, parameters } from "../../src/model/ernie.ts";
import { measure } from "../../src/model/size.ts";
import { run, temporary, tinyModel } from "./run.ts";

const quick = ["--repeat", "2", "--prompt-lengths", "3,9", "--contexts", "4", "--new-tokens", "3"];

async function bench(...args: readonly string[]): Promise<BenchResult> {
  const { code, out, err } = await run(["bench", ...quick, "--json", ...args]);
  expect(code, err).toBe(0);
  return JSON.parse(out) as BenchResult;
}

async function fault(...args: readonly string[]): Promise<string> {
  const { code, out, err } = await run(["bench", ...args]);
  expect(code, err).toBe(1);
  expect(out).toBe("");
  expect(err).toMatch(/^mixtape: .+\n$/);
  return err.slice("mixtape: ".length, -1);
}

function expectSpread({ median, least, most, values }: Spread, count: number): void {
  expect(values).toHaveLength(count);
  for (const x of values) expect(x).toBeGreaterThan(0);
  expect(least).toBeLessThanOrEqual(median);
  expect(median).toBeLessThanOrEqual(most);
}

const fixture = (golden: string) => readConfig(JSON.parse(readFileSync(join("test/fixtures/goldens", golden, "config.json"), "utf8")));

test("JSON has speed, limits, shares, load time and memory; no tokenizer is needed", async () => {
  const model = tinyModel({ "tokenizer.json": null });
  const { machine, rounds, models, comparison } = await bench("-m", model, "--threads", "2");
  expect(machine.cores).toBeGreaterThan(0);
  expect(rounds).toBe(2);
  expect(comparison).toBeUndefined();
  expect(models).toHaveLength(1);
  const [m] = models;
  expect(m).toMatchObject({ model, folder: model, dtype: "f32", threads: 2, isa: instructionSets()[0] });
  expect(m.parameters).toEqual(measure(fixture("moe-tiny")).parameters);
  for (const limit of Object.values(m.limits)) expectSpread(limit, 2);
  for (const time of Object.values(m.load)) expectSpread(time, 2);
  expect(m.load.first_token_seconds.median).toBeGreaterThan(m.load.ready_seconds.median);
  expect(m.memory.peak_bytes).toBeGreaterThan(m.weight_bytes);
  expect(m.prompt.map((p) => p.tokens)).toEqual([3, 9]);
  expect(m.generation.map((g) => [g.tokens, g.new_tokens])).toEqual([[4, 3]]);
  for (const r of [...m.prompt, ...m.generation]) {
    expectSpread(r.tokens_per_second, 2);
    expect(r.share).toBeCloseTo(r.tokens_per_second.median / r.limit_tokens_per_second, 9);
  }
  expect(m.profile).toBeUndefined();
});

test("a comparison takes turns and gives the ratio of each pair", async () => {
  const { models, comparison } = await bench(
    "-m",
    tinyModel(),
    "--dtype",
    "int8",
    "--compare",
    tinyModel({}, "dense-tiny"),
    "--compare-threads",
    "1",
  );
  expect(models.map((m) => [m.dtype, m.threads])).toEqual([
    ["int8", models[0].threads],
    ["int8", 1],
  ]);
  expect(models[1].parameters.total).toBe(measure(fixture("dense-tiny")).parameters.total);
  expect(comparison?.prompt.map((p) => p.tokens)).toEqual([3, 9]);
  const [a, b] = models.map((m) => m.generation[0].tokens_per_second.values);
  expect(comparison?.generation[0].ratio.values).toEqual([b[0] / a[0], b[1] / a[1]]);
});

test("a profile has the time of each op, and how fast those with matrices read them", async () => {
  const { models } = await bench("-m", tinyModel(), "--profile", "--compare-dtype", "int4");
  for (const { profile = [] } of models) {
    expect(profile.map((p) => [p.phase, p.tokens])).toEqual([
      ["prompt", 3],
      ["prompt", 9],
      ["generation", 4],
    ]);
    for (const { ops } of profile) {
      expect(ops.map((o) => o.op)).toEqual(expect.arrayContaining(["linear", "groupedLinear", "pagedAttention", "route"]));
      expect(ops.reduce((sum, o) => sum + o.share, 0)).toBeCloseTo(1, 1);
      for (const o of ops) {
        const multiplies = ["linear", "gatedLinear", "groupedLinear", "groupedGatedLinear", "route"].includes(o.op);
        expect(o.bytes_per_second !== null, o.op).toBe(multiplies);
        expect(o.limit_share !== null, o.op).toBe(multiplies);
      }
    }
  }
});

test("text and a plot", async () => {
  const svg = join(temporary(), "speed.svg");
  const { code, out, err } = await run(["bench", ...quick, "-m", tinyModel(), "--profile", "--compare-threads", "1", "--svg", svg]);
  expect(code, err).toBe(0);
  for (const text of [
    "prompt of 9",
    "generation after 4",
    "of reading",
    "fp32 peak",
    "groupedLinear",
    "GB/s",
    "relative to",
    "peak memory",
  ])
    expect(out).toContain(text);
  expect(err).toBe(`wrote ${svg}\n`);
  const plot = readFileSync(svg, "utf8");
  expect(plot).toMatch(/^<svg [\s\S]*<\/svg>\n$/);
  expect(plot).toContain("after 4 tokens");
  expect(plot).not.toMatch(/NaN|undefined/);
});

test("lengths are cut to the model's positions, with a notice", async () => {
  const config = JSON.parse(readFileSync("test/fixtures/goldens/moe-tiny/config.json", "utf8")) as object;
  const model = tinyModel({ "config.json": { ...config, max_position_embeddings: 8 } });
  const { code, out, err } = await run(["bench", ...quick, "--json", "-m", model, "--contexts", "4,6,9"]);
  expect(code, err).toBe(0);
  expect(err).toContain("prompts of 9 cut to 7: the longest sequence is 8 tokens");
  expect(err).toContain("contexts of 6, 9 cut to 4");
  const { models } = JSON.parse(out) as BenchResult;
  expect(models[0].prompt.map((p) => p.tokens)).toEqual([3, 7]);
  expect(models[0].generation.map((g) => g.tokens)).toEqual([4]);
  expect(await fault("-m", model, "--new-tokens", "8")).toBe("--new-tokens 8 does not fit: the longest sequence is 8 tokens");
});

test("what cannot be measured is a one-line error", async () => {
  expect(await fault("-m", "/no/such/folder")).toContain("no such folder");
  expect(await fault("-m", tinyModel(), "--compare", "/no/such/folder")).toContain("no such folder");
  expect(await fault("-m", tinyModel({ "config.json": "{" }))).toMatch(/config\.json: broken JSON/);
  expect(await fault("--prompt-lengths", "12,x")).toContain("'x' is not a whole number of at least 1; it must be like 128,512.");
  expect(await fault("--contexts", "0")).toContain("'0' is not a whole number");
  expect(await fault("--repeat", "0")).toContain("must be a whole number of at least 1");
  expect(await fault("--threads", "5000")).toContain("from 1 to 1024");
});

test("every instruction set has limits above zero", async () => {
  for (const isa of instructionSets())
    for (const limit of Object.values(await machineLimits(isa, 1))) expect(limit, isa).toBeGreaterThan(1e8);
  expect(() => machineLimits("no-such", 1)).toThrow("no-such");
});

test("bytes read per token count only the chosen experts, and the whole head", () => {
  const config = fixture("moe-tiny");
  const all = parameters(config);
  const float = workOf(
    config,
    all.map(({ name, shape }) => ({ name, shape, dtype: "f32" })),
  );
  expect(float.tokenBytes).toBe(4 * measure(config).parameters.active); // tied: the embedding is the head
  expect(float.weightBytes).toBe(measure(config).memory.fp32);
  const int4 = workOf(
    config,
    all.map((p) => ({ name: p.name, shape: p.shape, dtype: parameterDtype(p, "int4") })),
  );
  expect(int4.weightBytes).toBe(measure(config).memory.int4);
  const limits = { readBytesPerSecond: int4.tokenBytes * 10, int8OpsPerSecond: 1e9, floatOpsPerSecond: 1e9 };
  expect(generationLimit(int4, limits)).toBe(10);
  const { tokenOperations: t, headOperations: h } = int4;
  expect(h).toEqual({ int8: 2 * config.vocabSize * config.hiddenSize, float: 0 });
  expect(promptLimit(int4, limits, 5)).toBeCloseTo(5e9 / (5 * (t.int8 + t.float) + h.int8), 6);
});

test("medians and ratios", () => {
  expect(spread([3, 1, 2])).toEqual({ median: 2, least: 1, most: 3, values: [3, 1, 2] });
  expect(spread([4, 1]).median).toBe(2.5);
  expect(ratios(spread([1, 2]), spread([2, 8])).values).toEqual([2, 4]);
});
