/** The router, the weighted sum of experts and their gradients, as plain loops. */
import { accumulate, dot, type Kernel, softmax } from "./operand.ts";

export const EXPERT_KERNELS = {
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

  // w_j = p_j / max(S, normMin), S the sum of the chosen p: dp_j = (dw_j - sum_i dw_i w_i) / S, or dw_j / normMin if S is smaller;
  // then the softmax: dl_e = p_e (dp_e - sum_j p_j dp_j)
  routeGrad([dWeights, logits, experts, weights], [dLogits], { normMin }) {
    const [rows, k] = weights.dims;
    const count = logits.dims[1];
    for (let r = 0; r < rows; r++) {
      const p = softmax([...logits.data.subarray(r * count, (r + 1) * count)]);
      const chosen = experts.data.subarray(r * k, (r + 1) * k);
      let sum = 0;
      for (const e of chosen) sum += p[e];
      const shared = sum > normMin ? dot(dWeights.data, r * k, weights.data, r * k, k) : 0;
      const dp = new Float64Array(count);
      chosen.forEach((e, j) => {
        dp[e] = (dWeights.data[r * k + j] - shared) / Math.max(sum, normMin);
      });
      const mean = p.reduce((total, v, e) => total + v * dp[e], 0);
      for (let e = 0; e < count; e++) dLogits.data[r * count + e] = p[e] * (dp[e] - mean);
    }
  },

  adaptedSlots([experts, rows, ids], [keys, slots], { count }) {
    const k = experts.dims[1];
    rows.data.forEach((r, i) => {
      for (let j = 0; j < k; j++) {
        keys.data[i * k + j] = ids.data[i] * count + experts.data[r * k + j];
        slots.data[i * k + j] = r * k + j;
      }
    });
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

  spread([dy, weights], [slots]) {
    const [rows, k] = weights.dims;
    const n = dy.dims[1];
    slots.data.fill(0);
    for (let r = 0; r < rows; r++)
      for (let j = 0; j < k; j++) accumulate(slots.data, (r * k + j) * n, weights.data[r * k + j], dy.data, r * n, n);
  },

  slotDots([dy, slots], [dWeights], { k }) {
    const [rows, n] = dy.dims;
    for (let r = 0; r < rows; r++)
      for (let j = 0; j < k; j++) dWeights.data[r * k + j] = dot(dy.data, r * n, slots.data, (r * k + j) * n, n);
  },
} satisfies Record<string, Kernel>;
