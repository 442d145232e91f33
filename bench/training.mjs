/**
 * A training step alone: seconds, tokens per second, memory, and for each op its time and the share of the processor's float32 peak that
 * its products reach. The peak is measured in the same run. Medians over steps with their range.
 *
 *   npm run build && mixtape quantize random:0.3b FOLDER --dtype bf16 --layers 4
 *   node bench/training.mjs --model FOLDER [--rows 1024] [--sequences 1] [--rank 16] [--compute f32|bf16] [--threads 2] [--steps 5]
 *     [--isa NAME] [--no-checkpointing]
 *
 * --rank 0 trains every parameter instead of adapters; FOLDER then has to be in float32, bfloat16 or float16. Every row has a label.
 */
import { parseArgs } from "node:util";
import { machineLimits, nativeBackend } from "../dist/backend/native.js";
import { readWeight } from "../dist/backend/reference/weights.js";
import { openCheckpoint } from "../dist/checkpoint/checkpoint.js";
import { locate } from "../dist/checkpoint/names.js";
import { readConfig } from "../dist/model/config.js";
import { ernie, parameterDtype } from "../dist/model/ernie.js";
import { elements } from "../dist/tensor/shape.js";
import { adamwRates, momentName } from "../dist/train/optimiser.js";
import { trainingStep } from "../dist/train/step.js";
import { median, report } from "./figures.mjs";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string" },
    rows: { type: "string", default: "1024" },
    sequences: { type: "string", default: "1" },
    rank: { type: "string", default: "16" },
    compute: { type: "string", default: "f32" },
    threads: { type: "string", default: "2" },
    steps: { type: "string", default: "5" },
    isa: { type: "string" },
    "no-checkpointing": { type: "boolean", default: false },
  },
});
if (!flags.model) throw new Error("--model FOLDER: a checkpoint; see the header of this file");
const [rows, sequences, rank, threads, steps] = ["rows", "sequences", "rank", "threads", "steps"].map((name) => Number(flags[name]));
const ADAMW = { learningRate: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.01 };

const checkpoint = await openCheckpoint(flags.model);
const config = readConfig(checkpoint.config);
const adapters =
  rank > 0 ? { at: ({ name }) => (/lm_head|embed_tokens|mlp\.gate$/.test(name) ? null : { rank, scale: 2, dropout: 0 }) } : null;
const model = ernie(config, adapters);
const { sources } = locate(
  model.parameters.filter((p) => p.kind !== "adapter"),
  checkpoint,
);
const trains = (p) => (adapters ? p.kind === "adapter" : !p.name.endsWith("e_score_correction_bias"));
const stored = [...sources.values()].map((s) => s.dtype).find((dtype) => dtype !== "f32") ?? "f32";
const dtypes = new Map(model.parameters.map((p) => [p.name, parameterDtype(p, stored)]));
const backend = nativeBackend({ threads, ...(flags.isa ? { isa: flags.isa } : {}) });
const kept = new Set(model.parameters.filter((p) => !trains(p)).map((p) => p.name));
const asSource = (s, dtype) => ({ name: s.name, stored: s.dtype, dtype, shape: s.shape, parts: s.parts });
const weights = await backend.load(
  [...sources.values()].filter((s) => kept.has(s.name)).map((s) => asSource(s, dtypes.get(s.name))),
  "mapped",
);

const { graph, trained } = trainingStep(model, {
  trains,
  dtypeOf: (name) => dtypes.get(name),
  compute: flags.compute,
  checkpointing: !flags["no-checkpointing"],
});
const states = new Map();
for (const { name, shape } of trained) {
  const state = backend.state("f32", shape);
  const source = sources.get(name);
  if (source) state.write(await readWeight(asSource(source, "f32")));
  else state.write(Float32Array.from({ length: elements(shape) }, (_, i) => ((i * 2654435761) % 1000) / 5e4 - 0.01));
  states.set(name, state);
  for (const which of ["m", "v"]) states.set(momentName(name, which), backend.state("f32", shape));
}
const program = backend.prepare(graph, { rows }, weights, states);

const length = Math.floor(rows / sequences);
const random = (() => {
  let state = 1;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
})();
const inputs = {
  ids: Int32Array.from({ length: rows }, () => random(model.vocabSize)),
  labels: Int32Array.from({ length: rows }, () => random(model.vocabSize)),
  positions: Int32Array.from({ length: rows }, (_, r) => r % length),
  weights: new Float32Array(rows).fill(1 / rows),
  segments: Int32Array.from({ length: sequences * 3 }, (_, i) => [Math.floor(i / 3) * length, length, 0][i % 3]),
  seed: new Int32Array(2),
};
const sizes = { rows: sequences * length, sequences };

