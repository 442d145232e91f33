/**
 * Speed on an NVIDIA GPU at the true shape of ERNIE-4.5-21B-A3B, with random weights: `node bench/gpu.mjs`. Prints a table beside the card's own
 * limits, measured in the same run; with --rival, also Hugging Face transformers on the same card, where python3 has PyTorch.
 *
 *   --formats bf16,int8,int4,fp8   --layers 28   --rounds 5   --users 1,32,256   --prompts 8192   --long 131072   --folder DIR   --json FILE
 *   --only one,context,users,prompt,long,rival
 *
 * Two layers are made and written, the dense one and a mixture; all other layers are loaded from the mixture's bytes, each to memory of its own.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { quantize } from "../dist/api/quantize.js";
import { cudaBackend, cudaSystem } from "../dist/backend/cuda/cuda.js";
import { openCheckpoint } from "../dist/checkpoint/checkpoint.js";
import { locate } from "../dist/checkpoint/names.js";
import { Engine } from "../dist/engine/engine.js";
import { GREEDY } from "../dist/engine/sampling.js";
import { readConfig } from "../dist/model/config.js";
import { ernie } from "../dist/model/ernie.js";
import { freshPrompts } from "./prompts.mjs";

const { values: flags } = parseArgs({
  options: {
    formats: { type: "string", default: "bf16,int8,int4" },
    layers: { type: "string", default: "28" },
    rounds: { type: "string", default: "5" },
    users: { type: "string", default: "32,256" },
    folder: { type: "string" },
    json: { type: "string" },
    prompts: { type: "string", default: "512,4096,8192" },
    long: { type: "string", default: "131072" },
    only: { type: "string", default: "one,context,users,prompt,long,profile" },
    kv: { type: "string", default: "bf16" },
  },
});
const [layers, rounds] = [Number(flags.layers), Number(flags.rounds)];
const numbers = (list) => list.split(",").filter(Boolean).map(Number);
const only = new Set(flags.only.split(","));
const KV = { fp32: "f32", fp16: "f16", bf16: "bf16", int8: "int8kv", fp8: "fp8kv" };

const system = cudaSystem();
if (system.refused) {
  console.error(`bench/gpu.mjs: ${system.refused}`);
  process.exit(1);
}
const median = (list) => [...list].sort((a, b) => a - b)[list.length >> 1];
const seconds = (from) => (performance.now() - from) / 1000;
const folder = flags.folder ?? mkdtempSync(join(existsSync("/dev/shm") ? "/dev/shm" : tmpdir(), "mixtape-gpu-"));
const results = [];
console.log(
  `${system.cards[0].name}, driver for CUDA ${system.driver}, ${new Date().toISOString().slice(0, 10)}, ${layers} layers, cache ${flags.kv}, medians of ${rounds}`,
);

for (const format of flags.formats.split(",")) {
  const at = join(folder, format);
  const made = performance.now();
  if (!existsSync(join(at, "config.json"))) await quantize("random:21b-a3b", at, { dtype: format, layers: 2 });
  console.log(`\n${format}: two layers made in ${seconds(made).toFixed(1)} s`);
  await measure(format, at);
  if (!flags.folder && !only.has("rival")) rmSync(at, { recursive: true });
}
if (only.has("rival")) rival();
if (!flags.folder) rmSync(folder, { recursive: true, force: true });
if (flags.json)
  writeFileSync(flags.json, `${JSON.stringify({ card: system.cards[0], driver: system.driver, layers, results }, null, 1)}\n`);

/** transformers on the same card, in a process of its own; the ratios are with our bfloat16. */
function rival() {
  const config = join(folder, flags.formats.split(",")[0], "config.json");
  const ran = spawnSync("python3", [join(import.meta.dirname, "rivals", "gpu.py"), config, String(layers)], { encoding: "utf8" });
  const line = ran.stdout?.trim().split("\n").at(-1) ?? "";
  if (ran.status !== 0 || !line.startsWith("{")) {
    console.log(`\ntransformers did not run: ${ran.error?.message ?? ran.stderr.trim().split("\n").at(-1)}`);
    return;
  }
  const theirs = JSON.parse(line);
  results.push(theirs);
  console.log(`\ntransformers ${theirs.transformers}, torch ${theirs.torch}, bf16`);
  const ours = results.find((r) => r.format === "bf16") ?? {};
  const compare = (name, their, our, ratio) =>
    console.log(`  ${name.padEnd(34)}${their}${our === undefined ? "" : `; ours is ${ratio.toFixed(1)} x as fast`}`);
  compare("one user after 128", `${theirs.one_ms.toFixed(1)} ms a token`, ours.one128, theirs.one_ms / ours.one128);
  compare("256 users", `${theirs.users256.toFixed(0)} tokens/s`, ours.users256, ours.users256 / theirs.users256);
  compare("prompt of 4096", `${theirs.prompt4096_ms.toFixed(1)} ms`, ours.prompt4096, theirs.prompt4096_ms / ours.prompt4096);
}

