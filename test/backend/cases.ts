/** The test cases of all kernels: each op in each format, at sizes that are no multiple of any vector width. */

import { BLOCK_TOKENS } from "../../src/backend/backend.ts";
import { GREEDY, layOut, type Sampling } from "../../src/engine/sampling.ts";
import type { Tensor } from "../../src/graph/graph.ts";
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../../src/graph/ops/sampling.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { Builder, type Case, MATRIX_DTYPES, type MatrixDtype, noise, RAGGED } from "./builder.ts";
import { trainingCases } from "./training.ts";

export function allCases(): Case[] {
  return [...servingCases(), ...trainingCases()];
}

/** @param dtypes formats of matrices */
export function servingCases(dtypes: readonly MatrixDtype[] = MATRIX_DTYPES): Case[] {
  return [
    ...linears(dtypes),
    ...groupedLinears(dtypes),
    ...rowOps(dtypes),
    ...routers(),
    ...branches(),
    ...attentions(),
    ...samplers(),
    ...alternatives(),
  ];
}

/** Sums of many products in float32 depend on their order. */
const LINEAR_TOLERANCE: Record<MatrixDtype, number> = { f32: 1e-6, f16: 1e-6, bf16: 1e-5, int8: 2e-6, int4: 2e-6, fp8: 1e-6 };

function linears(dtypes: readonly MatrixDtype[]): Case[] {
  return dtypes.flatMap((dtype) =>
    RAGGED.flatMap((rows) =>
      [
        [1, 1],
        [7, 33],
        [16, 64],
        [31, 257],
        [33, 31],
        [257, 129],
        [48, 320],
      ].flatMap(([n, k], i) => {
        const b = new Builder();
        const bias = i % 2 ? b.weight("bias", [n]) : undefined;
        const y = b.g.linear(b.rows("x", rows, k), b.weight("w", [n, k], dtype), bias);
        const z = b.rows("z", rows, k);
        const gated = b.g.siluMul(b.g.linear(z, b.weight("gate", [n, k], dtype)), b.g.linear(z, b.weight("up", [n, k], dtype)));
        return b.done(`linear ${dtype} rows ${rows} [${n},${k}]${bias ? " bias" : ""}`, [y, gated], { rows }, LINEAR_TOLERANCE[dtype]);
      }),
    ),
  );
}

function groupedLinears(dtypes: readonly MatrixDtype[]): Case[] {
  return dtypes.flatMap((dtype) =>
    RAGGED.flatMap((rows) =>
      [
        [5, 2, 19, 44],
        [8, 3, 33, 65],
        [3, 3, 16, 128],
      ].map(([experts, slots, n, k]) => {
        const b = new Builder();
        const chosen = Int32Array.from(
          { length: rows * slots },
          (_, i) => (Math.floor(i / slots) * 5 + (i % slots) * 2 + (i % 3)) % experts,
        );
        const { order, offsets } = b.g.group(b.input("experts", [symbol("rows"), slots], chosen), experts);
        const h = b.g.groupedLinear(b.rows("x", rows, k), b.weight("up", [experts, n, k], dtype), order, offsets, slots);
        const y = b.g.groupedLinear(h, b.weight("down", [experts, k, n], dtype), order, offsets, 1, b.weight("bias", [experts, k]));
        const z = b.rows("z", rows, k);
        const gated = b.g.siluMul(
          b.g.groupedLinear(z, b.weight("gate", [experts, n, k], dtype), order, offsets, slots),
          b.g.groupedLinear(z, b.weight("open", [experts, n, k], dtype), order, offsets, slots),
        );
        const weights = b.input("weights", [symbol("rows"), slots], noise(rows * slots, 99));
        return b.done(
          `groupedLinear ${dtype} rows ${rows} experts ${experts}`,
          [h, b.g.combine(y, weights), gated],
          { rows },
          dtype === "f32" || dtype === "f16" ? 2e-6 : 4e-3,
        );
      }),
    ),
  );
}

