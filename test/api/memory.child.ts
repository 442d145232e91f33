/** Run by memory.test.ts in a separate process with --expose-gc: takes one measurement and prints it as JSON. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";

const [what, folder, count] = process.argv.slice(2);
const load = (threads = 2) => AutoModelForCausalLM.from_pretrained(folder, { threads });

/** Resident memory in MiB: all of it, and the part that no file backs. */
function resident(): { all: number; anonymous: number } {
  globalThis.gc?.();
  globalThis.gc?.();
  const status = readFileSync("/proc/self/status", "utf8");
  const of = (key: string) => Number(new RegExp(`^${key}:\\s+(\\d+) kB`, "m").exec(status)?.[1]) / 1024;
  return { all: of("VmRSS"), anonymous: of("RssAnon") };
}

const turn = () => new Promise((resolve) => setImmediate(resolve));
const prompt = (length: number, seed: number) => Array.from({ length }, (_, i) => 6 + ((i * 31 + seed * 17) % 400));

/** Calls like a server's: prompts of many lengths, sampled or greedy, streamed or not, with one signal for all. */
async function use(model: CausalLM, calls: number, signal: AbortSignal): Promise<void> {
  for (let i = 0; i < calls; i++)
    await model.generate({
      input_ids: [prompt(1 + (i % 40), i)],
      max_new_tokens: 4,
      eos_token_id: null,
      do_sample: i % 2 === 0,
      seed: i,
      signal,
      ...(i % 3 === 0 ? { streamer: { put() {}, end() {} } } : {}),
      ...(i % 5 === 0 ? { return_dict_in_generate: true as const, top_logprobs: 3 } : {}),
    });
  await turn();
}

async function measureLoad() {
  const before = resident();
  const model = await load();
  const loaded = resident();
  await model.generate({ input_ids: [prompt(100, 1)], max_new_tokens: 8, eos_token_id: null });
  const used = resident();
  await model.dispose();
  await turn();
  const disposed = resident();
  const grown = (x: typeof before) => ({ all: x.all - before.all, anonymous: x.anonymous - before.anonymous });
  return { loaded: grown(loaded), used: grown(used), disposed: grown(disposed) };
}

async function measureCalls() {
  const model = await load(1); // one thread: beside other processes, two that wait for each other take ten times as long
  const { signal } = new AbortController();
  await use(model, 1500, signal); // until V8 has compiled everything
  const before = resident();
  const heap = process.memoryUsage().heapUsed;
  const start = performance.now();
  await use(model, Number(count), signal);
  const seconds = (performance.now() - start) / 1000;
  const grown = resident().all - before.all;
  const heapGrown = (process.memoryUsage().heapUsed - heap) / 2 ** 20;
  await model.dispose();
  return { grown, heapGrown, seconds };
}

async function measureReloads() {
  const once = async () => {
    const model = await load();
    await model.generate({ input_ids: [prompt(60, 2)], max_new_tokens: 2, eos_token_id: null });
    await model.dispose();
    await turn();
  };
  for (let i = 0; i < 40; i++) await once();
  const before = resident();
  const threads = () => Number(/^Threads:\s+(\d+)/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1]);
  const maps = () =>
    readFileSync("/proc/self/maps", "utf8")
      .split("\n")
      .filter((line) => line.includes(".safetensors")).length;
  const threadsBefore = threads();
  for (let i = 0; i < Number(count); i++) await once();
  return { grown: resident().all - before.all, threads: threads() - threadsBefore, mappings: maps() };
}

/** Calls of the addon's `run`, and during how many of them the event loop kept running. */
async function countTurns() {
  const addon = createRequire(import.meta.url)("../../native/build/mixtape.node") as { run: (...args: unknown[]) => Promise<void> };
  const native = addon.run;
  let [calls, during] = [0, 0];
  addon.run = async (...args) => {
    calls++;
    let turned = false;
    setImmediate(() => {
      turned = true;
    });
    await native(...args);
    if (turned) during++;
  };
  const model = await load();
  await Promise.all(
    [200, 7, 33, 1].map((n) =>
      model.generate({ input_ids: [prompt(n, n)], max_new_tokens: 60, eos_token_id: null, do_sample: true, seed: 1 }),
    ),
  );
  await model.dispose();
  return { calls, during };
}

const measures: Record<string, () => Promise<unknown>> = {
  load: measureLoad,
  calls: measureCalls,
  reloads: measureReloads,
  loop: countTurns,
};
console.log(JSON.stringify(await measures[what]()));
