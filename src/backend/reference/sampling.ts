/** From logits to tokens, as plain loops: every backend must match it draw by draw. */
import { NONE_LEFT, NOT_FINITE, SAMPLING_FLOATS, SAMPLING_INTS } from "../../graph/ops/sampling.ts";
import { type Kernel, type Operand, softmax } from "./operand.ts";

export const SAMPLING_KERNELS = {
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
      if (!logits.data.subarray(r * vocab, (r + 1) * vocab).every(Number.isFinite)) {
        ids.data[r] = NOT_FINITE;
        logprobs.data[r] = Number.NEGATIVE_INFINITY;
        continue;
      }
      const x = [...processed.data.subarray(r * vocab, (r + 1) * vocab)];
      let id = x.indexOf(x.reduce((a, b) => Math.max(a, b)));
      if (x[id] === Number.NEGATIVE_INFINITY) {
        ids.data[r] = NONE_LEFT;
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

  topLogprobs([logits], [ids, logprobs]) {
    const [rows, vocab] = logits.dims;
    const k = ids.dims[1];
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
} satisfies Record<string, Kernel>;

type Controls = Record<(typeof SAMPLING_FLOATS)[number] | (typeof SAMPLING_INTS)[number], number>;

function controls(floats: Operand, ints: Operand, row: number): Controls {
  const named = (names: readonly string[], { data }: Operand) => names.map((name, i) => [name, data[row * names.length + i]]);
  return Object.fromEntries([...named(SAMPLING_FLOATS, floats), ...named(SAMPLING_INTS, ints)]) as Controls;
}

/** Tokens that would complete an n-gram that `seen` already contains. */
function repeatedNgrams(seen: readonly number[], size: number): number[] {
  if (size < 1) return [];
  const last = seen.slice(seen.length - size + 1);
  return seen.filter((_, i) => i >= size - 1 && last.every((id, j) => seen[i - size + 1 + j] === id));
}

/** The scores with everything that top-k, top-p and min-p, in this order, remove set to minus infinity. */
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
