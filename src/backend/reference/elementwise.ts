/** Norms, activations, rotary embeddings, sums, casts and row selection, with their gradients, as plain loops. */
import { fromF16, roundBf16, toF16 } from "../../tensor/dtype.ts";
import { gated } from "./matrix.ts";
import { dot, type Kernel, type Operand } from "./operand.ts";

export const ELEMENTWISE_KERNELS = {
  rmsNorm([x, w], [y], { eps }) {
    const [rows, n] = x.dims;
    for (let r = 0; r < rows; r++) {
      const scale = inverseRms(x, r, eps);
      for (let i = 0; i < n; i++) y.data[r * n + i] = w.data[i] * x.data[r * n + i] * scale;
    }
  },

  // y_i = w_i x_i s, s = (mean x^2 + eps)^-1/2: dx_i = s (w_i dy_i - x_i s^2 mean(w dy x))
  rmsNormGradX([dy, x, w], [dx], { eps }) {
    const [rows, n] = x.dims;
    for (let r = 0; r < rows; r++) {
      const s = inverseRms(x, r, eps);
      let mean = 0;
      for (let i = 0; i < n; i++) mean += (w.data[i] * dy.data[r * n + i] * x.data[r * n + i]) / n;
      for (let i = 0; i < n; i++) dx.data[r * n + i] = s * (w.data[i] * dy.data[r * n + i] - x.data[r * n + i] * s * s * mean);
    }
  },

  rmsNormGradW([dy, x], [dw], { eps }) {
    const [rows, n] = x.dims;
    const sums = new Float64Array(n);
    for (let r = 0; r < rows; r++) {
      const s = inverseRms(x, r, eps);
      for (let i = 0; i < n; i++) sums[i] += dy.data[r * n + i] * x.data[r * n + i] * s;
    }
    dw.data.set(sums);
  },

  addRmsNorm([a, b, w], [sum, y], params) {
    ELEMENTWISE_KERNELS.add([a, b], [sum]);
    ELEMENTWISE_KERNELS.rmsNorm([sum, w], [y], params);
  },

  add([a, b], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = a.data[i] + b.data[i];
  },

  scale([x], [y], { by }) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] * by;
  },

  scaleBy([x, by], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = x.data[i] * by.data[0];
  },

  siluMul([gate, up], [y]) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = gated(gate.data[i], up.data[i]);
  },

  // silu(g) = g s, s = 1 / (1 + e^-g): silu' = s (1 + g (1 - s))
  siluMulGrad([dy, gate, up], [dGate, dUp]) {
    for (let i = 0; i < dy.data.length; i++) {
      const [g, d] = [gate.data[i], dy.data[i]];
      const s = 1 / (1 + Math.exp(-g));
      dGate.data[i] = d * up.data[i] * s * (1 + g * (1 - s));
      dUp.data[i] = d * g * s;
    }
  },

  dropout([x, seed], [y], { p, stream }) {
    for (let i = 0; i < y.data.length; i++) y.data[i] = uniform(seed.data[0], seed.data[1], stream, i) < p ? 0 : x.data[i] / (1 - p);
  },

  castF32([x], [y]) {
    y.data.set(x.data);
  },

  castBf16([x], [y]) {
    x.data.forEach((v, i) => {
      y.data[i] = roundBf16(v);
    });
  },

  castF16([x], [y]) {
    x.data.forEach((v, i) => {
      y.data[i] = fromF16(toF16(v));
    });
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

  rope: rotation(1),
  ropeT: rotation(-1),

  replaceRows([x, by, index], [y]) {
    const n = x.dims[1];
    y.data.set(x.data);
    index.data.forEach((to, i) => {
      y.data.set(by.data.subarray(i * n, (i + 1) * n), to * n);
    });
  },

  addRows([x, by, index], [y]) {
    const n = x.dims[1];
    y.data.set(x.data);
    index.data.forEach((to, i) => {
      for (let j = 0; j < n; j++) y.data[to * n + j] += by.data[i * n + j];
    });
  },

  zeroRows([x, index], [y]) {
    const n = x.dims[1];
    y.data.set(x.data);
    for (const r of index.data) y.data.fill(0, r * n, (r + 1) * n);
  },

  fill(_inputs, [y], { value }) {
    y.data.fill(value);
  },

  dot([a, b], [y]) {
    y.data[0] = dot(a.data, 0, b.data, 0, a.data.length);
  },
} satisfies Record<string, Kernel>;

function inverseRms({ dims, data }: Operand, r: number, eps: number): number {
  const n = dims[1];
  return 1 / Math.sqrt(dot(data, r * n, data, r * n, n) / n + eps);
}

function rotation(direction: 1 | -1): Kernel {
  return ([x, angles], [y]) => {
    const [rows, n] = x.dims;
    const dim = angles.dims[1];
    for (let r = 0; r < rows; r++)
      for (let i = 0; i < n; i += 2) {
        const [c, s] = [angles.data[r * dim + (i % dim)], direction * angles.data[r * dim + (i % dim) + 1]];
        const [a, b] = [x.data[r * n + i], x.data[r * n + i + 1]];
        y.data[r * n + i] = a * c - b * s;
        y.data[r * n + i + 1] = b * c + a * s;
      }
  };
}

/** A number in [0, 1) that depends only on the four arguments: MurmurHash3's finalizer, applied to each in turn. */
function uniform(a: number, b: number, c: number, d: number): number {
  let h = 0;
  for (const word of [a, b, c, d]) {
    h = Math.imul(h ^ word, 0x85ebca6b);
    h ^= h >>> 13;
    h = Math.imul(h, 0xc2b2ae35);
    h ^= h >>> 16;
    h = (h + 0x9e3779b9) | 0;
  }
  return (h >>> 8) / 2 ** 24;
}
