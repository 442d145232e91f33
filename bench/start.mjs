/**
 * The default model on this machine: from process start to the first token, generation speed for one and for many users,
 * how long the event loop is held, and memory. Medians with their range.
 *
 *   npm run build && node bench/start.mjs [--model default] [--threads 2] [--rounds 7]
 */
import { spawn } from "node:child_process";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { AutoModelForCausalLM } from "../dist/index.js";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "default" },
    threads: { type: "string", default: "2" },
    rounds: { type: "string", default: "7" },
  },
});
const rounds = Number(values.rounds);
const cli = fileURLToPath(new URL("../bin/mixtape.js", import.meta.url));

function report(what, list, unit, digits = 0) {
  const sorted = [...list].sort((a, b) => a - b);
  const [low, middle, high] = [sorted[0], sorted[Math.floor(sorted.length / 2)], sorted.at(-1)].map((x) => x.toFixed(digits));
  console.log(`${what.padEnd(44)} ${middle.padStart(8)} ${unit}   (${low} to ${high})`);
}

/** Milliseconds from the start of a process to the first byte of its answer. */
function firstToken() {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const child = spawn(process.execPath, [
      cli,
      "generate",
      "你好",
      "--greedy",
      "--max-new-tokens",
      "4",
      "-m",
      values.model,
      "--threads",
      values.threads,
    ]);
    child.stdout.once("data", () => resolve(performance.now() - start));
    child.once("close", (code) => code && reject(new Error(`mixtape generate ended with ${code}`)));
    child.stderr.resume();
  });
}

const starts = [];
for (let i = 0; i < rounds; i++) starts.push(await firstToken());
report("process start to first token", starts, "ms");

const before = process.memoryUsage().rss;
const model = await AutoModelForCausalLM.from_pretrained(values.model, { threads: Number(values.threads) });
const newTokens = 200;
for (const users of [1, 4, 16, 32]) {
  const input_ids = Array.from({ length: users }, (_, u) => Array.from({ length: 16 }, (_, i) => 300 + ((i * 7 + u * 131) % 5000)));
  const options = { input_ids, max_new_tokens: newTokens, eos_token_id: null, do_sample: false };
  await model.generate(options); // plans the programs
  const delay = monitorEventLoopDelay({ resolution: 1 });
  delay.enable();
  const speeds = [];
  for (let i = 0; i < rounds; i++) {
    const start = performance.now();
    await model.generate(options);
    speeds.push((users * newTokens * 1000) / (performance.now() - start));
  }
  delay.disable();
  report(`${users} user${users > 1 ? "s" : ""}, ${newTokens} new tokens each`, speeds, "tokens/s");
  console.log(
    `${"  timers late by, median and 99th percentile".padEnd(44)} ${((delay.percentile(50) - 1e6) / 1e6).toFixed(2).padStart(8)} ms   ${((delay.percentile(99) - 1e6) / 1e6).toFixed(2)} ms`,
  );
}
console.log(
  `${"resident memory, above the bare process".padEnd(44)} ${((process.memoryUsage().rss - before) / 2 ** 20).toFixed(0).padStart(8)} MiB`,
);
await model.dispose();
