/**
 * The default model on this machine: from process start to the first token, generation speed for one and for many users,
 * how long the event loop is blocked, and memory. Medians with their range.
 *
 *   npm run build && node bench/start.mjs [--model default] [--threads 2] [--rounds 7] [--against CHECKOUT] [--only start,speed] [--seed 1]
 *
 * With --against, the starts of another checkout's build take turns with this one's in every round, and the ratio of the two is
 * taken round by round.
 *
 * What keeps rounds honest: every start is a new process, and the first round warms the page cache and is left out. Every round
 * and user gets a new random prompt, warm-up included; both checkouts start with the same ones.
 */
import { spawn } from "node:child_process";
import { resolve } from "node:path";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { AutoModelForCausalLM } from "../dist/index.js";
import { report, reportRatio } from "./figures.mjs";
import { freshPrompts } from "./prompts.mjs";
import { inTurns } from "./subject.mjs";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: "default" },
    threads: { type: "string", default: "2" },
    rounds: { type: "string", default: "7" },
    against: { type: "string" },
    only: { type: "string", default: "start,speed" },
    seed: { type: "string", default: "1" },
  },
});
const rounds = Number(flags.rounds);
const seed = Number(flags.seed);
const here = fileURLToPath(new URL("..", import.meta.url));

/** Milliseconds from the start of a process to the first byte of its answer. */
function firstToken(root, prompt) {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const options = ["--greedy", "--max-new-tokens", "4", "-m", flags.model, "--threads", flags.threads];
    const child = spawn(process.execPath, [`${root}/bin/mixtape.js`, "generate", prompt, ...options]);
    let first;
    let said = "";
    child.stdout.once("data", () => {
      first = performance.now() - start;
    });
    child.stderr.setEncoding("utf8").on("data", (text) => {
      said += text;
    });
    // The next start waits until this process has ended, so that they do not slow each other.
    child.once("close", (code) => {
      if (code === 0 && first !== undefined) resolve(first);
      else reject(new Error(`mixtape generate of ${root} ended with ${code}: ${said}`));
    });
  });
}

async function starts() {
  const prompts = freshPrompts({ seed });
  const roots = flags.against ? [here, resolve(flags.against)] : [here];
  const results = await inTurns(roots, rounds, () => prompts.text(4), firstToken);
  for (const [i, name] of ["this", "other"].slice(0, roots.length).entries())
    report(`${roots.length > 1 ? `${name}: ` : ""}process start to first token`, results[i], "ms");
  if (roots.length > 1) reportRatio("  this / other", results[0], results[1]);
}

async function speeds() {
  const before = process.memoryUsage().rss;
  const model = await AutoModelForCausalLM.from_pretrained(flags.model, { threads: Number(flags.threads) });
  const prompts = freshPrompts({ vocabulary: model.config.vocabSize, seed });
  const newTokens = 200;
  for (const users of [1, 4, 16, 32]) {
    const options = () => ({
      input_ids: Array.from({ length: users }, () => prompts.ids(16)),
      max_new_tokens: newTokens,
      eos_token_id: null,
      do_sample: false,
    });
    await model.generate(options()); // plans the programs
    const delay = monitorEventLoopDelay({ resolution: 1 });
    delay.enable();
    const found = [];
    for (let i = 0; i < rounds; i++) {
      const asked = options();
      const start = performance.now();
      await model.generate(asked);
      found.push((users * newTokens * 1000) / (performance.now() - start));
    }
    delay.disable();
    report(`${users} user${users > 1 ? "s" : ""}, ${newTokens} new tokens each`, found, "tokens/s");
    const late = (percentile) => ((delay.percentile(percentile) - 1e6) / 1e6).toFixed(2);
    console.log(`${"  delay of timers, median and 99th percentile".padEnd(64)} ${late(50).padStart(9)} ms   ${late(99)} ms`);
  }
  const mebibytes = (process.memoryUsage().rss - before) / 2 ** 20;
  console.log(`${"resident memory, beyond that of the bare process".padEnd(64)} ${mebibytes.toFixed(0).padStart(9)} MiB`);
  await model.dispose();
}

const only = flags.only.split(",");
if (only.includes("start")) await starts();
if (only.includes("speed")) await speeds();
