/**
 * The engine alone, without text or HTTP: speed of prompts and of generation for one and for many users, what a step costs
 * besides native code, how long generating requests wait while a long prompt is processed, and the first token of a
 * conversation's second turn. Medians with their range.
 *
 *   npm run build && node bench/engine.mjs [--model FOLDER] [--threads 2] [--rounds 5] [--users 1,32,256] [--against CHECKOUT]
 *     [--new-tokens 64] [--only prompt,generation,sampled,beside,turns] [--seed 1]
 *
 * With --against, the build of another checkout takes turns with this one in every round, and the ratio of the two is taken
 * round by round. For layers of true shape: `mixtape quantize random:21b-a3b FOLDER --dtype int4 --layers 8`, then --model FOLDER.
 *
 * What keeps rounds honest: each user gets a new random prompt in each round, warm-up included; both checkouts get the same
 * prompts, each in a process of its own. Generation is timed on prompts that the same round has just processed: the prefix cache
 * holds them, and only the tokens between the last user's first and the first user's last are counted.
 */
import { resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { report, reportRatio } from "./figures.mjs";
import { freshPrompts } from "./prompts.mjs";
import { inTurns, startSubject } from "./subject.mjs";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: fileURLToPath(new URL("../models/small-moe", import.meta.url)) },
    threads: { type: "string", default: "2" },
    rounds: { type: "string", default: "5" },
    users: { type: "string", default: "1,32,256" },
    against: { type: "string" },
    "new-tokens": { type: "string", default: "64" },
    only: { type: "string", default: "prompt,generation,sampled,beside,turns" },
    seed: { type: "string", default: "1" },
  },
});
const PARTS = ["prompt", "generation", "sampled", "beside", "turns"];
const only = flags.only.split(",");
for (const part of only) if (!PARTS.includes(part)) throw new Error(`--only ${part}: the parts are ${PARTS.join(", ")}`);
const wants = (part) => only.includes(part);
const rounds = Number(flags.rounds);
const here = fileURLToPath(new URL("..", import.meta.url));
const model = resolve(flags.model);
const SAMPLED = { temperature: 0.8, topP: 0.8, repetitionPenalty: 1.05, seed: 1 };
const CACHE_TOKENS = 65536;
/** Tokens of the prompts of all users together. */
const PROMPT_TOKENS = 2048;
const BLOCK = 32;

async function open(name, root, options = {}) {
  const setting = { root, model, options: { threads: Number(flags.threads), kv_cache_tokens: CACHE_TOKENS, ...options } };
  const subject = { name, ...startSubject(setting) };
  return { ...subject, ...(await subject.ready) };
}

/** Tokens of one user's prompt: one more than full blocks, so that of a cached prompt only the last token is computed again. */
const promptLength = (users) => BLOCK * Math.max(1, Math.round(PROMPT_TOKENS / users / BLOCK)) + 1;

/** Tokens per second between the last user's first token and the first user's last, while all of them generate. */
function generationSpeed(answers) {
  const from = Math.max(...answers.map(({ times }) => times[0]));
  const to = Math.min(...answers.map(({ times }) => times.at(-1)));
  const count = answers.reduce((sum, { times }) => sum + times.filter((t) => t > from && t <= to).length, 0);
  if (count < 8 * answers.length) throw new Error("the first user had nearly ended before the last began: pass more --new-tokens");
  return (1000 * count) / (to - from);
}

/** Reports the figure of each subject. */
function each(what, lists, unit, digits) {
  for (const [s, { name }] of subjects.entries()) report(`${subjects.length > 1 ? `${name}: ` : ""}${what}`, lists[s], unit, digits);
}

/** The same, and their ratio where there are two. */
function compare(what, lists, unit, digits) {
  each(what, lists, unit, digits);
  if (lists.length === 2) reportRatio("  this / other", lists[0], lists[1]);
}