function rowOps(dtypes: readonly MatrixDtype[]): Case[] {
  return RAGGED.flatMap((rows) => {
    const embeds = dtypes.map((dtype) => {
      const b = new Builder();
      const ids = b.input(
        "ids",
        [symbol("rows")],
        Int32Array.from({ length: rows }, (_, i) => (i * 37) % 53),
      );
      return b.done(`embed ${dtype} rows ${rows}`, [b.g.embed(ids, b.weight("table", [53, 71], dtype))], { rows }, 1e-7);
    });
    const others = RAGGED.map((n) => {
      const b = new Builder();
      const [x, z] = [b.rows("x", rows, n), b.rows("z", rows, n)];
      const norm = b.g.rmsNorm(x, b.weight("norm", [n]), 1e-5);
      const index = b.input("index", [symbol("outs")], Int32Array.from([rows - 1, 0, rows >> 1]));
      return b.done(
        `rmsNorm add siluMul gather rows ${rows} width ${n}`,
        [norm, b.g.add(x, z), b.g.siluMul(x, z), b.g.gather(x, index)],
        { rows, outs: 3 },
        1e-6,
      );
    });
    const fused = RAGGED.map((n) => {
      const b = new Builder();
      const sum = b.g.add(b.rows("a", rows, n), b.rows("b", rows, n));
      const normed = b.g.rmsNorm(sum, b.weight("norm", [n]), 1e-5);
      const picked = Int32Array.from({ length: Math.ceil(rows / 3) }, (_, i) => i * 3);
      const by = b.input("by", [symbol("embedded"), n], noise(picked.length * n, 77));
      const replaced = b.g.replaceRows(b.g.scale(normed, -0.3), by, b.input("index", [symbol("embedded")], picked));
      return b.done(
        `add rmsNorm scale replaceRows rows ${rows} width ${n}`,
        [sum, normed, replaced],
        { rows, embedded: picked.length },
        1e-6,
      );
    });
    const shaped = RAGGED.map((n) => {
      const b = new Builder();
      const x = b.rows("x", rows, n * 6);
      const cube = b.g.reshape(x, [symbol("rows"), n, 3, 2]);
      const turned = b.g.transpose(cube, 1, 2);
      const part = b.g.slice(turned, 1, 1, 2);
      const flat = b.g.reshape(part, [symbol("rows"), n * 4]);
      return b.done(`reshape transpose slice rows ${rows} width ${n}`, [cube, turned, part, b.g.scale(flat, 2)], { rows }, 0);
    });
    const turned = [2, 10, 64, 128].map((dim) => {
      const b = new Builder();
      const positions = b.input(
        "positions",
        [symbol("rows")],
        Int32Array.from({ length: rows }, (_, i) => i * 3),
      );
      return b.done(
        `angles rope rows ${rows} dim ${dim}`,
        [b.g.rope(b.rows("x", rows, dim * 3), b.g.angles(positions, dim, 500000))],
        { rows },
        1e-5,
      );
    });
    return [...embeds, ...others, ...fused, ...shaped, ...turned];
  }).concat(farGates());
}

/** Gates whose exponential overflows float32. */
function farGates(): Case {
  const b = new Builder();
  const steps = Float32Array.from({ length: 45 }, (_, i) => (i - 22) * 10);
  const gate = b.input("gate", [symbol("rows"), 45], steps);
  return b.done(
    "siluMul far gates",
    [
      b.g.siluMul(
        gate,
        b.input(
          "up",
          [symbol("rows"), 45],
          steps.map(() => 1),
        ),
      ),
    ],
    { rows: 1 },
    1e-6,
  );
}

