/** The test cases of training's kernels: products of many rows, gradients, the loss, and the optimiser's updates. */
import { BACKWARD } from "../../src/graph/call.ts";
import type { Tensor } from "../../src/graph/graph.ts";
import { symbol } from "../../src/tensor/shape.ts";
import { Builder, type Case, MATRIX_DTYPES, noise, RAGGED } from "./builder.ts";

export function trainingCases(): Case[] {
  return [
    ...products(),
    ...groupedProducts(),
    ...sequences(),
    ...rowOps(),
    ...mixtures(),
    ...losses(),
    ...updates(),
    ...roundedUpdates(),
    ...methods(),
  ];
}

/** Traces calls as gradients, so that backends see a training step. */
function gradients(b: Builder, op: string, inputs: readonly (Tensor | undefined)[], params = {}, sizes = {}): Tensor[] {
  return b.g.within(`${BACKWARD}layers.0`, () => b.g.call(op, inputs, params, sizes));
}

function products(): Case[] {
  const shapes = [
    [1, 1, 1],
    [7, 7, 33],
    [31, 16, 64],
    [33, 33, 31],
    [257, 48, 320],
    [700, 77, 1100],
    [1050, 530, 40], // more than a piece of each side
  ];
  const formats = [...MATRIX_DTYPES.map((dtype) => [dtype, false] as const), ["bf16", true] as const];
  return formats.flatMap(([dtype, narrow]) =>
    shapes.map(([rows, n, k]) => {
      const b = new Builder();
      const [x, dy] = [b.rows("x", rows, k), b.rows("dy", rows, n)];
      const w = b.weight("w", [n, k], dtype);
      const [half, dHalf] = narrow ? [x, dy].map((t) => gradients(b, "castBf16", [t])[0]) : [x, dy];
      // With int8 and int4 matrices the forward product is the one of serving, which has cases of its own.
      const y = dtype === "int8" || dtype === "int4" ? [] : [b.g.linear(half, w, n % 2 ? b.weight("bias", [n]) : undefined)];
      const back = gradients(b, "linearT", [dHalf, w]);
      const outer = gradients(b, "outer", [dHalf, half]);
      const sums = gradients(b, "sumRows", [dy]);
      // Narrow products become part of a sum: in place of what is added, or beside it if that is read again.
      const [base, dBase] = [b.rows("base", rows, n), b.rows("dBase", rows, k)];
      const added = y.length ? [b.g.add(b.g.scale(base, 1), b.g.linear(half, w)), b.g.add(base, b.g.linear(half, w))] : [];
      added.push(b.g.add(dBase, gradients(b, "linearT", [dHalf, w])[0]));
      return b.done(
        `training: products ${dtype}${narrow ? " narrow" : ""} rows ${rows} [${n},${k}]`,
        [...y, ...back, ...outer, ...sums, ...added],
        { rows },
        narrow ? 1e-5 : 2e-6,
      );
    }),
  );
}

function groupedProducts(): Case[] {
  const shapes = [
    [1, 5, 2, 19, 44],
    [33, 8, 3, 33, 65],
    [257, 3, 2, 48, 300],
  ];
  const formats = [...MATRIX_DTYPES.map((dtype) => [dtype, false] as const), ["bf16", true] as const];
  return formats.flatMap(([dtype, narrow]) =>
    shapes.map(([rows, experts, slots, n, k]) => {
      const b = new Builder();
      // Some rows choose an expert twice, and the last expert is chosen by none.
      const chosen = Int32Array.from(
        { length: rows * slots },
        (_, i) => (Math.floor(i / slots) * 5 + (i % slots) * 2 + (i % 3)) % (experts - 1),
      );
      const { order, offsets } = b.g.group(b.input("experts", [symbol("rows"), slots], chosen), experts);
      const x = b.rows("x", rows, k);
      const dy = b.input("dy", [symbol("rows", slots), n], noise(rows * slots * n, 50));
      const w = b.weight("w", [experts, n, k], dtype);
      const [half, dHalf] = narrow ? [x, dy].map((t) => gradients(b, "castBf16", [t])[0]) : [x, dy];
      const y = b.g.groupedLinear(half, w, order, offsets, slots, b.weight("bias", [experts, n]));
      const back = gradients(b, "groupedLinearT", [dHalf, w, order, offsets], { slots }, { rows: symbol("rows") });
      const single = gradients(b, "groupedLinearT", [dHalf, w, order, offsets], { slots: 1 }, { rows: symbol("rows", slots) });
      const outer = gradients(b, "groupedOuter", [dHalf, half, order, offsets], { slots });
      const sums = gradients(b, "groupedSumRows", [dy, order, offsets]);
      const added = b.g.add(dy, b.g.groupedLinear(half, w, order, offsets, slots));
      return b.done(
        `training: grouped products ${dtype}${narrow ? " narrow" : ""} rows ${rows} experts ${experts}`,
        [y, ...back, ...single, ...outer, ...sums, added],
        { rows },
        narrow ? 1e-5 : 2e-6,
      );
    }),
  );
}

