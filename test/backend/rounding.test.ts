// Rounding to int4 by what a matrix sees, against a plain version in float64 of what it should do, and against rounding alone.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { convertStored, inputMoments, roundStored } from "../../src/backend/native.ts";
import { fromF16 } from "../../src/tensor/dtype.ts";
import { blockBytes, locateElement } from "../../src/tensor/quantized.ts";

const folder = mkdtempSync(join(tmpdir(), "mixtape-rounding-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** Repeatable numbers, about normal. */
function noise(seed: number) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32 - 0.5;
  };
  return () => uniform() + uniform() + uniform();
}

/** Inputs [rows, k] with columns that depend on each other, some of them far larger than others. */
function inputs(rows: number, k: number, seed: number): Float32Array {
  const next = noise(seed);
  const x = new Float32Array(rows * k);
  const mix = Float32Array.from({ length: 4 * k }, next);
  for (let r = 0; r < rows; r++) {
    const hidden = [next(), next(), next(), next()];
    for (let c = 0; c < k; c++) {
      const common = hidden.reduce((sum, h, j) => sum + h * mix[j * k + c], 0);
      x[r * k + c] = (3 * common + next()) * (c % 17 === 0 ? 6 : 1);
    }
  }
  return x;
}

let files = 0;
function stored(w: Float32Array, n: number, k: number) {
  const file = join(folder, `w${files++}`);
  writeFileSync(file, new Uint8Array(w.buffer));
  return { file, offset: 0, bytes: w.byteLength, name: "w", stored: "f32" as const, n, to: new Uint8Array(blockBytes("int4", n, k)) };
}

function expand(m: Uint8Array, n: number, k: number): Float32Array {
  const view = new DataView(m.buffer);
  return Float32Array.from({ length: n * k }, (_, i) => {
    const { byte, highNibble, scale } = locateElement("int4", k, Math.floor(i / k), i % k);
    return ((highNibble ? m[byte] >> 4 : m[byte] & 15) - 8) * fromF16(view.getUint16(scale, true));
  });
}

/** Sum of squared changes of the products with rows of x. */
function damage(w: Float32Array, rounded: Float32Array, x: Float32Array, n: number, k: number, shares?: Float32Array): number {
  let sum = 0;
  for (let t = 0; t < x.length / k; t++)
    for (let r = 0; r < n; r++) {
      let y = 0;
      for (let c = 0; c < k; c++) y += (w[r * k + c] - rounded[r * k + c]) * x[t * k + c];
      sum += (y * (shares?.[t] ?? 1)) ** 2;
    }
  return sum;
}

async function both(n: number, k: number, tokens: number) {
  const next = noise(n * k);
  const w = Float32Array.from({ length: n * k }, () => 0.05 * next());
  const x = inputs(tokens, k, 5);
  const part = stored(w, n, k);
  const rows = Int32Array.from({ length: tokens }, (_, r) => r);
  await roundStored([part], { x, k, rows, shares: new Float32Array(), common: null });
  const alone = new Uint8Array(part.to.length);
  await convertStored(part, "f32", "int4", n, k, alone);
  return { w, x, part, rows, compensated: expand(part.to, n, k), alone: expand(alone, n, k) };
}

/** Rounds a row with the scales given, columns in the order given, as https://arxiv.org/abs/2307.13304 (LDLQ) writes it, in float64. */
function plainly(row: Float32Array, h: Float64Array, scales: Float32Array, order: readonly number[]): Float64Array {
  const k = row.length;
  const at = (i: number, j: number) => h[order[i] * k + order[j]];
  // h = (1 + u) d (1 + u)^T, u strictly upper, from the last column to the first
  const u = Array.from({ length: k }, () => new Float64Array(k));
  const d = new Float64Array(k);
  for (let j = k - 1; j >= 0; j--) {
    d[j] = at(j, j);
    for (let p = j + 1; p < k; p++) d[j] -= u[j][p] ** 2 * d[p];
    for (let i = 0; i < j; i++) {
      let sum = at(i, j);
      for (let p = j + 1; p < k; p++) sum -= u[i][p] * u[j][p] * d[p];
      u[i][j] = sum / d[j];
    }
  }
  const error = new Float64Array(k);
  const result = new Float64Array(k);
  for (let j = 0; j < k; j++) {
    let target = row[order[j]];
    for (let i = 0; i < j; i++) target += error[i] * u[i][j];
    const scale = scales[order[j]];
    const q = scale === 0 ? 0 : Math.min(7, Math.max(-8, Math.round(target / scale)));
    result[order[j]] = q * scale;
    error[j] = row[order[j]] - q * scale;
  }
  return result;
}

