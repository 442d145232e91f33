/**
 * Places computed values in the workspace: first fit over the holes that dead values leave. Views share the memory of their
 * base; a result reuses the memory of an input whose last use is its call, if the op's row allows that.
 */
import { ELEMENT_BYTES } from "../tensor/dtype.ts";
import type { Tensor } from "./call.ts";
import { type Graph, show } from "./graph.ts";

/** A value that shares another's memory; `of` is never a view itself. */
export interface View {
  readonly of: Tensor;
  /** Offset from the start of `of`. */
  readonly bytes: number;
}

export interface Placement {
  /** By value id: byte offset in the workspace; -1 for values stored elsewhere. */
  readonly offsets: Float64Array;
  readonly views: ReadonlyMap<Tensor, View>;
  /** Size of the workspace. */
  readonly bytes: number;
}

/** @param bytesOf a value's size in bytes, rounded up to whole units; null if it has no bound */
export function place(graph: Graph, bytesOf: (t: Tensor) => number | null): Placement {
  const views = findViews(graph);
  const root = (t: Tensor): Tensor => views.get(t)?.of ?? t;
  const returned = new Set(graph.outputs.values());
  const count = graph.values.length;
  // By value id; views count as their base.
  const lastUse = new Int32Array(count).fill(-1);
  const offsets = new Float64Array(count).fill(-1);
  const sizes = new Float64Array(count).fill(-1);
  graph.calls.forEach(({ inputs, outputs }, i) => {
    for (const t of inputs) lastUse[root(t).id] = i;
    for (const t of outputs) lastUse[root(t).id] = i;
  });

  const arena = new Arena();
  const end = (t: Tensor, i: number): void => {
    const { id } = root(t);
    if (sizes[id] < 0 || lastUse[id] !== i) return;
    arena.release(offsets[id], sizes[id]);
    sizes[id] = -1;
  };
  graph.calls.forEach((call, i) => {
    const { inputs, outputs } = call;
    // An input's memory can be reused if this is its last use, no run can return it, and no other input is a view of it.
    const free = (t: Tensor) =>
      t.kind === "computed" && sizes[t.id] >= 0 && lastUse[t.id] === i && !returned.has(t) && inputs.every((u) => u === t || root(u) !== t);
    const taken = graph
      .row(call.op)
      .inPlace?.map((at) => inputs[at])
      .find((t) => t.dtype === outputs[0].dtype && free(t));
    outputs.forEach((t, o) => {
      if (views.has(t)) return;
      const bytes = bytesOf(t);
      if (bytes === null) {
        // Only the caller knows its size, so it must be in the caller's memory.
        if (returned.has(t) && lastUse[t.id] === i) return;
        throw new Error(`internal: the result ${show(t)} of ${call.op} has no bound: its sizes have no capacity`);
      }
      if (o === 0 && taken && sizes[taken.id] >= bytes) {
        offsets[t.id] = offsets[taken.id];
        sizes[t.id] = sizes[taken.id];
        sizes[taken.id] = -1; // its memory now belongs to the result
      } else {
        offsets[t.id] = arena.take(bytes);
        sizes[t.id] = bytes;
      }
    });
    for (const t of inputs) end(t, i);
    for (const t of outputs) end(t, i);
  });
  return { offsets, views, bytes: arena.bytes };
}

/** Results that need no memory of their own. Outputs are never views, because runs write them to the caller's memory. */
function findViews(graph: Graph): Map<Tensor, View> {
  const views = new Map<Tensor, View>();
  const returned = new Set(graph.outputs.values());
  for (const call of graph.calls) {
    const [x] = call.inputs;
    const [y] = call.outputs;
    const at = graph.row(call.op).view?.(call) ?? null;
    const stacked = x?.kind === "weight" && x.shape.length > 2; // its parts are not contiguous
    if (at === null || returned.has(y) || returned.has(x) || stacked) continue;
    const inside = views.get(x);
    const bytes = at * ELEMENT_BYTES[x.dtype as keyof typeof ELEMENT_BYTES];
    if (Number.isNaN(bytes)) continue;
    views.set(y, { of: inside?.of ?? x, bytes: (inside?.bytes ?? 0) + bytes });
  }
  return views;
}

/** Allocates from a growing range of memory and tracks its holes. */
class Arena {
  bytes = 0;
  /** Sorted by position; adjacent holes are merged. */
  readonly #holes: { at: number; bytes: number }[] = [];

  take(size: number): number {
    if (size === 0) return 0;
    const holes = this.#holes;
    const fit = holes.findIndex((h) => h.bytes >= size);
    if (fit >= 0) {
      const hole = holes[fit];
      const at = hole.at;
      hole.at += size;
      hole.bytes -= size;
      if (hole.bytes === 0) holes.splice(fit, 1);
      return at;
    }
    const last = holes.at(-1);
    const grows = last && last.at + last.bytes === this.bytes; // the hole at the end
    const at = grows ? last.at : this.bytes;
    if (grows) holes.pop();
    this.bytes = at + size;
    return at;
  }

  release(at: number, size: number): void {
    if (size === 0) return;
    const holes = this.#holes;
    let next = holes.findIndex((h) => h.at > at);
    if (next < 0) next = holes.length;
    const [before, after] = [holes[next - 1], holes[next]];
    const joinsAfter = after && at + size === after.at;
    if (before && before.at + before.bytes === at) {
      before.bytes += size + (joinsAfter ? after.bytes : 0);
      if (joinsAfter) holes.splice(next, 1);
    } else if (joinsAfter) {
      after.at = at;
      after.bytes += size;
    } else {
      holes.splice(next, 0, { at, bytes: size });
    }
  }
}