/** Sequences that are whole, and one that continues an earlier part. */
function sequences(): Case[] {
  const segments = [
    [[1, 1]],
    [
      [7, 0],
      [1, 0],
    ],
    [
      [31, 5],
      [33, 0],
      [2, 0],
    ],
    [[150, 0]],
    [
      [130, 140],
      [260, 0],
    ],
  ]; // rows, position
  return [
    [4, 2, 16],
    [3, 1, 10],
    [5, 5, 33],
  ].flatMap(([heads, kvHeads, dim]) =>
    segments.flatMap((parts) =>
      [
        [1, false],
        [0, false],
        [1, true],
      ].map(([causal, pairs]) => {
        const b = new Builder();
        const rows = parts.reduce((sum, [count]) => sum + count, 0);
        const context = parts.reduce((sum, [count, position]) => sum + count + position, 0);
        const first = (s: number) => parts.slice(0, s).reduce((sum, [count]) => sum + count, 0);
        const table = b.input(
          "segments",
          [symbol("sequences"), 3],
          Int32Array.from(parts.flatMap(([count, position], s) => [first(s), count, position])),
        );
        const keys = (name: string, seed: number) =>
          b.input(name, [symbol("context"), kvHeads * dim], noise(context * kvHeads * dim, seed));
        const [q, k, v] = [b.rows("q", rows, heads * dim), keys("k", 60), keys("v", 61)];
        const params = { dim, causal: Number(causal), pairs: Number(pairs) };
        const [y, logsumexp] = b.g.call("attention", [q, k, v, table], params);
        const back = gradients(b, "attentionGrad", [b.rows("dy", rows, heads * dim), q, k, v, y, logsumexp, table], params);
        return b.done(
          `training: attention heads ${heads}/${kvHeads} dim ${dim} ${causal ? "causal" : "full"}${pairs ? " in pairs" : ""} ${parts.map((p) => p.join("@"))}`,
          [y, logsumexp, ...back],
          { rows, context, sequences: parts.length },
          pairs ? 4e-5 : 4e-6,
        );
      }),
    ),
  );
}

function rowOps(): Case[] {
  return RAGGED.flatMap((rows) =>
    [2, 31, 130].map((n) => {
      const b = new Builder();
      const [x, dy, z] = [b.rows("x", rows, n), b.rows("dy", rows, n), b.rows("z", rows, n)];
      const picked = Int32Array.from({ length: Math.ceil(rows / 3) }, (_, i) => i * 3);
      const index = b.input("index", [symbol("picked")], picked);
      const ids = b.input(
        "ids",
        [symbol("rows")],
        Int32Array.from({ length: rows }, (_, i) => (i * 7) % 5), // rows are added to the same row
      );
      const angles = b.g.angles(ids, 2, 100);
      const seed = b.input("seed", [2], Int32Array.of(12345, -7));
      const wide = b.rows("wide", rows, 2 * n);
      const half = b.g.call("castBf16", [x])[0];
      const short = b.g.call("castF16", [x])[0];
      return b.done(
        `training: row ops rows ${rows} width ${n}`,
        [
          ...gradients(b, "rmsNormGradX", [dy, x, b.weight("norm", [n])], { eps: 1e-3 }),
          ...gradients(b, "rmsNormGradW", [dy, x], { eps: 1e-3 }),
          ...gradients(b, "siluMulGrad", [dy, x, z]),
          ...gradients(b, "ropeT", [wide, angles]),
          ...gradients(b, "scatterRows", [dy, ids], {}, { rows: 5 }),
          ...gradients(b, "zeroRows", [b.g.scale(x, 1), index]),
          ...gradients(b, "scaleBy", [x, b.input("by", [1], Float32Array.of(-0.3))]),
          ...gradients(b, "fill", [], { value: 0.7 }, { n }),
          b.g.dot(b.input("a", [n], noise(n, 70)), b.input("b", [n], noise(n, 71))),
          b.g.dropout(x, seed, 0.3, 4),
          b.g.dropout(x, seed, 0, 5),
          b.g.call("castF32", [half])[0],
          b.g.call("castF32", [short])[0],
          b.g.call("castF32", [b.g.call("castF16", [half])[0]])[0],
          ...gradients(b, "pad", [x], { axis: 0, start: 2 }, { count: rows + 3 }),
          ...gradients(b, "pad", [x], { axis: 1, start: 1 }, { count: n + 1 }),
        ],
        { rows, picked: picked.length },
        2e-6,
      );
    }),
  );
}