/** Multiplications and additions of a call; null for ops that are no products. */
function operations({ op, inputs: given, outputs }) {
  const size = (t) => t.shape.map((d) => elements([d], sizes));
  const product = (rowsOf, matrix, times) =>
    2 *
    times *
    size(rowsOf)[0] *
    size(matrix)
      .slice(-2)
      .reduce((a, b) => a * b);
  const pairs = (length * (length + 1)) / 2;
  switch (op) {
    case "linear":
    case "tiledLinear":
    case "linearT":
    case "addLinear":
    case "addLinearT":
      return product(given[0], given[1], 1);
    case "groupedLinear":
    case "tiledGroupedLinear":
    case "addGroupedLinear":
      return product(outputs[0], given[1], 1);
    case "groupedLinearT":
      return product(given[0], given[1], 1);
    case "outer":
    case "groupedOuter":
      return product(given[0], outputs[0], 1);
    case "crossEntropy":
      return product(given[0], given[1], 1);
    case "crossEntropyGrad":
      return product(given[1], given[2], outputs.length > 1 ? 3 : 2);
    case "attention":
      return 2 * 2 * pairs * sequences * size(given[0])[1];
    case "attentionGrad":
      return 2 * 5 * pairs * sequences * size(given[0])[1];
    default:
      return null;
  }
}

const seconds = [];
const byOp = new Map();
const losses = [];
for (let step = 0; step <= steps; step++) {
  const loss = new Float32Array(1);
  const before = [...program.seconds()];
  const start = performance.now();
  await program.run(sizes, { ...inputs, rates: adamwRates(ADAMW, step + 1) }, { loss });
  losses.push(loss[0]);
  if (step === 0) continue; // touches all memory for the first time
  seconds.push((performance.now() - start) / 1000);
  const spent = new Map();
  program.seconds().forEach((s, i) => {
    const call = program.calls[i];
    const work = operations(call);
    // Small products, as an adapter's, are listed apart: their time goes into reading and writing.
    const name = work === null ? call.op : `${call.op}${work / sizes.rows < 1e6 ? " (small)" : ""}`;
    const sum = spent.get(name) ?? { seconds: 0, work: 0, calls: 0 };
    spent.set(name, { seconds: sum.seconds + s - before[i], work: sum.work + (work ?? 0), calls: sum.calls + 1 });
  });
  for (const [name, sum] of spent) byOp.set(name, [...(byOp.get(name) ?? []), sum]);
}
const limits = await machineLimits(backend.name, threads);

const dims = `${config.layers} layers of hidden ${config.hiddenSize}, vocabulary ${config.vocabSize}`;
console.log(
  `${backend.name}, ${threads} threads; ${dims}; ${stored}, products in ${flags.compute}; ${rows} tokens in ${sequences} sequences`,
);
console.log(
  `${trained.reduce((n, p) => n + elements(p.shape), 0).toLocaleString("en")} trained numbers; losses ${losses.map((l) => l.toFixed(4)).join(" ")}`,
);
console.log(
  `peak: ${(limits.floatOpsPerSecond / 1e9).toFixed(0)} float32 and ${(limits.int8OpsPerSecond / 1e9).toFixed(0)} int8 billion operations/s`,
);
report("step", seconds, "s", 3);
report("tokens per second", seconds.map((s) => sizes.rows / s), "tok/s"); // biome-ignore format: a table
console.log(`${"op".padEnd(32)} calls   seconds   of step   of the float32 peak`);
const total = median(seconds);
const rowsOf = [...byOp].map(([name, sums]) => ({ name, ...sums[0], seconds: median(sums.map((s) => s.seconds)) }));
for (const { name, calls, work, seconds: s } of rowsOf.sort((a, b) => b.seconds - a.seconds)) {
  if (s < total / 1000) continue;
  const share = work ? `${((100 * work) / s / limits.floatOpsPerSecond).toFixed(0)} %` : "";
  console.log(
    `${name.padEnd(32)} ${String(calls).padStart(5)} ${s.toFixed(4).padStart(9)} ${((100 * s) / total).toFixed(1).padStart(7)} %   ${share.padStart(6)}`,
  );
}
console.log(`peak memory of the process: ${(process.resourceUsage().maxRSS / 1024).toFixed(0)} MiB`);
backend.dispose();
