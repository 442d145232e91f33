/** Writes planned programs with inputs and expected outputs for native/replay.cpp, which reads them in the same order. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { STORED_CODES } from "../../src/backend/addon.ts";
import { BLOCK_TOKENS, type Numbers, type WeightSource } from "../../src/backend/backend.ts";
import { lowered } from "../../src/backend/cpu.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { locate } from "../../src/checkpoint/names.ts";
import { Graph } from "../../src/graph/graph.ts";
import { bytesOf, DTYPE_CODES, type Plan, plan } from "../../src/graph/plan.ts";
import { readConfig } from "../../src/model/config.ts";
import { ernie } from "../../src/model/ernie.ts";
import { linear } from "../../src/model/linear.ts";
import { type SymbolValues, symbol } from "../../src/tensor/shape.ts";
import { type Goldens, openGoldens } from "../goldens.ts";
import type { Case } from "./builder.ts";
import { allCases } from "./cases.ts";
import { expectedOf, loweredOf, writeWeights } from "./run.ts";

export interface Recording {
  readonly name: string;
  readonly tolerance: number;
  readonly plan: Plan;
  readonly sources: readonly WeightSource[];
  readonly sizes: SymbolValues;
  readonly inputs: Readonly<Record<string, Numbers>>;
  /** In the order of the graph's outputs. */
  readonly expected: readonly Numbers[];
}

export function recordCase(
  c: Case,
  lowered: Graph,
  sources: readonly WeightSource[],
  expected: readonly Numbers[],
  capacity: SymbolValues = c.sizes,
): Recording {
  const { name, tolerance, sizes } = c;
  return { name, tolerance, plan: plan(lowered, capacity), sources, sizes, inputs: Object.fromEntries(c.inputs), expected };
}

/** A whole model in float32 that computes a prompt in one step, against its recorded logits. */
async function recordModel(name: string, goldens: Goldens, rows: number): Promise<Recording> {
  const checkpoint = await openCheckpoint(goldens.folder);
  const model = ernie(readConfig(checkpoint.config));
  const found = locate(model.parameters, checkpoint).sources;
  const g = new Graph();
  const sources: WeightSource[] = [];
  const sizes = { rows, pages: Math.ceil(rows / BLOCK_TOKENS), context: rows, embedded: 0 };
  const half = (name: string) => g.state(name, [sizes.pages, BLOCK_TOKENS, model.cache.heads, model.cache.width], "f32");
  const step = {
    ids: g.input("ids", [symbol("rows")], "i32"),
    positions: g.input("positions", [symbol("rows")], "i32"),
    segments: g.input("segments", [1, 3], "i32"),
    cache: {
      pages: g.input("pages", [1, symbol("pages")], "i32"),
      context: symbol("context"),
      layers: Array.from({ length: model.layers }, (_, i) => ({ keys: half(`keys.${i}`), values: half(`values.${i}`) })),
    },
    embeddings: {
      values: g.input("embeddings", [symbol("embedded"), model.hiddenSize], "f32"),
      rows: g.input("embeddedRows", [symbol("embedded")], "i32"),
    },
  };
  const { hiddenStates, head } = model.forward(
    g,
    ({ name, shape }) => {
      const { dtype, parts } = found.get(name) ?? fail(`${name} is not in the checkpoint`);
      sources.push({ name, stored: dtype, dtype: "f32", shape, parts });
      return g.weight(name, shape, "f32");
    },
    step,
  );
  g.output("logits", linear(g, hiddenStates[hiddenStates.length - 1], head));
  const counted = (n: number) => Int32Array.from({ length: n }, (_, i) => i);
  return {
    name,
    tolerance: 2e-4,
    plan: plan(
      lowered(g, () => true),
      sizes,
    ),
    sources,
    sizes,
    inputs: {
      ids: Int32Array.from(await goldens.ids(rows)),
      positions: counted(rows),
      segments: Int32Array.from([0, rows, 0]),
      pages: counted(sizes.pages).reverse(),
      embeddings: new Float32Array(),
      embeddedRows: new Int32Array(),
    },
    expected: [(await goldens.tensor(`forward.${rows}.logits`)).data],
  };
}

function fail(message: string): never {
  throw new Error(message);
}

/** A tolerance for results that only have to come about without overflows. */
const UNCOMPARED = -1;

/** Inputs with numbers among them that are not finite, or whose inverses are not. Controls of sampling are checked before they get so far. */
function wild(inputs: Recording["inputs"]): Recording["inputs"] {
  const odd = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 3e38, -3e38, 1e-38, -1e-42];
  return Object.fromEntries(
    Object.entries(inputs).map(([name, values]) => [
      name,
      values instanceof Float32Array && name !== "floats" && name !== "biasValues"
        ? values.map((value, i) => (i % 29 === 3 ? odd[((i / 29) | 0) % odd.length] : value))
        : values,
    ]),
  );
}

/**
 * Writes all cases, each also with wild numbers, and two whole models to `folder`; the reference backend computes the expected outputs.
 * @param only cases whose names match; then no models and no wild numbers
 */
export async function recordAll(folder: string, only?: RegExp): Promise<{ readonly file: string; readonly count: number }> {
  const recordings: Recording[] = [];
  for (const [i, c] of allCases().entries()) {
    if (only && !only.test(c.name)) continue;
    const sources = await writeWeights(c, join(folder, `${i}.bin`));
    const recording = recordCase(c, loweredOf(c), sources, await expectedOf(c, sources));
    recordings.push(recording);
    if (only) continue;
    recordings.push({ ...recording, name: `${c.name}, wild numbers`, tolerance: UNCOMPARED, inputs: wild(recording.inputs) });
  }
  for (const variant of only ? [] : ["moe-tiny", "dense-tiny"]) recordings.push(await recordModel(variant, await openGoldens(variant), 33));
  const file = join(folder, "cases.replay");
  writeFileSync(file, encode(recordings));
  return { file, count: recordings.length };
}

/** A file of consecutive recordings. A list is its length (uint32) followed by its items; everything is little-endian. */
export function encode(recordings: readonly Recording[]): Buffer {
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
    numbers(r.plan.program);
    numbers(r.plan.params);
    doubles(r.plan.symbols.map((s) => r.plan.capacity[s] ?? r.sizes[s] ?? 0));
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
    doubles(r.plan.symbols.map((s) => r.sizes[s] ?? 0));
    each(
      r.plan.inputs.map((t) => r.inputs[t.name as string]),
      numbers,
    );
    each(r.expected, numbers);
  }
  return Buffer.concat(pieces);
}
