/**
 * Speed compared with another engine, llama.cpp through node-llama-cpp: the same weights and threads, in turns in one run.
 * Every model is a folder (mixtape) or a .gguf file (node-llama-cpp; `mixtape export` writes one of the same weights). Prints
 * medians, and the ratio of each to the .gguf, round by round.
 *
 *   npm run build && npm install --no-package-lock --prefix bench/rivals
 *   node bench/rivals/speed.mjs MODEL... MODEL.gguf [--prompts 128,512] [--contexts 128] [--new-tokens 24] [--rounds 3] [--threads 2] [--apart] [--seed 1] [--json]
 *
 * With --apart only one model is loaded at a time, its file read into the page cache first: for models of which only one fits
 * in memory. Each round then loads every model again.
 *
 * What keeps rounds honest: every prompt of every round is new, warm-up included, so that no prefix cache answers for an engine;
 * all engines get the same prompts of a round. Generation is the time between tokens, without the prompt's.
 */
import { createReadStream, readdirSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { median } from "../figures.mjs";
import { freshPrompts } from "../prompts.mjs";
import { startSubject } from "../subject.mjs";

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    prompts: { type: "string", default: "128,512" },
    contexts: { type: "string", default: "128" },
    "new-tokens": { type: "string", default: "24" },
    rounds: { type: "string", default: "3" },
    threads: { type: "string", default: "2" },
    seed: { type: "string", default: "1" },
    apart: { type: "boolean", default: false },
    json: { type: "boolean", default: false },
  },
});
const threads = Number(flags.threads);
const newTokens = Number(flags["new-tokens"]);
const rounds = Number(flags.rounds);
const list = (text) => text.split(",").map(Number);
const [lengths, contexts] = [list(flags.prompts), list(flags.contexts)];
const root = fileURLToPath(new URL("../..", import.meta.url));
const isRival = (model) => model.endsWith(".gguf");
if (positionals.filter(isRival).length !== 1 || positionals.length < 2) throw new Error("usage: speed.mjs MODEL... MODEL.gguf");

function start(model) {
  if (!isRival(model)) return startSubject({ root, model, options: { threads } });
  const contextSize = Math.max(...lengths, ...contexts) + newTokens + 64;
  return startSubject({ model: resolve(model), options: { threads, contextSize } }, new URL("llama.mjs", import.meta.url));
}

/** Tokens per second of each measurement, each with its own prompt. */
async function measure({ ask }, prompts) {
  const figures = {};
  for (const tokens of prompts.read) {
    const { answers } = await ask({ prompts: [tokens], newTokens: 1 });
    figures[`prompt of ${tokens.length}`] = (tokens.length * 1000) / answers[0].times[0];
  }
  for (const tokens of prompts.continued) {
    const { answers } = await ask({ prompts: [tokens], newTokens: newTokens + 1 });
    const { times } = answers[0];
    figures[`generation after ${tokens.length}`] = 1000 / median(times.slice(1).map((t, i) => t - times[i]));
  }
  return figures;
}

/** Reads a model's files once, so that loading does not wait for the disk. */
async function warm(model) {
  const files = isRival(model) ? [model] : readdirSync(model).flatMap((name) => (name.endsWith(".safetensors") ? [join(model, name)] : []));
  for (const file of files) for await (const _ of createReadStream(file, { highWaterMark: 1 << 22 }));
}

const results = new Map(positionals.map((model) => [model, []]));
const held = new Map();
let source;
const fresh = () => ({ read: lengths.map((n) => source.ids(n)), continued: contexts.map((n) => source.ids(n)) });
for (let r = 0; r < rounds; r++) {
  let prompts;
  for (const model of positionals) {
    if (flags.apart) await warm(model);
    const subject = held.get(model) ?? start(model);
    const { vocabulary } = await subject.ready;
    source ??= freshPrompts({ vocabulary, seed: Number(flags.seed) });
    prompts ??= fresh();
    if (!held.has(model)) await measure(subject, fresh()); // warms up
    results.get(model).push(await measure(subject, prompts));
    if (flags.apart) subject.stop();
    else held.set(model, subject);
  }
}
for (const subject of held.values()) subject.stop();

const rival = results.get(positionals.find(isRival));
const table = Object.keys(rival[0]).flatMap((what) =>
  positionals.map((model) => {
    const each = results.get(model).map((figures) => figures[what]);
    const ratios = each.map((x, i) => x / rival[i][what]);
    return { what, model, tokensPerSecond: median(each), ratio: median(ratios), least: Math.min(...ratios), most: Math.max(...ratios) };
  }),
);
if (flags.json) console.log(JSON.stringify({ threads, rounds, table }, null, 1));
else
  for (const { what, model, tokensPerSecond, ratio, least, most } of table)
    console.log(
      `${what.padEnd(24)} ${(isRival(model) ? `node-llama-cpp ${model}` : `mixtape ${model}`).padEnd(48)} ${tokensPerSecond.toFixed(2).padStart(8)} tokens/s   ${ratio.toFixed(2)} x (${least.toFixed(2)} to ${most.toFixed(2)})`,
    );
