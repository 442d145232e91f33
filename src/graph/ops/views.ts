/** Ops that only change a shape. The planner turns them into views where the memory layout allows; elsewhere kernels copy. */
import { elements, type Shape, type SymbolicDim, sameDim } from "../../tensor/shape.ts";
import { FIRST_ORDER, type Op } from "../call.ts";

/** The product of a shape's numbers and of its symbols, so that shapes of the same size compare equal. */
function volume(shape: Shape): string {
  const symbols = shape.filter((d): d is SymbolicDim => typeof d !== "number");
  const count = elements(shape.map((d) => (typeof d === "number" ? d : d.times)));
  return [count, ...symbols.map((d) => d.symbol).sort()].join();
}

/** The stride of an axis in elements; null if it depends on a run's sizes. */
function stride(shape: Shape, axis: number): number | null {
  const behind = shape.slice(axis + 1);
  return behind.every((d) => typeof d === "number") ? elements(behind) : null;
}

const SIZES = ["d0", "d1", "d2", "d3"];

export const VIEW_OPS = {
  /** The same numbers in another shape: `sizes` d0, d1, ... */
  reshape: {
    outputs: ([x], _params, sizes) => {
      const shape = SIZES.flatMap((name) => (sizes[name] === undefined ? [] : [sizes[name]]));
      return x && shape.length > 0 && volume(shape) === volume(x.shape) ? [{ shape, dtype: x.dtype }] : null;
    },
    gradient: (emit, { inputs: [x] }, [dy]) => [dy && emit("reshape", [dy], {}, sizesOf(x.shape))[0]],
    view: () => 0,
  },
  /** `count` entries along `axis`, starting at `start`; `count` is a size. */
  slice: {
    params: ["axis", "start"],
    outputs: ([x], { axis, start }, { count }) => {
      const whole = x?.shape[axis];
      if (!x || whole === undefined || count === undefined) return null;
      if (typeof whole === "number" && (typeof count !== "number" || start + count > whole)) return null;
      return [{ shape: x.shape.map((d, i) => (i === axis ? count : d)), dtype: x.dtype }];
    },
    gradient: (emit, { inputs: [x], params }, [dy]) => [dy && emit("pad", [dy], params, { count: x.shape[params.axis] })[0]],
    view: ({ inputs: [x], params: { axis, start } }) => {
      const step = stride(x.shape, axis);
      const single = x.shape.slice(0, axis).every((d) => d === 1); // else the slice is not contiguous
      return single && step !== null ? start * step : null;
    },
  },
  /** Zeros around x along `axis`: `start` before it, `count` in all. The gradient of `slice`. */
  pad: {
    params: ["axis", "start"],
    outputs: ([x], { axis }, { count }) =>
      x && axis < x.shape.length && count !== undefined
        ? [{ shape: x.shape.map((d, i) => (i === axis ? count : d)), dtype: x.dtype }]
        : null,
    gradient: FIRST_ORDER,
  },
  /** Swaps two axes. */
  transpose: {
    params: ["a", "b"],
    outputs: ([x], { a, b }) => {
      if (!x || a === b || x.shape[a] === undefined || x.shape[b] === undefined) return null;
      return [{ shape: x.shape.map((d, i) => (i === a ? x.shape[b] : i === b ? x.shape[a] : d)), dtype: x.dtype }];
    },
    gradient: (emit, { params }, [dy]) => [dy && emit("transpose", [dy], params)[0]],
    // If all but one of the axes from a to b have size 1, the order in memory does not change.
    view: ({ inputs: [x], params: { a, b } }) =>
      x.shape.slice(Math.min(a, b), Math.max(a, b) + 1).filter((d) => !sameDim(d, 1)).length <= 1 ? 0 : null,
  },
} satisfies Record<string, Op>;

/** The `sizes` of a reshape to `shape`. */
export function sizesOf(shape: Shape): Record<string, Shape[number]> {
  return Object.fromEntries(shape.map((d, i) => [SIZES[i], d]));
}
