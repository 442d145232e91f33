/**
 * The engine alone, without text or HTTP: speed for one and for many users, what a step costs besides native code, the first
 * token of a conversation's second turn, and how long generating requests wait while a long prompt is read. Medians with
 * their range; what is compared takes turns.
 *
 *   npm run build && node bench/engine.mjs [--model FOLDER] [--threads 2] [--rounds 5] [--users 1,32,256] [--against CHECKOUT]
 *
 * With --against, the engine of another checkout, built as well, takes turns with this one's.
 */
import { resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: fileURLToPath(new URL("../models/small-moe", import.meta.url)) },
    threads: { type: "string", default: "2" },
    rounds: { type: "string", default: "5" },
    users: { type: "string", default: "1,32,256" },
    against: { type: "string" },
  },
});
const rounds = Number(flags.rounds);
const here = fileURLToPath(new URL("..", import.meta.url));
const checkouts = [["this", here], ...(flags.against ? [["other", resolve(flags.against)]] : [])];

async function open(root, more = {}) {
  const { loadModel } = await import(pathToFileURL(`${root}/dist/api/load.js`));
  const { GREEDY } = await import(pathToFileURL(`${root}/dist/engine/sampling.js`));
  const { engine } = await loadModel(flags.model, { threads: Number(flags.threads), kv_cache_tokens: 65536, ...more });
  return { engine, GREEDY };
}

function report(what, list, unit, digits = 0) {
  const sorted = [...list].sort((a, b) => a - b);
  const [low, middle, high] = [sorted[0], sorted[Math.floor(sorted.length / 2)], sorted.at(-1)].map((x) => x.toFixed(digits));
  console.log(`${what.padEnd(64)} ${middle.padStart(9)} ${unit}   (${low} to ${high})`);
}

let seeds = 0;
/** Token ids that no other prompt begins with. */
function made(count, vocabSize) {
  const seed = ++seeds;
  return Array.from({ length: count }, (_, i) => 6 + ((i * 7919 + seed * 104729 + ((i * i) % 97)) % (vocabSize - 6)));
}

/** Seconds until the first token, and between one and the next. */
async function times({ engine, GREEDY }, tokens, maxNewTokens, sampling = GREEDY) {
  const start = performance.now();
  let last = start;
  const gaps = [];
  const ids = [];
  for await (const { id } of engine.submit({ tokens, sampling, maxNewTokens })) {
    const now = performance.now();
    gaps.push((now - last) / 1000);
    last = now;
    ids.push(id);
  }
  return { first: gaps[0], between: gaps.slice(1), ids };
}

/** Tokens a second while all generate, and what a step takes besides the ops of the program. */
async function crowd(subject, users, newTokens, sampling) {
  const { engine } = subject;
  const seconds = () => [...engine.profile()].reduce((sum, [, op]) => sum + op.seconds, 0);
  const before = { native: seconds(), steps: engine.stats().steps };
  const start = performance.now();
  await Promise.all(Array.from({ length: users }, () => times(subject, made(16, engine.config.vocabSize), newTokens, sampling)));
  const wall = (performance.now() - start) / 1000;
  const steps = engine.stats().steps - before.steps;
  return { speed: (users * newTokens) / wall, besides: (wall - (seconds() - before.native)) / steps, step: wall / steps };
}

const subjects = [];
for (const [name, root] of checkouts) subjects.push({ name, ...(await open(root)) });

const KINDS = [
  ["greedy", {}],
  ["temperature 0.8, top_p 0.8, penalty 1.05", { temperature: 0.8, topP: 0.8, repetitionPenalty: 1.05, seed: 1 }],
];
for (const users of flags.users.split(",").map(Number))
  for (const [kind, sampling] of KINDS) {
    const newTokens = users === 1 ? 200 : 64;
    const found = new Map(subjects.map((s) => [s.name, []]));
    for (let r = 0; r <= rounds; r++)
      for (const s of subjects) {
        const measured = await crowd(s, users, newTokens, { ...s.GREEDY, ...sampling });
        if (r > 0) found.get(s.name).push(measured); // the first one plans programs
      }
    for (const [name, list] of found) {
      const what = `${name}: ${users} user${users > 1 ? "s" : ""}, ${kind}`;
      report(what, list.map((x) => x.speed), "tokens/s"); // biome-ignore format: a table
      report("  of a step, besides native code", list.map((x) => x.besides * 1e6), "us"); // biome-ignore format: a table
      report("  share of the step", list.map((x) => (100 * x.besides) / x.step), "%", 1); // biome-ignore format: a table
    }
  }

for (const { name, engine, GREEDY } of subjects) {
  const gaps = [];
  for (let r = 0; r < rounds; r++) {
    const talkers = Array.from({ length: 8 }, () => times({ engine, GREEDY }, made(16, engine.config.vocabSize), 150));
    await new Promise((resolve) => setTimeout(resolve, 30));
    const reader = await times({ engine, GREEDY }, made(3500, engine.config.vocabSize), 1);
    for (const { between } of await Promise.all(talkers)) gaps.push(Math.max(...between) * 1000);
    if (r === rounds - 1) report(`${name}: first token of a 3,500-token prompt beside 8 users`, [reader.first * 1000], "ms");
  }
  report("  longest wait between two tokens of each of them", gaps, "ms", 1);
}
for (const { engine } of subjects) await engine.dispose();

const turns = { with: await open(here), without: await open(here, { prefix_cache: false }) };
const firsts = { with: [], without: [] };
for (let r = 0; r <= rounds; r++) {
  const tokens = made(2000, turns.with.engine.config.vocabSize);
  const answers = [];
  for (const [kind, subject] of Object.entries(turns)) {
    const { ids } = await times(subject, tokens, 40);
    const { first, ids: next } = await times(subject, [...tokens, ...ids, ...tokens.slice(50, 80)], 8);
    if (r > 0) firsts[kind].push(first * 1000);
    answers.push(next.join());
  }
  if (answers[0] !== answers[1]) throw new Error("the answers with and without the prefix cache differ");
}
report("second turn of 2,000 tokens: first token, prefix cache", firsts.with, "ms", 1);
report("  without", firsts.without, "ms", 1);
report("  times sooner", firsts.with.map((x, i) => firsts.without[i] / x), "x", 1); // biome-ignore format: a table
for (const { engine } of Object.values(turns)) await engine.dispose();
