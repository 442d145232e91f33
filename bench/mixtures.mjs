/**
 * Measures the claims about mixtures of experts: speed compared with a dense model of the same number of parameters, the cost per
 * token with more experts and in other formats, and memory and time of long inputs. Uses random weights of the real widths. Writes
 * the tables and plots of docs/mixtures.md; results are kept in bench/results/mixtures.json, so parts can be measured separately.
 *
 *   npm run build && node bench/mixtures.mjs [--folder DIR] [--only dense,experts,formats,lengths,contexts] [--rounds 5] [--big MODEL]
 *
 * --folder keeps the models (20 GB); --big is the model for `lengths` and `contexts` (default: one of the 21B's shape in int4 is
 * created, 12 GB). Without --only everything is measured; --only none just rewrites the document.
 *
 * What keeps rounds honest: models take turns in every round, every prompt is new, warm-up included, and the models have no prefix
 * cache. Only `contexts` caches the context, since it measures just the time between new tokens.
 */
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { cpus, tmpdir, totalmem } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import * as echarts from "echarts";
import { machineLimits } from "../dist/backend/native.js";
import { measureInTurns } from "../dist/cli/rounds.js";
import { Subject } from "../dist/cli/subject.js";
import { GREEDY } from "../dist/engine/sampling.js";
import { AutoModelForCausalLM, quantize } from "../dist/index.js";
import { readConfig } from "../dist/model/config.js";
import { parameters } from "../dist/model/ernie.js";
import { PRESETS } from "../dist/model/presets.js";
import { freshPrompts } from "./prompts.mjs";

const { values: flags } = parseArgs({
  options: {
    folder: { type: "string" },
    only: { type: "string", default: "dense,experts,formats,lengths,contexts" },
    rounds: { type: "string", default: "5" },
    "new-tokens": { type: "string", default: "24" },
    big: { type: "string" },
    threads: { type: "string", default: "2" },
  },
});
const rounds = Number(flags.rounds);
const newTokens = Number(flags["new-tokens"]);
const options = { threads: Number(flags.threads) };
const folder = flags.folder ?? mkdtempSync(join(tmpdir(), "mixtures-"));
const root = fileURLToPath(new URL("../", import.meta.url));
const store = join(root, "bench/results/mixtures.json");
const results = existsSync(store) ? JSON.parse(readFileSync(store, "utf8")) : {};
const signal = new AbortController().signal;
const count = (config) =>
  parameters(readConfig(config)).reduce((sum, p) => sum + (p.experts ?? 1) * product(p.experts ? p.shape.slice(1) : p.shape), 0);
const product = (list) => list.reduce((a, b) => a * b, 1);

/** Creates a model of this shape in a format, unless the folder already has it. */
async function make(name, config, dtype) {
  const out = join(folder, `${name}-${dtype}`);
  if (existsSync(join(out, "model.safetensors"))) return out;
  mkdirSync(folder, { recursive: true });
  const shape = join(folder, `${name}.json`);
  writeFileSync(shape, JSON.stringify(config));
  process.stderr.write(`creating ${name} in ${dtype}\n`);
  await quantize(`random:${shape}`, out, { dtype });
  return out;
}

function mixture(layers, experts = 64) {
  return { ...PRESETS["21b-a3b"], num_hidden_layers: layers, moe_layer_end_index: layers - 1, moe_num_experts: experts };
}

/** A dense model with as many parameters as the mixture: every token passes through all of its feed-forward layers. */
function dense(like) {
  const base = { ...PRESETS["0.3b"], ...like, architectures: ["Ernie4_5ForCausalLM"], model_type: "ernie4_5" };
  const wanted = count(like);
  const width = (n) => ({ ...base, intermediate_size: n });
  const each = count(width(128)) - count(width(64));
  return width(64 + 64 * Math.round((wanted - count(width(64))) / each));
}

/** Tokens per second of several models, measured in turns, and the ratio of each to the first, pair by pair. */
async function compare(settings, { prompts = [512], contexts = [128] } = {}) {
  const measured = await measureInTurns(
    settings.map(({ folder: model, options: own }) => ({ model, folder: model, options: { ...options, ...own } })),
    { promptLengths: prompts, contexts, newTokens, repeat: rounds, profile: false },
    signal,
    { onStep: (what) => process.stderr.write(`  ${what}\n`), onCut: (what) => process.stderr.write(`${what}\n`) },
  );
  const speeds = (m, kind) => m[kind][0].tokens_per_second;
  return measured.map((m, i) => ({
    label: settings[i].label,
    ...settings[i].facts,
    parameters: m.parameters.total,
    active: m.parameters.active,
    weightBytes: m.weight_bytes,
    tokenBytes: m.weight_bytes_per_token,
    readBytesPerSecond: m.limits.read_bytes_per_second.median,
    prompt: speeds(m, "prompt"),
    generation: speeds(m, "generation"),
    promptRatio: pairs(speeds(measured[0], "prompt"), speeds(m, "prompt")),
    generationRatio: pairs(speeds(measured[0], "generation"), speeds(m, "generation")),
  }));
}