test.each([
  [32, 64, 400],
  [21, 70, 400], // fills neither tiles nor groups
  [3, 200, 300],
])("a matrix [%i, %i] that sees %i rows: its products change by less than half of what rounding alone costs", async (n, k, tokens) => {
  const { w, x, compensated, alone } = await both(n, k, tokens);
  expect(damage(w, compensated, x, n, k)).toBeLessThan(0.5 * damage(w, alone, x, n, k));
});

test("what is stored is what the sequential rule gives with the same scales", async () => {
  const [n, k, tokens] = [16, 96, 500];
  const { w, x, part, compensated } = await both(n, k, tokens);
  const h = new Float64Array(k * k);
  for (let t = 0; t < tokens; t++) for (let i = 0; i < k; i++) for (let j = 0; j < k; j++) h[i * k + j] += x[t * k + i] * x[t * k + j];
  const mean = Array.from({ length: k }, (_, i) => h[i * k + i]).reduce((a, b) => a + b) / k;
  for (let i = 0; i < k; i++) h[i * k + i] += 0.01 * mean;
  const size = (i: number) => h[i * k + i];
  const group = (i: number) => Math.floor(i / 32);
  const sums = Array.from({ length: 3 }, (_, g) => Array.from({ length: 32 }, (_, i) => size(g * 32 + i)).reduce((a, b) => a + b));
  const order = Array.from({ length: k }, (_, i) => i).sort((a, b) => sums[group(b)] - sums[group(a)] || size(b) - size(a));
  const view = new DataView(part.to.buffer);
  let same = 0;
  for (let r = 0; r < n; r++) {
    const scales = Float32Array.from({ length: k }, (_, c) => fromF16(view.getUint16(locateElement("int4", k, r, c).scale, true)));
    const expected = plainly(w.subarray(r * k, (r + 1) * k), h, scales, order);
    for (let c = 0; c < k; c++) same += Math.abs(expected[c] - compensated[r * k + c]) < 1e-6 ? 1 : 0;
  }
  expect(same / (n * k)).toBeGreaterThan(0.99); // float32 decides some ties otherwise, and what follows them
});

test("rows beyond the matrix and columns beyond it are zero", async () => {
  const [n, k] = [5, 40];
  const { part } = await both(n, k, 200);
  const padded = expand(part.to, 16, 64);
  for (let r = 0; r < 16; r++) for (let c = 0; c < 64; c++) if (r >= n || c >= k) expect(padded[r * 64 + c]).toBeCloseTo(0, 12);
});

test("rows weigh by their shares, and the same input gives the same bytes", async () => {
  const [n, k, tokens] = [16, 64, 400];
  const { w, x, part, rows, compensated } = await both(n, k, tokens);
  const shares = Float32Array.from({ length: tokens }, (_, t) => (t < 40 ? 3 : 0.02));
  const weighed = { ...part, to: new Uint8Array(part.to.length) };
  const again = { ...part, to: new Uint8Array(part.to.length) };
  await roundStored([weighed], { x, k, rows, shares, common: null });
  await roundStored([again], { x, k, rows, shares, common: null });
  expect(again.to).toEqual(weighed.to);
  expect(damage(w, expand(weighed.to, n, k), x, n, k, shares)).toBeLessThan(0.9 * damage(w, compensated, x, n, k, shares));
});

test("without rows the common moments decide", async () => {
  const [n, k, tokens] = [16, 64, 400];
  const { w, x, part, alone } = await both(n, k, tokens);
  const unseen = { ...part, to: new Uint8Array(part.to.length) };
  const nothing = { rows: new Int32Array(), shares: new Float32Array() };
  await roundStored([unseen], { x, k, ...nothing, common: await inputMoments(x, k, 0.1) });
  expect(damage(w, expand(unseen.to, n, k), x, n, k)).toBeLessThan(0.5 * damage(w, alone, x, n, k));
  await roundStored([unseen], { x, k, ...nothing, common: null });
  expect(damage(w, expand(unseen.to, n, k), x, n, k)).toBeLessThan(1.2 * damage(w, alone, x, n, k));
});

test("inputs that are not finite are an error that names the tensor, and rows outside of x another", async () => {
  const { x, part, rows } = await both(4, 64, 100);
  const bad = x.slice();
  bad[70] = Number.NaN;
  await expect(roundStored([part], { x: bad, k: 64, rows, shares: new Float32Array(), common: null })).rejects.toThrow(
    /w\d+: tensor w sees inputs that are not finite/,
  );
  await expect(roundStored([part], { x, k: 64, rows: Int32Array.of(100), shares: new Float32Array(), common: null })).rejects.toThrow(
    "internal: round: row 100 is not in x",
  );
});
