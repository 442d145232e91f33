/** DoRA's norms, losses of classifiers and preferences, and those of the router, as plain loops. */
import { type Kernel, softmax } from "./operand.ts";

export const TUNING_KERNELS = {
  mul([a, b], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = a.data[i] * b.data[i];
  },

  // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
  softplus([x], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = Math.max(x.data[i], 0) + Math.log1p(Math.exp(-Math.abs(x.data[i])));
  },

  softplusGrad([dy, x], [dx]) {
    for (let i = 0; i < dx.data.length; i++) dx.data[i] = dy.data[i] / (1 + Math.exp(-x.data[i]));
  },

  scaleColumns([x, by, bias], [y]) {
    const n = by.data.length;
    for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] * by.data[i % n] + (bias ? bias.data[i % n] : 0);
  },

  inverseNorms([w, a, b], [y], { scale }) {
    const [n, k] = w.dims.slice(-2);
    const rank = a.dims[a.dims.length - 2];
    for (let i = 0; i < y.data.length; i++) {
      const expert = Math.floor(i / n);
      const sum = Float64Array.from(w.data.subarray(i * k, (i + 1) * k));
      for (let r = 0; r < rank; r++) {
        const by = scale * b.data[i * rank + r];
        for (let j = 0; j < k; j++) sum[j] += by * a.data[(expert * rank + r) * k + j];
      }
      y.data[i] = 1 / Math.sqrt(sum.reduce((total, v) => total + v * v, 0));
    }
  },

  routerLoad([logits], [load, probability, z], { k }) {
    const [rows, count] = logits.dims;
    const [loads, sums] = [new Float64Array(count), new Float64Array(count)];
    let squares = 0;
    for (let r = 0; r < rows; r++) {
      const l = [...logits.data.subarray(r * count, (r + 1) * count)];
      softmax(l).forEach((p, e) => {
        sums[e] += p;
      });
      const best = l.map((_, e) => e).sort((a, b) => l[b] - l[a] || a - b);
      for (const e of best.slice(0, k)) loads[e]++;
      squares += logSumExp(l) ** 2;
    }
    load.data.set(loads.map((n) => n / rows));
    probability.data.set(sums.map((p) => p / rows));
    z.data[0] = squares / rows;
  },

  // P_e = mean p_e: dl_e = p_e (dP_e - sum_j p_j dP_j) / rows; z = mean s^2, s = log sum e^l: dl_e = 2 s p_e dz / rows
  routerLoadGrad([dProbability, dZ, logits], [dLogits]) {
    const [rows, count] = logits.dims;
    for (let r = 0; r < rows; r++) {
      const l = [...logits.data.subarray(r * count, (r + 1) * count)];
      const p = Float64Array.from(softmax(l));
      const shift = 2 * logSumExp(l) * dZ.data[0] - p.reduce((sum, x, e) => sum + x * dProbability.data[e], 0);
      for (let e = 0; e < count; e++) dLogits.data[r * count + e] = (p[e] * (dProbability.data[e] + shift)) / rows;
    }
  },
} satisfies Record<string, Kernel>;

function logSumExp(l: readonly number[]): number {
  const top = l.reduce((a, b) => Math.max(a, b));
  return top + Math.log(l.reduce((sum, x) => sum + Math.exp(x - top), 0));
}