async function speed(users) {
  const length = promptLength(users);
  const newTokens = Number(flags["new-tokens"]) * (users === 1 ? 4 : 1); // one user's tokens take little time
  const results = await inTurns(
    subjects,
    rounds,
    () => Array.from({ length: users }, () => prompts.ids(length)),
    async ({ ask }, prompts) => {
      const read = await ask({ prompts, newTokens: 1 });
      const measured = { prompt: (users * length * 1000) / Math.max(...read.answers.map(({ times }) => times[0])) };
      for (const [part, sampling] of [["generation", {}], ["sampled", SAMPLED]]) // biome-ignore format: a table
        if (wants(part)) {
          const { answers, wall, native, steps } = await ask({ prompts, newTokens, sampling });
          const besides = (wall - native) / steps;
          measured[part] = { speed: generationSpeed(answers), besides: besides * 1e6, share: (100 * besides * steps) / wall };
        }
      return measured;
    },
  );
  const lists = (pick) => results.map((list) => list.map(pick));
  const who = `${users} user${users > 1 ? "s" : ""}`;
  if (wants("prompt")) compare(`${who}: prompts of ${length} tokens`, lists((m) => m.prompt), "tokens/s"); // biome-ignore format: a table
  for (const [part, kind] of [["generation", "greedy"], ["sampled", "temperature 0.8, top_p 0.8, penalty 1.05"]]) // biome-ignore format: a table
    if (wants(part)) {
      compare(`${who}: generation, ${kind}`, lists((m) => m[part].speed), "tokens/s"); // biome-ignore format: a table
      each("  of a step, outside native code", lists((m) => m[part].besides), "us"); // biome-ignore format: a table
      each("  as a share of the step", lists((m) => m[part].share), "%", 1); // biome-ignore format: a table
    }
}

/** Eight users generate; once all have begun, a long prompt arrives. */
async function beside() {
  const long = Math.min(3500, subjects[0].positions - 1);
  const results = await inTurns(
    subjects,
    rounds,
    () => ({ prompts: Array.from({ length: 8 }, () => prompts.ids(16)), late: prompts.ids(long) }),
    async ({ ask }, asked) => {
      const { answers } = await ask({ ...asked, newTokens: 150 });
      const reader = answers.pop();
      const waits = answers.map(({ times }) => Math.max(...times.slice(1).map((t, i) => t - times[i])));
      return { first: reader.times[0], wait: Math.max(...waits) };
    },
  );
  const lists = (pick) => results.map((list) => list.map(pick));
  compare(`first token of a ${long}-token prompt beside 8 users`, lists((m) => m.first), "ms"); // biome-ignore format: a table
  compare("  their longest wait between two tokens", lists((m) => m.wait), "ms", 1); // biome-ignore format: a table
}

/** The second turn of a conversation, with and without its first in the prefix cache. */
async function turns() {
  const pair = [await open("with", here), await open("without", here, { prefix_cache: false })];
  const said = [[], []];
  const results = await inTurns(
    pair,
    rounds,
    () => ({ first: prompts.ids(2000), more: prompts.ids(30) }),
    async (subject, { first, more }) => {
      const { answers: [{ ids }] } = await subject.ask({ prompts: [first], newTokens: 40 }); // biome-ignore format: a pattern
      const { answers: [next] } = await subject.ask({ prompts: [[...first, ...ids, ...more]], newTokens: 8 }); // biome-ignore format: a pattern
      said[pair.indexOf(subject)].push(next.ids.join());
      return next.times[0];
    },
  );
  for (const { stop } of pair) stop();
  if (said[0].join(";") !== said[1].join(";")) throw new Error("the answers with and without the prefix cache differ");
  report("second turn after 2,000 tokens: first token, prefix cache", results[0], "ms", 1);
  report("  without", results[1], "ms", 1);
  reportRatio("  times sooner", results[1], results[0]);
}

let subjects = [await open("this", here)];
const prompts = freshPrompts({ vocabulary: subjects[0].vocabulary, seed: Number(flags.seed) });
if (flags.against) subjects = [...subjects, await open("other", resolve(flags.against))];
if (wants("prompt") || wants("generation") || wants("sampled")) for (const users of flags.users.split(",").map(Number)) await speed(users);
if (wants("beside")) await beside();
for (const { stop } of subjects) stop();
if (wants("turns")) await turns();
