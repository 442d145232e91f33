/**
 * From a config to a program: how long tracing, fusing, lowering and planning take, without weights and without running anything.
 *
 *   npm run build && node bench/plan.mjs [--shape 21b-a3b] [--rounds 7]
 *
 * Each round is a process of its own, as a model is loaded once: "first" is its first plan, with code that has not run before,
 * "next" the one for another number of rows, which needs no tracing.
 */
import { fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { CPU } from "../dist/backend/cpu.js";
import { Programs } from "../dist/engine/programs.js";
import { fuse } from "../dist/graph/fuse.js";
import { lower } from "../dist/graph/lower.js";
import { plan } from "../dist/graph/plan.js";
import { readConfig } from "../dist/model/config.js";
import { ernie, parameterDtype } from "../dist/model/ernie.js";
import { PRESETS } from "../dist/model/presets.js";
import { report } from "./figures.mjs";

const { values: flags } = parseArgs({
  options: { shape: { type: "string", default: "21b-a3b" }, rounds: { type: "string", default: "7" } },
});

/** A backend that stops short of running: milliseconds of each pass. */
function planner(times) {
  const timed = (name, work) => {
    const start = performance.now();
    const result = work();
    times[name] = performance.now() - start;
    return result;
  };
  return {
    state: () => ({ dispose() {} }),
    prepare(graph, capacity) {
      const fused = timed("fuse", () => fuse(graph, () => true));
      const lowered = timed("lower", () => lower(fused, CPU));
      const { calls, arenaBytes } = timed("plan", () => plan(lowered, capacity));
      return { calls, arenaBytes, dispose() {} };
    },
  };
}

if (process.send) {
  const model = ernie(readConfig(PRESETS[flags.shape]));
  const parameters = new Map(model.parameters.map((p) => [p.name, p]));
  const times = {};
  const start = performance.now();
  const programs = new Programs(
    model,
    (name) => parameterDtype(parameters.get(name), "int4"),
    planner(times),
    {},
    { dtype: "int8kv", blocks: 1024 },
  );
  times.trace = performance.now() - start;
  const { calls, arenaBytes } = programs.for(512, 1);
  const first = performance.now() - start;
  const again = performance.now();
  const parts = { ...times };
  programs.for(1, 1);
  process.send({ ...parts, first, next: performance.now() - again, calls: calls.length, bytes: arenaBytes }, () => process.disconnect());
} else {
  const rounds = [];
  for (let round = 0; round < Number(flags.rounds); round++) {
    const child = fork(fileURLToPath(import.meta.url), ["--shape", flags.shape]);
    rounds.push(
      await new Promise((resolve, reject) =>
        child.once("message", resolve).once("exit", (code) => code && reject(new Error(`exit ${code}`))),
      ),
    );
  }
  console.log(
    `${flags.shape}: ${rounds[0].calls} calls, ${(rounds[0].bytes / 2 ** 20).toFixed(1)} MiB of workspace for 512 rows, one of them picked`,
  );
  for (const name of ["trace", "fuse", "lower", "plan", "first", "next"])
    report(
      name,
      rounds.map((r) => r[name]),
      "ms",
      1,
    );
}