function routers(): Case[] {
  return RAGGED.flatMap((rows) =>
    [
      [7, 2, 44, 0.45],
      [64, 6, 130, 1e-12],
      [3, 3, 9, 0],
    ].map(([experts, k, hidden, normMin]) => {
      const b = new Builder();
      const r = b.g.route(b.rows("x", rows, hidden), b.weight("gate", [experts, hidden]), b.weight("bias", [experts]), k, normMin);
      return b.done(`route rows ${rows} experts ${experts} of ${k}`, [r.logits, r.experts, r.weights], { rows }, 2e-6);
    }),
  );
}

/** Low-rank branches of the rows that have an adapter, beside one matrix and beside each expert's; and the addition in and out of place. */
function branches(): Case[] {
  return RAGGED.map((rows) => {
    const [adapters, experts, chosen, n, k, rank] = [3, 5, 2, 37, 44, 16];
    const b = new Builder();
    const picked = Int32Array.from({ length: Math.ceil(rows / 3) }, (_, i) => rows - 1 - i * 3); // in no order
    const m = picked.length;
    const adapted = b.input("adapted", [symbol("adapted")], picked);
    const ids = b.input(
      "ids",
      [symbol("adapted"), 1],
      picked.map((r) => (r * 7) % adapters),
    );
    const x = b.rows("x", rows, k);
    const own = b.g.group(ids, adapters);
    const low = b.g.groupedLinear(b.g.gather(x, adapted), b.weight("A", [adapters, rank, k]), own.order, own.offsets, 1);
    const up = b.g.groupedLinear(low, b.weight("B", [adapters, n, rank]), own.order, own.offsets, 1);
    const base = b.g.linear(x, b.weight("w", [n, k]));
    const summed = b.g.addRows(base, up, adapted);

    const routed = Int32Array.from({ length: rows * chosen }, (_, i) => (Math.floor(i / chosen) * 3 + (i % chosen) * 2) % experts);
    const { keys, slots } = b.g.adaptedSlots(b.input("experts", [symbol("rows"), chosen], routed), adapted, ids, experts);
    const each = b.g.group(keys, adapters * experts);
    const product = b.g.groupedLinear(
      b.g.gather(x, adapted),
      b.weight("experts.A", [adapters * experts, n, k]),
      each.order,
      each.offsets,
      chosen,
    );
    const spread = b.input("slots", [symbol("rows", chosen), n], noise(rows * chosen * n, 55));
    const added = b.g.addRows(b.g.scale(spread, 0.5), product, slots);
    return b.done(`addRows adaptedSlots rows ${rows}`, [base, summed, keys, slots, added], { rows, adapted: m }, 2e-6);
  });
}

/** Several sequences, the first tokens of each written as if by an earlier step, with unordered pages. */
function attentions(): Case[] {
  const kinds = [
    ["f32", 2e-6],
    ["f16", 2e-3],
    ["int8kv", 1e-3],
  ] as const;
  return kinds.flatMap(([dtype, tolerance]) =>
    [
      [4, 2, 16],
      [3, 1, 10],
      [5, 5, 33],
      [10, 2, 128],
    ].flatMap(([heads, kvHeads, dim]) =>
      [[1], [7, 1], [31, 33, 2], [100], [257]].map((counts) => {
        const b = new Builder();
        const rows = counts.reduce((a, c) => a + c);
        const pagesEach = Math.ceil(Math.max(...counts) / 32);
        const segments = b.input(
          "segments",
          [symbol("sequences"), 3],
          Int32Array.from(counts.flatMap((c, s) => [counts.slice(0, s).reduce((a, d) => a + d, 0), c, 0])),
        );
        const blocks = counts.length * pagesEach + 1;
        const pages = b.input(
          "pages",
          [symbol("sequences"), symbol("pages")],
          Int32Array.from({ length: counts.length * pagesEach }, (_, i) => blocks - 1 - i),
        );
        const half = (name: string) => b.state(name, [blocks, BLOCK_TOKENS, kvHeads, dim], dtype);
        const cache = { keys: half("keys"), values: half("values") };
        b.g.cacheWrite(b.rows("k", rows, kvHeads * dim), b.rows("v", rows, kvHeads * dim), cache, segments, pages);
        const read = (state: Tensor) => b.g.cacheRead(state, segments, pages, symbol("context"));
        const { y } = b.g.attention(b.rows("q", rows, heads * dim), read(cache.keys), read(cache.values), segments, dim);
        return b.done(
          `attention ${dtype} heads ${heads}/${kvHeads} dim ${dim} rows ${counts}`,
          [y],
          { rows, sequences: counts.length, pages: pagesEach, context: rows },
          tolerance,
        );
      }),
    ),
  );
}

