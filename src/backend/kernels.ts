/** The reference backend's kernels: one function an op, the definition of what it computes. */
import { type OpName, type Params, SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops.ts";
import { type Dtype, roundBf16 } from "../tensor/dtype.ts";
import { GROUP, roundActivations } from "../tensor/quantized.ts";
import type { Numbers } from "./backend.ts";

export interface Operand {
  readonly dims: readonly number[];
  readonly data: Numbers;
  readonly dtype: Dtype;
}

type Kernel = (inputs: readonly Operand[], outputs: readonly Operand[], params: Params) => void;

/** Every op's kernel. Values in half formats and int8 are held as the float32 numbers that they stand for. */
export const KERNELS: Record<OpName, Kernel> = {
  embed([ids, table], [y]) {
    const [n, width] = table.dims;
    ids.data.forEach((id, r) => {
      if (id < 0 || id >= n) throw new Error(`token id ${id} is outside the vocabulary of ${n}`);
      y.data.set(table.data.subarray(id * width, (id + 1) * width), r * width);
    });
  },

  rmsNorm([x, w], [y], { eps }) {
    const [rows, n] = x.dims;
    for (let r = 0; r < rows; r++) {
      const row = x.data.subarray(r * n, (r + 1) * n);
      let squares = 0;
      for (const v of row) squares += v * v;
      const scale = 1 / Math.sqrt(squares / n + eps);
      for (let i = 0; i < n; i++) y.data[r * n + i] = w.data[i] * row[i] * scale;
    }
  },

  toBf16Pair([x], [y]) {
    x.data.forEach((v, i) => {
      const first = roundBf16(v);
      y.data[i] = first + roundBf16(v - first);
    });
  },

  toInt8([x], [y]) {
    const [rows, k] = x.dims;
    for (let r = 0; r < rows; r++) y.data.set(rounded(x.data.subarray(r * k, (r + 1) * k), GROUP), r * k);
  },

  linear([x, w, bias], [y]) {
    const [rows, k] = x.dims;
    const n = w.dims[0];
    for (let r = 0; r < rows; r++)
      for (let j = 0; j < n; j++) y.data[r * n + j] = dot(x.data, r * k, w.data, j * k, k) + (bias ? bias.data[j] : 0);
  },

  groupedLinear([x, w, order, offsets, bias], [y], { slots }) {
    const [experts, n, k] = w.dims;
    for (let e = 0; e < experts; e++)
      for (let i = offsets.data[e]; i < offsets.data[e + 1]; i++) {
        const slot = order.data[i];
        for (let j = 0; j < n; j++)
          y.data[slot * n + j] = dot(x.data, Math.floor(slot / slots) * k, w.data, (e * n + j) * k, k) + (bias ? bias.data[e * n + j] : 0);
      }
  },

  gatedLinear([x, gate, up], [y]) {
    const [n, k] = gate.dims;
    for (let r = 0; r < x.dims[0]; r++)
      for (let j = 0; j < n; j++) y.data[r * n + j] = gated(dot(x.data, r * k, gate.data, j * k, k), dot(x.data, r * k, up.data, j * k, k));
  },

  groupedGatedLinear([x, gate, up, order, offsets], [y], { slots }) {
    const [experts, n, k] = gate.dims;
    for (let e = 0; e < experts; e++)
      for (let i = offsets.data[e]; i < offsets.data[e + 1]; i++) {
        const slot = order.data[i];
        const at = Math.floor(slot / slots) * k;
        for (let j = 0; j < n; j++)
          y.data[slot * n + j] = gated(dot(x.data, at, gate.data, (e * n + j) * k, k), dot(x.data, at, up.data, (e * n + j) * k, k));
      }
  },

  add([a, b], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = a.data[i] + b.data[i];
  },

  siluMul([gate, up], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = gated(gate.data[i], up.data[i]);
  },

  angles([positions], [y], { dim, theta }) {
    positions.data.forEach((position, r) => {
      for (let i = 0; i < dim; i += 2) {
        const frequency = Math.fround(1 / Math.fround(theta ** Math.fround(i / dim)));
        const angle = Math.fround(position * frequency);
        y.data[r * dim + i] = Math.cos(angle);
        y.data[r * dim + i + 1] = Math.sin(angle);
      }
    });
  },

  rope([x, angles], [y]) {
    const [rows, n] = x.dims;
    const dim = angles.dims[1];
    for (let r = 0; r < rows; r++)
      for (let i = 0; i < n; i += 2) {
        const [c, s] = [angles.data[r * dim + (i % dim)], angles.data[r * dim + (i % dim) + 1]];
        const [a, b] = [x.data[r * n + i], x.data[r * n + i + 1]];
        y.data[r * n + i] = a * c - b * s;
        y.data[r * n + i + 1] = b * c + a * s;
      }
  },

  cacheWrite([k, v, keys, values, segments, pages]) {
    const [, heads, tokens, dim] = values.dims;
    const inBytes = keys.dtype === "int8kv";
    forEachRow(segments, (s, row, position) => {
      const block = pageOf(pages, s, position, tokens) * heads * dim * tokens;
      const t = position % tokens;
      for (let h = 0; h < heads; h++) {
        const at = (row * heads + h) * dim;
        const [key, value] = [k, v].map(({ data }) => data.subarray(at, at + dim));
        const put = inBytes ? [rounded(key, GROUP), rounded(value, dim)] : [key, value];
        for (let d = 0; d < dim; d++) {
          keys.data[block + keyAt(keys, h, d, t)] = put[0][d];
          values.data[block + (h * tokens + t) * dim + d] = put[1][d];
        }
      }
    });
  },

  attention([q, keys, values, segments, pages], [y]) {
    const [, kvHeads, tokens, dim] = values.dims;
    const heads = q.dims[1] / dim;
    const inBytes = keys.dtype === "int8kv";
    forEachRow(segments, (s, row, position) => {
      for (let h = 0; h < heads; h++) {
        const kv = Math.floor(h / (heads / kvHeads));
        const at = (row * heads + h) * dim;
        const query = q.data.subarray(at, at + dim);
        const met = inBytes ? rounded(query, GROUP) : query;
        const scores: number[] = [];
        for (let t = 0; t <= position; t++) {
          const block = pageOf(pages, s, t, tokens) * kvHeads * dim * tokens;
          let score = 0;
          for (let d = 0; d < dim; d++) score += met[d] * keys.data[block + keyAt(keys, kv, d, t % tokens)];
          scores.push(score / Math.sqrt(dim));
        }
        const p = softmax(scores);
        for (let d = 0; d < dim; d++) {
          let sum = 0;
          for (let t = 0; t <= position; t++) {
            const block = pageOf(pages, s, t, tokens) * kvHeads * dim * tokens;
            sum += p[t] * values.data[block + (kv * tokens + (t % tokens)) * dim + d];
          }
          y.data[at + d] = sum;
        }
      }
    });
  },

  route([x, gate, bias], [logits, experts, weights], { k, normMin }) {
    const [count, hidden] = gate.dims;
    for (let r = 0; r < x.dims[0]; r++) {
      for (let e = 0; e < count; e++) logits.data[r * count + e] = dot(x.data, r * hidden, gate.data, e * hidden, hidden);
      const p = softmax([...logits.data.subarray(r * count, (r + 1) * count)]);
      const chosen = p
        .map((_, e) => e)
        .sort((a, b) => Math.fround(p[b] + bias.data[b]) - Math.fround(p[a] + bias.data[a]) || a - b)
        .slice(0, k);
      const kept = Math.max(
        chosen.reduce((sum, e) => sum + p[e], 0),
        normMin,
      );
      chosen.forEach((e, j) => {
        experts.data[r * k + j] = e;
        weights.data[r * k + j] = p[e] / kept;
      });
    }
  },

  group([experts], [order, offsets], { count }) {
    const slots = [...experts.data.keys()].sort((a, b) => experts.data[a] - experts.data[b] || a - b);
    order.data.set(slots);
    for (let e = 0; e <= count; e++) offsets.data[e] = slots.filter((s) => experts.data[s] < e).length;
  },

  combine([slots, weights], [y]) {
    const [rows, k] = weights.dims;
    const n = slots.dims[1];
    for (let r = 0; r < rows; r++)
      for (let i = 0; i < n; i++) {
        let sum = 0;
        for (let j = 0; j < k; j++) sum += weights.data[r * k + j] * slots.data[(r * k + j) * n + i];
        y.data[r * n + i] = sum;
      }
  },

  gather([x, index], [y]) {
    const n = x.dims[1];
    index.data.forEach((from, r) => {
      y.data.set(x.data.subarray(from * n, (from + 1) * n), r * n);
    });
  },

  processLogits([logits, floats, ints, history, biasIds, biasValues, masks], [y]) {
    const [rows, vocab] = logits.dims;
    for (let r = 0; r < rows; r++) {
      const c = controls(floats, ints, r);
      const x = [...logits.data.subarray(r * vocab, (r + 1) * vocab)];
      for (let i = c.biasStart; i < c.biasStart + c.biasCount; i++) x[biasIds.data[i]] += biasValues.data[i];
      if (c.mask >= 0)
        for (let i = 0; i < vocab; i++) {
          const word = masks.data[c.mask * masks.dims[1] + (i >> 5)];
          if (!((word >> (i & 31)) & 1)) x[i] = Number.NEGATIVE_INFINITY;
        }
      const seen = [...history.data.subarray(c.historyStart, c.historyStart + c.historyCount)];
      for (const id of new Set(seen)) x[id] = x[id] < 0 ? x[id] * c.repetitionPenalty : x[id] / c.repetitionPenalty;
      const generated = seen.slice(c.promptCount);
      for (const id of new Set(generated)) x[id] -= c.presencePenalty + c.frequencyPenalty * generated.filter((g) => g === id).length;
      for (const id of repeatedNgrams(seen, c.noRepeatNgram)) x[id] = Number.NEGATIVE_INFINITY;
      y.data.set(
        c.temperature > 0
          ? keepBest(
              x.map((v) => v / c.temperature),
              c.topK,
              c.topP,
              c.minP,
            )
          : x,
        r * vocab,
      );
    }
  },

  sample([logits, processed, floats, ints], [ids, logprobs]) {
    const [rows, vocab] = logits.dims;
    for (let r = 0; r < rows; r++) {
      const c = controls(floats, ints, r);
      const x = [...processed.data.subarray(r * vocab, (r + 1) * vocab)];
      let id = x.indexOf(x.reduce((a, b) => Math.max(a, b)));
      if (x[id] === Number.NEGATIVE_INFINITY) {
        ids.data[r] = -1;
        logprobs.data[r] = Number.NEGATIVE_INFINITY;
        continue;
      }
      if (c.temperature > 0) {
        let left = randomNumber((BigInt(c.seedHigh >>> 0) << 32n) | BigInt(c.seedLow >>> 0), BigInt(c.step));
        for (const [i, p] of softmax(x).entries()) {
          if (x[i] === Number.NEGATIVE_INFINITY) continue;
          left -= p;
          id = i;
          if (left < 0) break;
        }
      }
      const raw = [...logits.data.subarray(r * vocab, (r + 1) * vocab)];
      ids.data[r] = id;
      logprobs.data[r] = Math.log(softmax(raw)[id]);
    }
  },

  topLogprobs([logits], [ids, logprobs], { k }) {
    const [rows, vocab] = logits.dims;
    for (let r = 0; r < rows; r++) {
      const p = softmax([...logits.data.subarray(r * vocab, (r + 1) * vocab)]);
      const best = [...p.keys()].sort((a, b) => logits.data[r * vocab + b] - logits.data[r * vocab + a] || a - b).slice(0, k);
      ids.data.set(best, r * k);
      logprobs.data.set(
        best.map((id) => Math.log(p[id])),
        r * k,
      );
    }
  },
};

function dot(a: Numbers, i: number, b: Numbers, j: number, n: number): number {
  let sum = 0;
  for (let k = 0; k < n; k++) sum += a[i + k] * b[j + k];
  return sum;
}

function gated(gate: number, up: number): number {
  return (gate / (1 + Math.exp(-gate))) * up;
}

function softmax(x: readonly number[]): number[] {
  const top = x.reduce((a, b) => Math.max(a, b));
  const e = x.map((v) => Math.exp(v - top));
  const total = e.reduce((a, b) => a + b);
  return e.map((v) => v / total);
}

/** Calls `visit(sequence, row, position)` for each row of a step; a segment is (first row, rows, position of the first). */
function forEachRow(segments: Operand, visit: (sequence: number, row: number, position: number) => void): void {
  for (let s = 0; s < segments.dims[0]; s++) {
    const [first, rows, position] = segments.data.subarray(s * 3, s * 3 + 3);
    for (let i = 0; i < rows; i++) visit(s, first + i, position + i);
  }
}

function pageOf(pages: Operand, sequence: number, position: number, tokens: number): number {
  const page = Math.floor(position / tokens);
  if (page >= pages.dims[1]) throw new Error(`internal: position ${position} of sequence ${sequence} has no page`);
  return pages.data[sequence * pages.dims[1] + page];
}

/** A key's number within its block: keys lie by dims, in bytes by tokens. */
function keyAt({ dims, dtype }: Operand, head: number, d: number, t: number): number {
  return (head * dims[2] + (dtype === "int8kv" ? t : d)) * dims[3] + (dtype === "int8kv" ? d : t);
}

function rounded(x: Numbers, span: number): Float32Array {
  const copy = Float32Array.from(x);
  roundActivations(copy, span);
  return copy;
}

type Controls = Record<(typeof SAMPLING_FLOATS)[number] | (typeof SAMPLING_INTS)[number], number>;

function controls(floats: Operand, ints: Operand, row: number): Controls {
  const named = (names: readonly string[], { data }: Operand) => names.map((name, i) => [name, data[row * names.length + i]]);
  return Object.fromEntries([...named(SAMPLING_FLOATS, floats), ...named(SAMPLING_INTS, ints)]) as Controls;
}

/** Tokens that would complete an n-gram which `seen` holds already. */
function repeatedNgrams(seen: readonly number[], size: number): number[] {
  if (size < 1) return [];
  const last = seen.slice(seen.length - size + 1);
  return seen.filter((_, i) => i >= size - 1 && last.every((id, j) => seen[i - size + 1 + j] === id));
}

/** The scores, all but what top-k, then top-p, then min-p keep set to minus infinity. */
function keepBest(scores: readonly number[], topK: number, topP: number, minP: number): number[] {
  const byScore = [...scores.keys()].filter((i) => scores[i] !== Number.NEGATIVE_INFINITY).sort((a, b) => scores[b] - scores[a] || a - b);
  if (byScore.length === 0) return [...scores];
  let kept = byScore;
  if (topK > 0 && topK < scores.length) kept = kept.filter((i) => scores[i] >= scores[byScore[Math.min(topK, byScore.length) - 1]]);
  if (topP < 1) {
    const p = softmax(kept.map((i) => scores[i]));
    let before = 0;
    kept = kept.filter((_, rank) => {
      const keep = rank === 0 || before < topP;
      before += p[rank];
      return keep;
    });
  }
  if (minP > 0) kept = kept.filter((i, rank) => rank === 0 || Math.exp(scores[i] - scores[kept[0]]) >= minP);
  const stays = new Set(kept);
  return scores.map((v, i) => (stays.has(i) ? v : Number.NEGATIVE_INFINITY));
}

/** A number in [0, 1) from a seed and a step (splitmix64). */
function randomNumber(seed: bigint, step: bigint): number {
  const mask = (1n << 64n) - 1n;
  let z = (seed + (step + 1n) * 0x9e3779b97f4a7c15n) & mask;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & mask;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & mask;
  return Number((z ^ (z >> 31n)) >> 11n) * 2 ** -53;
}
