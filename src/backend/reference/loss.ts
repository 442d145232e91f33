/** The loss over a vocabulary, chunk by chunk, and the optimiser's updates, as plain loops. */
import { ADAMW_RATES } from "../../graph/ops/loss.ts";
import { roundBf16 } from "../../tensor/dtype.ts";
import { DYNAMIC_BLOCK, decodeDynamic, encodeDynamic } from "../../tensor/dynamic.ts";
import type { Numbers } from "../backend.ts";
import { accumulate, dot, type Kernel, type Operand } from "./operand.ts";

/** An adapter's branch beside the head: low [rows, rank], and its second matrix [vocab, rank]. */
interface HeadBranch {
  readonly low: Operand;
  readonly up: Operand;
}

/** Calls `visit(row, logits)` for each row that has a label. The next chunk overwrites the logits. */
function forEachLogits(
  x: Operand,
  head: Operand,
  labels: Operand,
  bias: Operand | undefined,
  branch: HeadBranch | null,
  chunk: number,
  visit: (row: number, logits: Float64Array) => void,
): void {
  const [rows, k] = x.dims;
  const vocab = head.dims[0];
  const rank = branch?.low.dims[1] ?? 0;
  const logits = new Float64Array(Math.min(chunk, rows) * vocab);
  for (let from = 0; from < rows; from += chunk) {
    const to = Math.min(rows, from + chunk);
    const of = (r: number) => logits.subarray((r - from) * vocab, (r - from + 1) * vocab);
    for (let r = from; r < to; r++)
      for (let j = 0; j < vocab; j++) {
        const more = branch ? dot(branch.low.data, r * rank, branch.up.data, j * rank, rank) : 0;
        of(r)[j] = dot(x.data, r * k, head.data, j * k, k) + more + (bias ? bias.data[j] : 0);
      }
    for (let r = from; r < to; r++) {
      if (labels.data[r] >= vocab) throw new Error(`label ${labels.data[r]} is outside the vocabulary of ${vocab}`);
      if (labels.data[r] >= 0) visit(r, of(r));
    }
  }
}

function losses(
  x: Operand,
  head: Operand,
  labels: Operand,
  bias: Operand | undefined,
  branch: HeadBranch | null,
  chunk: number,
  [each, logsumexp]: readonly Operand[],
): void {
  each.data.fill(0);
  logsumexp.data.fill(0);
  forEachLogits(x, head, labels, bias, branch, chunk, (r, logits) => {
    const top = logits.reduce((a, b) => Math.max(a, b));
    const lse = top + Math.log(logits.reduce((sum, l) => sum + Math.exp(l - top), 0));
    each.data[r] = lse - logits[labels.data[r]];
    logsumexp.data[r] = lse;
  });
}

