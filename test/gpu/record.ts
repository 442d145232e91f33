/**
 * Writes the recordings of the CUDA kernels' cases for native/cuda/replay.cu, which runs them without Node:
 * `npx tsx test/gpu/record.ts FOLDER`, then on a machine with a GPU `native/build/cuda/replay FOLDER/cases.replay`, from the same folder.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { loweredForCuda } from "../../src/backend/cuda/lowering.ts";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import type { Case } from "../backend/builder.ts";
import { CUDA_REFERENCE, cudaCases, cudaGraph } from "../backend/cuda.ts";
import { encode, type Recording, recordCase } from "../backend/replay.ts";
import { runCase, writeWeights } from "../backend/run.ts";

/** Sums run in another order, and matrix units multiply few rows as pairs of half-precision numbers. */
const FEW = 1e-5;
/** Activations of many rows are rounded to bfloat16 where they meet a matrix that is not float32. */
const MANY = 1.5e-2;

/** @param rows for how many rows the case is lowered */
function tolerance({ tolerance: own, weights, graph }: Case, few: boolean): number {
  const products = graph.calls.some((call) => /linear|experts|attention|qkv|combine|route/i.test(call.op));
  if (!products) return own;
  const narrow = [...weights.values()].some(({ dtype, shape }) => dtype !== "f32" && shape.length > 1);
  const cached = graph.calls.some((call) => /attention/i.test(call.op));
  return Math.max(own, few ? FEW : narrow || cached ? MANY : FEW);
}

const folder = process.argv[2];
if (!folder) throw new Error("usage: record.ts FOLDER [PATTERN]");
mkdirSync(folder, { recursive: true });
const recordings: Recording[] = [];
/** Large cases cost much to carry to another machine, and each shape occurs with few and many rows: of them, every ninth. */
const LARGE = 15_000;
const numbersOf = (c: Case) =>
  [...c.inputs.values(), ...[...c.weights.values()].map((w) => w.values)].reduce((sum, v) => sum + v.length, 0);
const named = cudaCases().filter((c, i) => (numbersOf(c) < LARGE || i % 9 === 0) && new RegExp(process.argv[3] ?? "").test(c.name));
for (const [i, c] of named.entries()) {
  const sources = await writeWeights(c, join(folder, `${i}.bin`));
  const expected = await runCase(c, referenceBackend(CUDA_REFERENCE), sources, cudaGraph(c));
  for (const few of [true, false]) {
    const rows = c.sizes["rows"] ?? 1;
    if (few && rows > 16) continue;
    const lowered = loweredForCuda(c.graph, few ? rows : Number.POSITIVE_INFINITY, () => true);
    // A program has room for more than a run needs, so that a kernel which takes one for the other is found.
    const capacity = Object.fromEntries(Object.entries(c.sizes).map(([name, size]) => [name, 2 * size + 3]));
    const recording = recordCase(c, lowered, sources, expected, capacity);
    recordings.push({ ...recording, name: `${c.name}, ${few ? "few" : "many"}`, tolerance: tolerance(c, few) });
  }
}
const file = join(folder, "cases.replay");
writeFileSync(file, encode(recordings));
console.log(`${recordings.length} cases: ${file}`);