function pairs(a, b) {
  const each = a.values.map((x, i) => b.values[i] / x).sort((x, y) => x - y);
  return { median: each[each.length >> 1], least: each[0], most: each.at(-1) };
}

const PARTS = {
  async dense() {
    const like = mixture(12);
    return compare([
      { label: "dense", folder: await make("dense-12", dense(like), "int4") },
      { label: "mixture", folder: await make("mixture-12", like, "int4") },
    ]);
  },
  async experts() {
    const settings = [];
    for (const experts of [16, 32, 64, 128])
      settings.push({
        label: `${experts} experts`,
        facts: { experts },
        folder: await make(`experts-${experts}`, mixture(4, experts), "int4"),
      });
    return compare(settings);
  },
  async formats() {
    const settings = [];
    for (const dtype of ["bf16", "int8", "int4"]) settings.push({ label: dtype, folder: await make("formats-4", mixture(4), dtype) });
    return compare(settings);
  },
  /** The prefix cache holds the context, so that contexts can take turns without being processed again in each round. */
  async contexts() {
    const model = flags.big ?? (await make("21b-a3b", PRESETS["21b-a3b"], "int4"));
    const { engine, config } = await AutoModelForCausalLM.from_pretrained(model, { ...options, kv_cache_tokens: 9216 });
    const contexts = [16, 512, 1024, 2048, 4096, 8192];
    const ids = freshPrompts({ vocabulary: config.vocabSize }).ids(contexts.at(-1));
    const gap = async (context) => {
      const times = [];
      for await (const _ of engine.submit({ tokens: ids.slice(0, context), sampling: GREEDY, maxNewTokens: newTokens }))
        times.push(performance.now());
      const gaps = times.slice(1).map((t, i) => t - times[i]);
      return gaps.sort((a, b) => a - b)[gaps.length >> 1];
    };
    await gap(ids.length); // computes the whole context once
    const measured = new Map(contexts.map((context) => [context, []]));
    for (let round = 0; round < rounds; round++)
      for (const context of contexts) measured.get(context).push({ own: await gap(context), none: await gap(16) });
    await engine.dispose();
    return contexts.slice(1).map((tokens) => {
      const pairs = measured.get(tokens);
      const slower = pairs.map(({ own, none }) => own / none - 1).sort((a, b) => a - b);
      const own = pairs.map((p) => p.own).sort((a, b) => a - b);
      return { tokens, ms: own[own.length >> 1], slower: { median: slower[slower.length >> 1], least: slower[0], most: slower.at(-1) } };
    });
  },
  async lengths() {
    const model = flags.big ?? (await make("21b-a3b", PRESETS["21b-a3b"], "int4"));
    const subject = await Subject.start({ model, folder: model, options: { ...options, kv_cache_tokens: 17408 } }, signal);
    try {
      let seed = 0;
      for (let i = 0; i < 5; i++) await subject.ask({ kind: "prompt", tokens: 512, seed: ++seed }); // until all weights are mapped
      const list = [];
      for (const tokens of [512, 1024, 2048, 4096, 8192, 16384]) {
        process.stderr.write(`  ${tokens} tokens\n`);
        const short = await subject.ask({ kind: "prompt", tokens: 512, seed: ++seed }); // for the ratio
        const seconds = await subject.ask({ kind: "prompt", tokens, seed: ++seed });
        const { privateBytes } = await subject.ask({ kind: "memory" });
        list.push({ tokens, seconds, ratio: seconds / tokens / (short / 512), privateBytes });
      }
      return list;
    } finally {
      subject.stop();
    }
  },
};

for (const part of flags.only.split(",").filter((name) => name !== "none")) {
  if (!PARTS[part]) throw new Error(`--only ${part}: the parts are ${Object.keys(PARTS).join(", ")}, none`);
  process.stderr.write(`${part}\n`);
  const limits = await machineLimits("", options.threads);
  const machine = { cpu: cpus()[0].model.trim(), cores: cpus().length, memoryBytes: totalmem(), ...limits };
  results[part] = { date: new Date().toISOString().slice(0, 10), threads: options.threads, rounds, machine, rows: await PARTS[part]() };
  mkdirSync(join(root, "bench/results"), { recursive: true });
  writeFileSync(`${store}.tmp`, `${JSON.stringify(results, null, 1)}\n`);
  renameSync(`${store}.tmp`, store);
}
if (!flags.folder) rmSync(folder, { recursive: true, force: true });
writeFileSync(join(root, "docs/mixtures.md"), document());