async function measure(format, at) {
  const checkpoint = await openCheckpoint(at);
  const { config: raw } = checkpoint;
  const config = readConfig({ ...raw, num_hidden_layers: layers, moe_layer_end_index: layers - 1 });
  const model = ernie(config);
  const found = locate(ernie(readConfig(raw)).parameters, checkpoint).sources;
  const sources = model.parameters.map((p) => {
    const like = p.name.replace(/layers\.(\d+)\./, (name, i) => (Number(i) < 2 ? name : "layers.1."));
    const { dtype, parts } = found.get(like);
    return { name: p.name, stored: dtype, dtype, shape: p.shape, parts };
  });
  const start = performance.now();
  const backend = cudaBackend();
  const weights = await backend.load(sources);
  const loaded = seconds(start);
  const dtypes = new Map(sources.map((s) => [s.name, s.dtype]));
  const engine = new Engine({
    model,
    backend,
    weights,
    dtypeOf: (name) => dtypes.get(name),
    kvDtype: KV[flags.kv],
    prefixCache: false,
    maxSequences: 1024,
  });
  const prompts = freshPrompts({ vocabulary: config.vocabSize, seed: 1 });
  let steps = [];
  engine.onStep = (report) => steps.push({ ...report, at: performance.now() });

  /** Runs so many prompts at once; the times of their tokens. */
  async function run(count, tokens, newTokens) {
    steps = [];
    const begun = performance.now();
    const users = Array.from({ length: count }, async () => {
      const times = [];
      for await (const _ of engine.submit({ tokens: prompts.ids(tokens), sampling: GREEDY, maxNewTokens: newTokens }))
        times.push(performance.now());
      return times;
    });
    const times = await Promise.all(users);
    return { first: Math.max(...times.map((t) => t[0])) - begun, times };
  }
  /** Milliseconds between the ends of steps in which all users generate and none reads a prompt. */
  const between = (count) =>
    steps.flatMap((s, i) =>
      i > 0 && s.sequences === count && s.promptTokens === 0 && steps[i - 1].promptTokens === 0 ? [s.at - steps[i - 1].at] : [],
    );

  await run(1, 16, 2);
  const limits = await backend.limits();
  const row = { format, loadedSeconds: loaded, firstTokenSeconds: seconds(start), weightBytes: weights.ownedBytes, limits };
  results.push(row);
  const say = (name, text) => console.log(`  ${name.padEnd(34)}${text}`);
  say(
    "limits",
    `copy ${(limits.copyBytesPerSecond / 1e12).toFixed(2)} TB/s, read ${(limits.readBytesPerSecond / 1e12).toFixed(2)} TB/s, bf16 ${(limits.bf16FlopsPerSecond / 1e12).toFixed(0)} TFLOP/s, fp8 ${(limits.fp8FlopsPerSecond / 1e12).toFixed(0)}`,
  );
  say(
    "loaded, first token",
    `${loaded.toFixed(2)} s (${(weights.ownedBytes / loaded / 1e9).toFixed(1)} GB/s), ${row.firstTokenSeconds.toFixed(2)} s`,
  );

  if (only.has("one") || only.has("context"))
    for (const context of [...(only.has("one") ? [128] : []), ...(only.has("context") ? [16384] : [])]) {
      await run(1, context, 8);
      const all = [];
      for (let r = 0; r < rounds; r++) {
        await run(1, context, 64);
        all.push(median(between(1)));
      }
      row[`one${context}`] = median(all);
      say(
        `one user after ${context}`,
        `${median(all).toFixed(3)} ms a token (${Math.min(...all).toFixed(3)} to ${Math.max(...all).toFixed(3)})`,
      );
    }
  if (only.has("users"))
    for (const count of numbers(flags.users)) {
      const context = count >= 256 ? 1024 : 128;
      await run(count, 16, 4);
      await run(count, context, 48);
      const ms = median(between(count));
      row[`users${count}`] = (1000 * count) / ms;
      say(
        `${count} users after ${context}`,
        `${((1000 * count) / ms).toFixed(0)} tokens/s (${ms.toFixed(2)} ms a step, ${between(count).length} steps)`,
      );
    }
  if (only.has("prompt"))
    for (const tokens of numbers(flags.prompts)) {
      await run(1, tokens, 1);
      const all = [];
      for (let r = 0; r < rounds; r++) all.push((await run(1, tokens, 1)).first);
      row[`prompt${tokens}`] = median(all);
      say(`prompt of ${tokens}`, `${median(all).toFixed(1)} ms (${((tokens / median(all)) * 1000).toFixed(0)} tokens/s)`);
    }
  if (only.has("long") && format === "bf16") {
    const tokens = Math.min(Number(flags.long), config.maxPositions - 1);
    const { first } = await run(1, tokens, 1);
    row.long = first / 1000;
    say(`prompt of ${tokens}`, `${(first / 1000).toFixed(2)} s`);
  }
  if (only.has("profile")) {
    backend.profile(true);
    for (const [name, count, tokens, newTokens] of [
      ["one user", 1, 128, 9],
      ["prompt of 8192", 1, 8192, 1],
      ["32 users", 32, 128, 9],
    ]) {
      const before = engine.profile();
      await run(count, tokens, newTokens);
      const ops = [...engine.profile()].map(([op, { seconds: s }]) => [op, s - (before.get(op)?.seconds ?? 0)]).sort((a, b) => b[1] - a[1]);
      const total = ops.reduce((sum, [, s]) => sum + s, 0);
      say(
        `profile, ${name}`,
        `${ops
          .filter(([, s]) => s > total / 100)
          .map(([op, s]) => `${op} ${((100 * s) / total).toFixed(0)} %`)
          .join(", ")} of ${(1000 * total).toFixed(1)} ms`,
      );
    }
    backend.profile(false);
  }
  await engine.dispose();
}
