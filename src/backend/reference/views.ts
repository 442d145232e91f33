/** Ops that only change a shape, as copies. */
import { elements } from "../../tensor/shape.ts";
import type { Kernel, Operand } from "./operand.ts";

/** Calls `visit(index, number)` for each element in order. */
function forEachIndex({ dims }: Operand, visit: (index: readonly number[], at: number) => void): void {
  const index = dims.map(() => 0);
  const count = elements(dims);
  for (let at = 0; at < count; at++) {
    visit(index, at);
    for (let d = dims.length - 1; d >= 0 && ++index[d] === dims[d]; d--) index[d] = 0;
  }
}

function position({ dims }: Operand, index: readonly number[]): number {
  return index.reduce((at, i, d) => at * dims[d] + i, 0);
}

export const VIEW_KERNELS = {
  reshape([x], [y]) {
    y.data.set(x.data.subarray(0, y.data.length));
  },

  slice([x], [y], { axis, start }) {
    forEachIndex(y, (index, at) => {
      y.data[at] = x.data[position(x, index.with(axis, index[axis] + start))];
    });
  },

  pad([x], [y], { axis, start }) {
    y.data.fill(0);
    forEachIndex(x, (index, at) => {
      y.data[position(y, index.with(axis, index[axis] + start))] = x.data[at];
    });
  },

  transpose([x], [y], { a, b }) {
    forEachIndex(y, (index, at) => {
      y.data[at] = x.data[position(x, index.with(a, index[b]).with(b, index[a]))];
    });
  },
} satisfies Record<string, Kernel>;
