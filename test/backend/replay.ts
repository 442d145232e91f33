/** Writes planned programs with their inputs and expected outputs for native/replay.cpp, which reads them in the same order. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Numbers, WeightSource } from "../../src/backend/backend.ts";
import { STORED_CODES } from "../../src/backend/native.ts";
import { referenceBackend } from "../../src/backend/reference.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { locate } from "../../src/checkpoint/names.ts";
import { Graph } from "../../src/graph/graph.ts";
import { bytesOf, DTYPE_CODES, type Plan, plan } from "../../src/graph/plan.ts";
import { readConfig } from "../../src/model/config.ts";
import { bindWeights, forward, parameters } from "../../src/model/ernie.ts";
import { type SymbolValues, symbol } from "../../src/tensor/shape.ts";
import { type Goldens, openGoldens } from "../goldens.ts";
import { allCases, type Case } from "./cases.ts";
import { planOf, runCase, writeWeights } from "./run.ts";

interface Recording {
  readonly name: string;
  readonly tolerance: number;
  readonly plan: Plan;
  readonly sources: readonly WeightSource[];
  readonly sizes: SymbolValues;
  /** In the plan's order, as are the expected outputs. */
  readonly inputs: readonly Numbers[];
  readonly expected: readonly Numbers[];
}

function recordCase(c: Case, sources: readonly WeightSource[], expected: readonly Numbers[]): Recording {
  const planned = planOf(c);
  const inputs = planned.inputs.map((t) => c.inputs.get(t.name ?? "") as Numbers);
  return { name: c.name, tolerance: c.tolerance, plan: planned, sources, sizes: c.sizes, inputs, expected };
}

/** A whole model in float32 that reads a prompt at once, against its recorded logits. */
async function recordModel(name: string, goldens: Goldens, rows: number): Promise<Recording> {
  const checkpoint = await openCheckpoint(goldens.folder);
  const config = readConfig(checkpoint.config);
  const all = parameters(config);
  const found = locate(all, checkpoint).sources;
  const g = new Graph();
  const weights = bindWeights(g, config, () => "f32");
  const sources = all.map(({ name }): WeightSource => {
    const { dtype, parts } = found.get(name) ?? fail(`${name} is not in the checkpoint`);
    const shape = g.values.find((t) => t.name === name)?.shape as number[];
    return { name, stored: dtype, dtype: "f32", shape, parts };
  });
  const inputs = {
    ids: g.input("ids", [symbol("rows")], "i32"),
    positions: g.input("positions", [symbol("rows")], "i32"),
    segments: g.input("segments", [1, 3], "i32"),
    pages: g.input("pages", [1, symbol("pages")], "i32"),
    picked: g.input("picked", [symbol("rows")], "i32"),
  };
  const pages = Math.ceil(rows / 32);
  const caches = Array.from({ length: config.layers }, (_, i) => ({
    keys: g.state(`keys.${i}`, [pages, config.kvHeads, config.headDim, 32], "f32"),
    values: g.state(`values.${i}`, [pages, config.kvHeads, 32, config.headDim], "f32"),
  }));
  const { logits } = forward(g, config, weights, inputs, caches);
  const counted = (n: number) => Int32Array.from({ length: n }, (_, i) => i);
  return {
    name,
    tolerance: 2e-4,
    plan: plan(g, [logits], { rows, pages }),
    sources,
    sizes: { rows, pages },
    inputs: [
      Int32Array.from(await goldens.ids(rows)),
      counted(rows),
      Int32Array.from([0, rows, 0]),
      counted(pages).reverse(),
      counted(rows),
    ],
    expected: [(await goldens.tensor(`forward.${rows}.logits`)).data],
  };
}

function fail(message: string): never {
  throw new Error(message);
}

/** Writes every case and two whole models to `folder`; the reference backend says what to expect. */
export async function recordAll(folder: string): Promise<{ readonly file: string; readonly count: number }> {
  const recordings: Recording[] = [];
  for (const [i, c] of allCases().entries()) {
    const sources = await writeWeights(c, join(folder, `${i}.bin`));
    recordings.push(recordCase(c, sources, await runCase(c, referenceBackend(), sources)));
  }
  for (const variant of ["moe-tiny", "dense-tiny"]) recordings.push(await recordModel(variant, await openGoldens(variant), 33));
  const file = join(folder, "cases.replay");
  writeFileSync(file, encode(recordings));
  return { file, count: recordings.length };
}

/** A file of recordings, one after another. A list is its length (uint32), then its items; all is little-endian. */
function encode(recordings: readonly Recording[]): Buffer {
  const pieces: Buffer[] = [];
  const raw = (a: Int32Array | Float32Array | Float64Array | Uint32Array) => pieces.push(Buffer.from(a.buffer, a.byteOffset, a.byteLength));
  const int = (n: number) => raw(Uint32Array.of(n));
  const double = (n: number) => raw(Float64Array.of(n));
  const numbers = (a: Int32Array | Float32Array | Float64Array) => {
    int(a.length);
    raw(a);
  };
  const doubles = (a: readonly number[]) => numbers(Float64Array.from(a));
  const text = (s: string) => {
    const bytes = Buffer.from(s);
    int(bytes.length);
    pieces.push(bytes);
  };
  const each = <T>(items: readonly T[], write: (item: T) => void) => {
    int(items.length);
    for (const item of items) write(item);
  };

  for (const r of recordings) {
    text(r.name);
    double(r.tolerance);
    each(r.plan.ops, text);
    each(
      r.plan.weights.map((t) => t.name ?? ""),
      text,
    );
    numbers(r.plan.values);
    numbers(r.plan.calls);
    numbers(r.plan.params);
    doubles(r.plan.symbols.map((s) => r.plan.capacity[s]));
    double(r.plan.arenaBytes);
    each(r.sources, (w) => {
      text(w.name);
      int(STORED_CODES[w.stored]);
      int(DTYPE_CODES[w.dtype]);
      doubles(w.shape);
      each(w.parts, (p) => {
        text(p.file);
        double(p.offset);
        double(p.bytes);
      });
    });
    doubles(r.plan.states.map((t) => bytesOf(t, r.sizes)));
    doubles(r.plan.symbols.map((s) => r.sizes[s]));
    each(r.inputs, numbers);
    each(r.expected, numbers);
  }
  return Buffer.concat(pieces);
}