function mixtures(): Case[] {
  return RAGGED.flatMap((rows) =>
    [
      [7, 2, 44, 0.45],
      [64, 6, 130, 1e-12],
      [3, 3, 9, 0],
    ].map(([experts, k, n, normMin]) => {
      const b = new Builder();
      const r = b.g.route(b.rows("x", rows, n), b.weight("gate", [experts, n]), b.weight("bias", [experts]), k, normMin);
      const dWeights = b.rows("dWeights", rows, k);
      const dy = b.rows("dy", rows, n);
      const slots = b.input("slots", [symbol("rows", k), n], noise(rows * k * n, 80));
      return b.done(
        `training: mixture rows ${rows} experts ${experts} of ${k}`,
        [
          ...gradients(b, "routeGrad", [dWeights, r.logits, r.experts, r.weights], { normMin }),
          ...gradients(b, "spread", [dy, dWeights]),
          ...gradients(b, "slotDots", [dy, slots], { k }),
        ],
        { rows },
        1e-5, // differences of nearly equal numbers
      );
    }),
  );
}

function losses(): Case[] {
  const shapes = [
    [1, 2, 7],
    [7, 33, 64],
    [33, 700, 70],
    [1100, 300, 20], // more rows than are computed together
  ];
  const formats = [...MATRIX_DTYPES.map((dtype) => [dtype, false] as const), ["bf16", true] as const];
  return formats.flatMap(([dtype, narrow]) =>
    shapes.map(([rows, vocab, k], i) => {
      const b = new Builder();
      const x = b.rows("x", rows, k);
      const half = narrow ? gradients(b, "castBf16", [x])[0] : x;
      const head = b.weight("head", [vocab, k], dtype);
      const bias = i % 2 ? b.weight("bias", [vocab]) : undefined;
      const labels = b.input(
        "labels",
        [symbol("rows")],
        Int32Array.from({ length: rows }, (_, r) => (r % 5 === 2 ? -1 - (r % 3) : (r * 37) % vocab)),
      );
      const [loss, logsumexp] = b.g.call("crossEntropy", [half, head, labels, bias], { chunk: 128 });
      const dy = b.input("dy", [symbol("rows")], noise(rows, 90));
      const rank = [1, 3, 8, 40][i];
      const low = b.rows("low", rows, rank);
      const up = b.weight("up", [vocab, rank], narrow ? "bf16" : "f32");
      const adapted = b.g.call("adaptedCrossEntropy", [half, head, labels, low, up, bias], { chunk: 128 });
      const inputs = [dy, half, head, labels, adapted[1], low, up, bias];
      const beside = [...adapted, ...gradients(b, "adaptedCrossEntropyGrad", inputs, { chunk: 128 })];
      const back = (head_: number) =>
        gradients(b, "crossEntropyGrad", [dy, half, head, labels, logsumexp, bias], { chunk: 128, head: head_ });
      return b.done(
        `training: crossEntropy ${dtype}${narrow ? " narrow" : ""} rows ${rows} vocabulary ${vocab}`,
        [loss, logsumexp, ...back(1), ...back(0), ...beside],
        { rows },
        narrow ? 5e-3 : 5e-6, // gradients are rounded to bfloat16, which is not the same number when they differ in the last bit
      );
    }),
  );
}

