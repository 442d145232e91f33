/** Checks the arrays that callers pass to a run against the graph. */
import type { Tensor } from "../graph/call.ts";
import { show } from "../graph/graph.ts";
import { bytesOf } from "../graph/plan.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { Numbers } from "./backend.ts";

/** Returns the array of an input or output; throws unless it has the right type and is large enough. */
export function fitting(t: Tensor, label: string, data: Numbers | undefined, sizes: SymbolValues): Numbers {
  if (!data) throw new Error(`internal: the ${label} was not given`);
  const right = t.dtype === "i32" ? data instanceof Int32Array : data instanceof Float32Array;
  const bytes = bytesOf(t, sizes);
  if (!right || data.byteLength < bytes)
    throw new Error(
      `internal: the ${label} (${show(t)}) needs ${bytes} bytes of ${t.dtype}, not ${data.byteLength} of ${data.constructor.name}`,
    );
  return data;
}

/** Throws a RangeError unless `count` numbers from `at` on lie within a state; without `at`, unless they are all of it. */
export function checkRange(size: number, at: number | undefined, count: number): void {
  if (at === undefined ? count === size : at >= 0 && count >= 0 && at + count <= size) return;
  throw new RangeError(`${count} numbers${at === undefined ? "" : ` from ${at} on`} for a state of ${size}`);
}