function document() {
  const lines = [
    "# The claims about mixtures of experts, measured",
    "",
    "Generated by `node bench/mixtures.mjs`: random weights in the widths of ERNIE-4.5-21B-A3B (they take the same time as trained ones),",
    "with as many layers as fit. Numbers are medians over rounds in which the models take turns, with the minimum and maximum in brackets.",
  ];
  const gb = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;
  const g = (n) => `${(n / 1e9).toFixed(2)} G`;
  const speed = (s) => `${s.median.toFixed(1)} (${s.least.toFixed(1)} to ${s.most.toFixed(1)})`;
  const ratio = (r) => `${r.median.toFixed(2)} x (${r.least.toFixed(2)} to ${r.most.toFixed(2)})`;
  const say = (part, title, text, head, row, chart) => {
    const found = results[part];
    if (!found) return;
    const { date, threads, machine, rows } = found;
    lines.push("", `## ${title}`, "", text, "");
    lines.push(`| ${head.join(" | ")} |`, `|${" --- |".repeat(head.length)}`, ...rows.map((r) => `| ${row(r).join(" | ")} |`), "");
    if (chart) {
      const name = `mixtures-${part}.svg`;
      writeFileSync(join(root, "docs", name), plot(chart(rows)));
      lines.push(`![${title}](${name})`, "");
    }
    lines.push(
      `<sup>${date}, ${machine.cpu}, ${threads} threads; reading ${(machine.readBytesPerSecond / 1e9).toFixed(0)} GB/s, int8 ${(machine.int8OpsPerSecond / 1e9).toFixed(0)} Gop/s measured at the start.</sup>`,
    );
  };
  const speedHead = [
    "",
    "parameters",
    "active",
    "file",
    "read per token",
    "prompt of 512, tokens/s",
    "generation, tokens/s",
    "prompt, ratio",
    "generation, ratio",
  ];
  const speedRow = (r) => [
    r.label,
    g(r.parameters),
    g(r.active),
    gb(r.weightBytes),
    gb(r.tokenBytes),
    speed(r.prompt),
    speed(r.generation),
    ratio(r.promptRatio),
    ratio(r.generationRatio),
  ];
  const bars = (title, name) => (rows) => ({
    title: { text: title },
    xAxis: { type: "category", data: rows.map((r) => r.label) },
    yAxis: { type: "value", name: "tokens/s" },
    series: [{ type: "bar", data: rows.map((r) => Number(r[name].median.toFixed(2))), label: { show: true, position: "top" } }],
  });
  say(
    "dense",
    "The same number of parameters, dense and as a mixture",
    "Twelve layers, int4; the dense model's feed-forward layers are as wide as all experts together.",
    speedHead,
    speedRow,
    bars("Generation with the same number of parameters", "generation"),
  );
  say(
    "experts",
    "The cost per token with more experts",
    "Four layers, int4, six active experts: more experts need more memory, but no more work per token. (The tokens of a prompt spread over more experts, so each expert's weights are read for fewer rows.)",
    speedHead,
    speedRow,
    bars("Generation with six of n experts active", "generation"),
  );
  say("formats", "Formats of the weights", "Four layers with 64 experts.", speedHead, speedRow, bars("Generation by format", "generation"));
  say(
    "lengths",
    "Memory and time of long inputs",
    "The shape of the 21B model, 28 layers, int4 with an int8 KV cache, processed in steps of 512 tokens. Private memory is everything but the mapped file: cache, activations, the process. The ratio is the time per token relative to a prompt of 512 tokens processed just before.",
    ["prompt", "seconds", "tokens/s", "time per token, ratio to 512", "private memory"],
    (r) => [
      r.tokens.toLocaleString("en"),
      r.seconds.toFixed(1),
      (r.tokens / r.seconds).toFixed(1),
      `${r.ratio.toFixed(2)} x`,
      `${(r.privateBytes / 2 ** 30).toFixed(2)} GiB`,
    ],
    (rows) => ({
      title: { text: "Prompt speed and private memory by prompt length" },
      xAxis: { type: "category", data: rows.map((r) => r.tokens.toLocaleString("en")), name: "tokens" },
      yAxis: [
        { type: "value", name: "tokens/s" },
        { type: "value", name: "GiB" },
      ],
      legend: { bottom: 0 },
      series: [
        { type: "line", name: "prompt, tokens/s", data: rows.map((r) => Number((r.tokens / r.seconds).toFixed(1))) },
        { type: "line", name: "private memory, GiB", yAxisIndex: 1, data: rows.map((r) => Number((r.privateBytes / 2 ** 30).toFixed(2))) },
      ],
    }),
  );
  say(
    "contexts",
    "Generation after long contexts",
    "The same model: the time per token relative to that after 16 tokens, measured in turns in each round.",
    ["context", "ms per token", "more than after 16 tokens"],
    (r) => [
      r.tokens.toLocaleString("en"),
      r.ms.toFixed(1),
      `${(100 * r.slower.median).toFixed(1)} % (${(100 * r.slower.least).toFixed(1)} to ${(100 * r.slower.most).toFixed(1)})`,
    ],
  );
  return `${lines.join("\n")}\n`;
}

function plot(option) {
  const chart = echarts.init(null, null, { renderer: "svg", ssr: true, width: 760, height: 380 });
  chart.setOption({ animation: false, backgroundColor: "#ffffff", color: ["#8c2981", "#f7705c"], ...option });
  const svg = chart.renderToSVGString();
  chart.dispose();
  return `${svg}\n`;
}