function updates(): Case[] {
  const rates = Float32Array.of(1e-2, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05);
  return [1, 33, 70000].map((n) => {
    const b = new Builder();
    const [parameter, m, v, total] = ["parameter", "m", "v", "total"].map((name) => b.state(name, [n], "f32"));
    const given = (name: string, seed: number) => b.input(name, [n], noise(n, seed));
    const [first, second] = [given("first", 91), given("second", 92)];
    const [norm] = b.g.call("norm", [first, second, b.input("more", [3, 5], noise(15, 93))]);
    const [factor] = b.g.call("clip", [norm], { max: 1 });
    const [none] = b.g.call("clip", [norm], { max: 1e6 });
    const steps = b.input("rates", [rates.length], rates);
    b.g.call("adamw", [parameter, first, m, v, steps, factor]);
    b.g.call("adamw", [parameter, second, m, v, steps]);
    b.g.call("accumulate", [total, first]);
    b.g.call("accumulate", [total, second]);
    const sum = b.g.scale(total, 1);
    b.g.call("clear", [total]);
    return b.done(
      `training: updates of ${n} numbers`,
      [norm, factor, none, b.g.scale(parameter, 1), b.g.scale(m, 1), b.g.scale(v, 1), sum, b.g.scale(total, 1)],
      {},
      2e-6,
    );
  });
}

/** Steps with moments in 8 bits. */
function roundedUpdates(): Case[] {
  const rates = Float32Array.of(1e-2, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05);
  return [1, 257, 70000].map((n) => {
    const b = new Builder();
    const parameter = b.state("parameter", [n], "f32");
    const codes = ["m", "v"].map((name) => b.state(name, [Math.ceil(n / 4)], "i32"));
    const scales = ["mScales", "vScales"].map((name) => b.state(name, [Math.ceil(n / 256)], "f32"));
    const steps = b.input("rates", [rates.length], rates);
    const factor = b.input("factor", [1], Float32Array.of(0.5));
    const passed: Tensor[] = [];
    for (const [i, given] of [factor, undefined, factor].entries()) {
      // Magnitudes of several decades, and a block of zeros.
      const numbers = noise(n, 96 + i).map((x, at) => (at >= 512 && at < 768 ? 0 : x * 10 ** -(at % 5)));
      b.g.call("adamw8bit", [parameter, b.input(`gradient${i}`, [n], numbers), ...codes, ...scales, steps, given]);
      passed.push(b.g.scale(parameter, 1));
    }
    return b.done(
      `training: updates of ${n} numbers in 8 bits`,
      [...passed, ...scales.map((t) => b.g.scale(t, 1))],
      {},
      1e-3, // of two levels that are equally near, rounding decides
    );
  });
}

/** Magnitudes of matrices in each format, elementwise losses, and the routers' losses. */
function methods(): Case[] {
  const shapes = [
    [1, 5, 3, 1],
    [7, 33, 70, 4],
    [130, 48, 320, 16],
  ];
  const magnitudes = MATRIX_DTYPES.flatMap((dtype) =>
    shapes.map(([rows, n, k, rank]) => {
      const b = new Builder();
      const pair = (...stack: number[]) =>
        [
          [...stack, rank, k],
          [...stack, n, rank],
        ].map((shape, i) => b.weight(`pair${stack.length}${i}`, shape));
      const [a, low] = pair();
      const [as, lows] = pair(3);
      const one = b.g.inverseNorms(b.weight("w", [n, k], dtype), a, low, 0.7);
      const each = b.g.inverseNorms(b.weight("stack", [3, n, k], dtype), as, lows, 0.7);
      const x = b.rows("x", rows, n);
      const bias = b.weight("bias", [n]);
      return b.done(
        `training: magnitudes ${dtype} rows ${rows} [${n},${k}]`,
        [one, each, b.g.scaleColumns(x, one, bias), b.g.scaleColumns(x, bias)],
        { rows },
        4e-6,
      );
    }),
  );
  const routers = RAGGED.flatMap((rows) =>
    [
      [3, 1],
      [33, 6],
    ].map(([experts, k]) => {
      const b = new Builder();
      const logits = b.rows("logits", rows, experts);
      const { load, probability, z } = b.g.routerLoad(logits, k);
      const far = b.input(
        "far",
        [symbol("rows"), experts],
        noise(rows * experts, 94).map((x) => x * 100),
      );
      const back = gradients(b, "routerLoadGrad", [
        b.input("dp", [experts], noise(experts, 95)),
        b.input("dz", [1], Float32Array.of(0.4)),
        logits,
      ]);
      return b.done(
        `training: routers' losses rows ${rows} experts ${experts}`,
        [load, probability, z, ...back, b.g.softplus(far), ...gradients(b, "softplusGrad", [logits, far]), b.g.mul(logits, far)],
        { rows },
        4e-6,
      );
    }),
  );
  return [...magnitudes, ...routers];
}
