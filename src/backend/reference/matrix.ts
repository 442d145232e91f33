/** Products with weight matrices and their gradients, as plain loops. */
import { accumulate, dot, forEachSlot, type Kernel, type Operand, row } from "./operand.ts";

export function gated(gate: number, up: number): number {
  return (gate / (1 + Math.exp(-gate))) * up;
}

export const MATRIX_KERNELS = {
  embed([ids, table], [y]) {
    const [n, width] = table.dims;
    ids.data.forEach((id, r) => {
      if (id < 0 || id >= n) throw new Error(`token id ${id} is outside the vocabulary of ${n}`);
      y.data.set(table.data.subarray(id * width, (id + 1) * width), r * width);
    });
  },

  linear([x, w, bias], [y]) {
    const [rows, k] = x.dims;
    const n = w.dims[0];
    for (let r = 0; r < rows; r++)
      for (let j = 0; j < n; j++) y.data[r * n + j] = dot(x.data, r * k, w.data, j * k, k) + (bias ? bias.data[j] : 0);
  },

  linearT([dy, w], [dx]) {
    const [n, k] = w.dims;
    for (let r = 0; r < dy.dims[0]; r++) {
      const sums = new Float64Array(k);
      for (let j = 0; j < n; j++) for (let i = 0; i < k; i++) sums[i] += dy.data[r * n + j] * w.data[j * k + i];
      dx.data.set(sums, r * k);
    }
  },

  addLinear([x, w, added], [y]) {
    MATRIX_KERNELS.linear([x, w], [y]);
    for (let i = 0; i < y.data.length; i++) y.data[i] += added.data[i];
  },

  addLinearT([dy, w, added], [dx]) {
    MATRIX_KERNELS.linearT([dy, w], [dx]);
    for (let i = 0; i < dx.data.length; i++) dx.data[i] += added.data[i];
  },

  addGroupedLinear([x, w, order, offsets, added], [y], params) {
    MATRIX_KERNELS.groupedLinear([x, w, order, offsets], [y], params as { slots: number });
    for (let i = 0; i < y.data.length; i++) y.data[i] += added.data[i];
  },

  outer([dy, x], [dw]) {
    const [rows, n] = dy.dims;
    const k = x.dims[1];
    for (let j = 0; j < n; j++) {
      const sums = new Float64Array(k);
      for (let r = 0; r < rows; r++) for (let i = 0; i < k; i++) sums[i] += dy.data[r * n + j] * x.data[r * k + i];
      dw.data.set(sums, j * k);
    }
  },

  sumRows([x], [y]) {
    const [rows, n] = x.dims;
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let r = 0; r < rows; r++) sum += x.data[r * n + i];
      y.data[i] = sum;
    }
  },

  groupedLinear([x, w, order, offsets, bias], [y], { slots }) {
    const [, n, k] = w.dims;
    forEachSlot(order, offsets, (e, slot) => {
      const at = Math.floor(slot / slots) * k;
      for (let j = 0; j < n; j++) y.data[slot * n + j] = dot(x.data, at, w.data, (e * n + j) * k, k) + (bias ? bias.data[e * n + j] : 0);
    });
  },

  groupedLinearT([dy, w, order, offsets], [dx], { slots }) {
    const [, n, k] = w.dims;
    const sums = new Float64Array(dx.data.length);
    forEachSlot(order, offsets, (e, slot) => {
      const at = Math.floor(slot / slots) * k;
      for (let j = 0; j < n; j++) for (let i = 0; i < k; i++) sums[at + i] += dy.data[slot * n + j] * w.data[(e * n + j) * k + i];
    });
    dx.data.set(sums);
  },

  groupedOuter([dy, x, order, offsets], [dw], { slots }) {
    const [, n, k] = dw.dims;
    const sums = new Float64Array(dw.data.length);
    forEachSlot(order, offsets, (e, slot) => {
      const at = Math.floor(slot / slots) * k;
      for (let j = 0; j < n; j++) for (let i = 0; i < k; i++) sums[(e * n + j) * k + i] += dy.data[slot * n + j] * x.data[at + i];
    });
    dw.data.set(sums);
  },

  groupedSumRows([dy, order, offsets], [db]) {
    const n = dy.dims[1];
    db.data.fill(0);
    forEachSlot(order, offsets, (e, slot) => accumulate(db.data, e * n, 1, dy.data, slot * n, n));
  },

  // Both products are rounded to float32, as between the separate calls that this op fuses.
  gatedLinear([x, gate, up], [y]) {
    const [n, k] = gate.dims;
    for (let r = 0; r < x.dims[0]; r++)
      for (let j = 0; j < n; j++) {
        const product = (w: Operand) => Math.fround(dot(x.data, r * k, w.data, j * k, k));
        y.data[r * n + j] = gated(product(gate), product(up));
      }
  },

  groupedGatedLinear([x, gate, up, order, offsets], [y], { slots }) {
    const [, n, k] = gate.dims;
    forEachSlot(order, offsets, (e, slot) => {
      const at = Math.floor(slot / slots) * k;
      for (let j = 0; j < n; j++) {
        const product = (w: Operand) => Math.fround(dot(x.data, at, w.data, (e * n + j) * k, k));
        y.data[slot * n + j] = gated(product(gate), product(up));
      }
    });
  },

  group([experts], [order, offsets], { count }) {
    const slots = [...experts.data.keys()].sort((a, b) => experts.data[a] - experts.data[b] || a - b);
    order.data.set(slots);
    for (let e = 0; e <= count; e++) offsets.data[e] = slots.filter((s) => experts.data[s] < e).length;
  },

  scatterRows([dy, index], [dx]) {
    const n = dy.dims[1];
    dx.data.fill(0);
    index.data.forEach((to, r) => {
      accumulate(dx.data, to * n, 1, dy.data, r * n, n);
    });
  },

  gather([x, index], [y]) {
    index.data.forEach((from, r) => {
      y.data.set(row(x, from), r * x.dims[1]);
    });
  },
} satisfies Record<string, Kernel>;