function samplers(): Case[] {
  const controls: Partial<Sampling>[] = [
    {},
    { temperature: 0.7 },
    { temperature: 1, topK: 5 },
    { temperature: 1, topP: 0.5 },
    { temperature: 1, minP: 0.2 },
    { repetitionPenalty: 1.3 },
    { presencePenalty: 0.5, frequencyPenalty: 0.25 },
    { noRepeatNgram: 2 },
    {
      temperature: 0.9,
      topK: 20,
      topP: 0.8,
      minP: 0.05,
      repetitionPenalty: 1.1,
      logitBias: new Map([
        [3, 2],
        [4, Number.NEGATIVE_INFINITY],
      ]),
      seed: 7,
    },
    { temperature: 2, topK: 1000, seed: 2 ** 45 + 3 },
  ];
  return [33, 257, 3001].map((vocab) => {
    const b = new Builder();
    const outs = controls.length;
    const tokens = Array.from({ length: 40 }, (_, i) => (i * i) % vocab);
    const laid = layOut(
      controls.map((c, i) => ({ sampling: { ...GREEDY, ...c }, tokens, promptCount: 20, mask: i % 3 === 1 ? someOf(vocab, i) : null })),
    );
    const logits = b.input(
      "logits",
      [symbol("outs"), vocab],
      noise(outs * vocab, 5).map((x) => x * (vocab > 1000 ? 40 : 4)), // few of many tokens matter, and all of few
    );
    const sampling = {
      floats: b.input("floats", [symbol("outs"), SAMPLING_FLOATS.length], laid.floats),
      ints: b.input("ints", [symbol("outs"), SAMPLING_INTS.length], laid.ints),
      history: b.input("history", [symbol("history")], laid.history),
      biasIds: b.input("biasIds", [symbol("biases")], laid.biasIds),
      biasValues: b.input("biasValues", [symbol("biases")], laid.biasValues),
      masks: b.input("masks", [symbol("masks"), Math.ceil(vocab / 32)], laid.masks),
    };
    const processed = b.g.processLogits(logits, sampling);
    const { ids, logprobs } = b.g.sample(logits, processed, sampling);
    return b.done(
      `processLogits sample vocabulary ${vocab}`,
      [processed, ids, logprobs],
      { outs, history: laid.history.length, biases: laid.biasIds.length, masks: laid.masks.length / Math.ceil(vocab / 32) },
      1e-6,
    );
  });
}

/** A mask that allows about half of the ids. */
function someOf(vocab: number, seed: number): Int32Array {
  return Int32Array.from(noise(Math.ceil(vocab / 32), seed), (x) => Math.trunc(x * 2 ** 31));
}

function alternatives(): Case[] {
  return [
    [33, 33],
    [257, 8],
    [3001, 20],
  ].map(([vocab, k]) => {
    const b = new Builder();
    // Rounded, so that there are ties.
    const logits = b.input(
      "logits",
      [symbol("outs"), vocab],
      noise(5 * vocab, 6).map((x) => Math.round(x * 40) / 8),
    );
    const { ids, logprobs } = b.g.topLogprobs(logits, k);
    return b.done(`topLogprobs ${k} of ${vocab}`, [ids, logprobs], { outs: 5 }, 1e-6);
  });
}
