/**
 * Speed beside another engine, llama.cpp through node-llama-cpp: the same weights, the same threads, alternating in one run.
 * Every model is a folder (mixtape) or a .gguf file (node-llama-cpp; `mixtape export` writes one of the same weights). Prints
 * medians, and the ratio of each to the last .gguf, round by round.
 *
 *   npm run build && npm install --no-package-lock --prefix bench/rivals && node bench/rivals/speed.mjs MODEL... MODEL.gguf [--prompts 128,512] [--contexts 128] [--new-tokens 24] [--rounds 3] [--threads 2] [--apart] [--json]
 *
 * With --apart only one model is loaded at a time, its file read into the page cache first: for models of which memory holds
 * but one. Each round then loads every model anew.
 */
import { fork } from "node:child_process";
import { createReadStream, readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    prompts: { type: "string", default: "128,512" },
    contexts: { type: "string", default: "128" },
    "new-tokens": { type: "string", default: "24" },
    rounds: { type: "string", default: "3" },
    threads: { type: "string", default: "2" },
    apart: { type: "boolean", default: false },
    json: { type: "boolean", default: false },
  },
});
const threads = Number(values.threads);
const newTokens = Number(values["new-tokens"]);
const list = (text) => text.split(",").map(Number);
const [prompts, contexts] = [list(values.prompts), list(values.contexts)];
const isRival = (model) => model.endsWith(".gguf");

/** Starts a model: run(ids) streams tokens without end. */
async function open(model) {
  if (!isRival(model)) {
    const [{ GREEDY }, { AutoModelForCausalLM }] = await Promise.all([
      import("../../dist/engine/sampling.js"),
      import("../../dist/index.js"),
    ]);
    const ours = await AutoModelForCausalLM.from_pretrained(model, { threads });
    return {
      vocabulary: ours.config.vocabSize,
      run: (ids) => ours.engine.submit({ tokens: ids, sampling: GREEDY, maxNewTokens: newTokens + 1 }),
    };
  }
  const { getLlama, LlamaLogLevel } = await import("node-llama-cpp");
  const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads });
  const theirs = await llama.loadModel({ modelPath: model, gpuLayers: 0 });
  const contextSize = Math.max(...prompts, ...contexts) + newTokens + 64;
  const context = await theirs.createContext({ contextSize, batchSize: 512, threads });
  return {
    async *run(ids) {
      const sequence = context.getSequence();
      try {
        let made = 0;
        for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
          yield token;
          if (++made > newTokens) break;
        }
      } finally {
        sequence.dispose();
      }
    },
  };
}

/** Seconds to the first token, and the median of those between the others. */
async function measure(engine, ids) {
  const start = performance.now();
  const times = [];
  for await (const _ of engine.run(ids)) times.push(performance.now());
  const gaps = times.slice(1).map((t, i) => (t - times[i]) / 1000);
  return { first: (times[0] - start) / 1000, gap: median(gaps) };
}

/** Everything once: tokens a second by what was measured. */
async function round(engine) {
  const ids = (n) => Array.from({ length: n }, (_, i) => 20 + ((i * 7919) % 20000));
  const figures = {};
  for (const n of prompts) figures[`prompt of ${n}`] = n / (await measure(engine, ids(n))).first;
  for (const n of contexts) figures[`generation after ${n}`] = 1 / (await measure(engine, ids(n))).gap;
  return figures;
}

function median(all) {
  const sorted = [...all].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

/** Reads a model's file once, so that loading does not wait for the disk. */
async function warm(model) {
  const files = isRival(model) ? [model] : readdirSync(model).flatMap((name) => (name.endsWith(".safetensors") ? [join(model, name)] : []));
  for (const file of files) for await (const _ of createReadStream(file, { highWaterMark: 1 << 22 }));
}

/** A process for one model, which answers every message with a round. */
function start(model) {
  const child = fork(fileURLToPath(import.meta.url), process.argv.slice(2), { env: { ...process.env, SPEED_MODEL: model } });
  const answer = () =>
    new Promise((resolve, reject) => {
      child.once("message", resolve);
      child.once("exit", (code) => reject(new Error(`${model}: its process ended with ${code}`)));
    });
  return {
    ready: answer(),
    ask: () => {
      child.send("round");
      return answer();
    },
    stop: () => child.kill("SIGKILL"),
  };
}

async function main() {
  if (positionals.filter(isRival).length !== 1 || positionals.length < 2) throw new Error("usage: speed.mjs MODEL... MODEL.gguf");
  const results = new Map(positionals.map((model) => [model, []]));
  const held = new Map();
  for (let r = 0; r < Number(values.rounds); r++)
    for (const model of positionals) {
      if (values.apart) await warm(model);
      const child = held.get(model) ?? start(model);
      await child.ready;
      if (!held.has(model)) await child.ask(); // warms up
      results.get(model).push(await child.ask());
      if (values.apart) child.stop();
      else held.set(model, child);
    }
  for (const child of held.values()) child.stop();
  const rival = results.get(positionals.find(isRival));
  const table = Object.keys(rival[0]).flatMap((what) =>
    positionals.map((model) => {
      const each = results.get(model).map((figures) => figures[what]);
      const ratios = each.map((x, i) => x / rival[i][what]);
      return { what, model, tokensPerSecond: median(each), ratio: median(ratios), least: Math.min(...ratios), most: Math.max(...ratios) };
    }),
  );
  if (values.json) console.log(JSON.stringify({ threads, rounds: Number(values.rounds), table }, null, 1));
  else
    for (const { what, model, tokensPerSecond, ratio, least, most } of table)
      console.log(
        `${what.padEnd(24)} ${(isRival(model) ? `node-llama-cpp ${model}` : `mixtape ${model}`).padEnd(48)} ${tokensPerSecond.toFixed(2).padStart(8)} tokens/s   ${ratio.toFixed(2)} x (${least.toFixed(2)} to ${most.toFixed(2)})`,
      );
}

if (process.env.SPEED_MODEL === undefined) await main();
else {
  const engine = await open(process.env.SPEED_MODEL);
  process.on("message", () => {
    round(engine).then((figures) => process.send(figures));
  });
  process.on("disconnect", () => process.kill(process.pid, "SIGKILL"));
  process.send("ready");
}
