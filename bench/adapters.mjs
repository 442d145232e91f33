/**
 * What adapters cost: generation and prompts of several users at once, all on the base, all on one adapter, each on an adapter of its own, and
 * half on the base. Random low-rank matrices in memory; nothing is read. Medians of rounds in turns, with their range. Beside the speed, the
 * processor's time for each token, prompts included: with --threads 1 other work on the machine hardly changes it.
 *
 *   npm run build && node bench/adapters.mjs [--model default] [--users 8] [--rank 16] [--modules q_proj,k_proj,v_proj,o_proj] [--threads 2] [--rounds 5]
 */
import { parseArgs } from "node:util";
import { GREEDY } from "../dist/engine/sampling.js";
import { AutoModelForCausalLM } from "../dist/index.js";
import { report } from "./figures.mjs";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: "default" },
    users: { type: "string", default: "8" },
    rank: { type: "string", default: "16" },
    modules: { type: "string", default: "q_proj,k_proj,v_proj,o_proj" },
    threads: { type: "string", default: "2" },
    rounds: { type: "string", default: "5" },
    tokens: { type: "string", default: "64" },
    prompt: { type: "string", default: "128" },
  },
});
const [users, rank, rounds, tokens, length] = ["users", "rank", "rounds", "tokens", "prompt"].map((name) => Number(flags[name]));
const wanted = new Set(flags.modules.split(","));
const model = await AutoModelForCausalLM.from_pretrained(flags.model, { threads: Number(flags.threads), prefix_cache: false });
const { engine } = model;

const modules = new Set(
  engine.model.parameters
    .map(({ name }) => name.replace(/\.weight$/, ""))
    .filter((name) => wanted.has(name.slice(name.lastIndexOf(".") + 1))),
);
const noise = (n) => Float32Array.from({ length: n }, () => (Math.random() - 0.5) * 0.02);
for (let i = 0; i < users; i++) {
  const branches = new Map();
  for (const { name, kind, shape, experts = 1 } of engine.model.stacked({ count: 1, rank, modules }).parameters) {
    if (kind !== "adapter") continue;
    const module = name.replace(/\.lora_[AB]\.weight$/, "");
    const half = name.endsWith(".lora_A.weight") ? "a" : "b";
    branches.set(module, { rank, scale: 1, experts, ...branches.get(module), [half]: noise(shape.reduce((a, b) => a * b)) });
  }
  const start = performance.now();
  await engine.loadAdapter(`adapter-${i}`, branches);
  if (i === users - 1) console.log(`loading one of ${modules.size} modules: ${(performance.now() - start).toFixed(0)} ms`);
}
console.log(`${users} adapters take ${(engine.adapters.bytes / 2 ** 20).toFixed(1)} MiB\n`);

const KINDS = {
  "all on the base": () => undefined,
  "all on one": () => "adapter-0",
  "each its own": (user) => `adapter-${user}`,
  "half on the base": (user) => (user % 2 ? undefined : `adapter-${user}`),
};

/** Tokens per second of all users together: of their prompts, then of their answers. */
async function round(kind) {
  const prompts = Array.from({ length: users }, () => Array.from({ length }, () => 10 + Math.floor(Math.random() * 1000)));
  let [first, last] = [0, 0];
  const used = process.cpuUsage();
  const start = performance.now();
  await Promise.all(
    prompts.map(async (prompt, user) => {
      let count = 0;
      for await (const _ of engine.submit({ tokens: prompt, sampling: GREEDY, maxNewTokens: tokens, adapter: KINDS[kind](user) })) {
        if (count++ === 0) first = Math.max(first, performance.now() - start);
        last = Math.max(last, performance.now() - start);
      }
    }),
  );
  const { user, system } = process.cpuUsage(used);
  return {
    cpu: (user + system) / 1000 / (users * (length + tokens)),
    prompt: (users * length) / (first / 1000),
    answer: (users * (tokens - 1)) / ((last - first) / 1000),
  };
}

const results = Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, { cpu: [], prompt: [], answer: [] }]));
for (let i = 0; i <= rounds; i++)
  for (const kind of Object.keys(KINDS)) {
    const found = await round(kind);
    if (i > 0) for (const what of ["cpu", "prompt", "answer"]) results[kind][what].push(found[what]); // the first round warms up
  }
for (const [kind, { cpu, prompt, answer }] of Object.entries(results)) {
  report(`${kind}: processor time of a token`, cpu, "ms", 3);
  report(`${kind}: prompts`, prompt, "tokens/s");
  report(`${kind}: answers`, answer, "tokens/s");
}
await model.dispose();