export const LOSS_KERNELS = {
  crossEntropy([x, head, labels, bias], outputs, { chunk }) {
    losses(x, head, labels, bias, null, chunk, outputs);
  },

  adaptedCrossEntropy([x, head, labels, low, up, bias], outputs, { chunk }) {
    losses(x, head, labels, bias, { low, up }, chunk, outputs);
  },

  adaptedCrossEntropyGrad([dy, x, head, labels, logsumexp, low, up, bias], [dx, dLow, dUp], { chunk }) {
    const [k, rank] = [x.dims[1], low.dims[1]];
    const sumUp = new Float64Array(dUp.data.length);
    dx.data.fill(0);
    dLow.data.fill(0);
    forEachLogits(x, head, labels, bias, { low, up }, chunk, (r, logits) => {
      const [row, its] = [new Float32Array(k), new Float32Array(rank)];
      logits.forEach((l, j) => {
        const exact = dy.data[r] * (Math.exp(l - logsumexp.data[r]) - (j === labels.data[r] ? 1 : 0));
        accumulate(row, 0, x.dtype === "bf16" ? roundBf16(exact) : exact, head.data, j * k, k);
        accumulate(its, 0, exact, up.data, j * rank, rank);
        for (let i = 0; i < rank; i++) sumUp[j * rank + i] += exact * low.data[r * rank + i];
      });
      dx.data.set(row, r * k);
      dLow.data.set(its, r * rank);
    });
    dUp.data.set(sumUp);
  },

  crossEntropyGrad([dy, x, head, labels, logsumexp, bias], [dx, dHead, dBias], { chunk }) {
    const k = x.dims[1];
    const [sumHead, sumBias] = [new Float64Array(dHead?.data.length ?? 0), new Float64Array(dBias?.data.length ?? 0)];
    dx.data.fill(0);
    forEachLogits(x, head, labels, bias, null, chunk, (r, logits) => {
      const row = new Float32Array(k);
      logits.forEach((l, j) => {
        const exact = dy.data[r] * (Math.exp(l - logsumexp.data[r]) - (j === labels.data[r] ? 1 : 0));
        const d = x.dtype === "bf16" ? roundBf16(exact) : exact;
        accumulate(row, 0, d, head.data, j * k, k);
        if (dHead) for (let i = 0; i < k; i++) sumHead[j * k + i] += d * x.data[r * k + i];
        if (dBias) sumBias[j] += exact;
      });
      dx.data.set(row, r * k);
    });
    dHead?.data.set(sumHead);
    dBias?.data.set(sumBias);
  },

  norm(tensors, [y]) {
    y.data[0] = Math.sqrt(tensors.reduce((sum, { data }) => sum + dot(data, 0, data, 0, data.length), 0));
  },

  accumulate([total, x]) {
    for (let i = 0; i < total.data.length; i++) total.data[i] += x.data[i];
  },

  clear([state]) {
    state.data.fill(0);
  },

  clip([norm], [factor], { max }) {
    factor.data[0] = Math.min(1, max / (norm.data[0] + 1e-6));
  },

  adamw([parameter, gradient, m, v, rates, factor]) {
    step(parameter.data, gradient.data, m.data, v.data, rates, factor);
  },

  adamw8bit([parameter, gradient, m, v, mScales, vScales, rates, factor]) {
    const moments = [
      { codes: bytesOf(m), scales: mScales.data, signed: true },
      { codes: bytesOf(v), scales: vScales.data, signed: false },
    ];
    for (let from = 0, block = 0; from < parameter.data.length; from += DYNAMIC_BLOCK, block++) {
      const to = Math.min(parameter.data.length, from + DYNAMIC_BLOCK);
      const [first, second] = moments.map(({ codes, scales, signed }) =>
        Float32Array.from(codes.subarray(from, to), (code) => decodeDynamic(code, signed, scales[block])),
      );
      step(parameter.data.subarray(from, to), gradient.data.subarray(from, to), first, second, rates, factor);
      [first, second].forEach((values, i) => {
        const { codes, scales, signed } = moments[i];
        scales[block] = encodeDynamic(values, signed, codes.subarray(from, to));
      });
    }
  },
} satisfies Record<string, Kernel>;

/** A state's memory: codes are no numbers of their own. */
function bytesOf({ data }: Operand): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/** Updates parameters and moments in place. */
function step(p: Numbers, gradient: Numbers, m: Numbers, v: Numbers, rates: Operand, factor: Operand | undefined): void {
  const at = (name: (typeof ADAMW_RATES)[number]) => rates.data[ADAMW_RATES.indexOf(name)];
  const [lr, beta1, beta2] = [at("learningRate"), at("beta1"), at("beta2")];
  for (let i = 0; i < p.length; i++) {
    const g = gradient[i] * (factor ? factor.data[0] : 1);
    m[i] = beta1 * m[i] + (1 - beta1) * g;
    v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    p[i] = p[i] * (1 - lr * at("weightDecay")) - (lr * (m[i] / at("bias1"))) / (Math.sqrt(v[i] / at("bias2")) + at("eps"));
  }
}
