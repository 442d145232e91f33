/**
 * Where computed values lie in the workspace: first fit over the holes that dead values leave. Views share the memory of what
 * they view; a result takes over the memory of an input that ends with its call, where the op's row allows that.
 */
import { ELEMENT_BYTES } from "../tensor/dtype.ts";
import type { Call, Tensor } from "./call.ts";
import { type Graph, show } from "./graph.ts";

/** A value that shares another's memory: `of` is no view itself. */
export interface View {
  readonly of: Tensor;
  /** From the start of `of`. */
  readonly bytes: number;
}

export interface Placement {
  /** Bytes from the start of the workspace. */
  readonly offsets: ReadonlyMap<Tensor, number>;
  readonly views: ReadonlyMap<Tensor, View>;
  /** Size of the workspace. */
  readonly bytes: number;
}

/** @param bytesOf the room that a value takes, in whole units; null where that has no bound */
export function place(graph: Graph, bytesOf: (t: Tensor) => number | null): Placement {
  const views = findViews(graph);
  const root = (t: Tensor): Tensor => views.get(t)?.of ?? t;
  const returned = new Set(graph.outputs.values());
  const lastUse = new Map<Tensor, number>();
  graph.calls.forEach(({ inputs, outputs }, i) => {
    for (const t of inputs) lastUse.set(root(t), i);
    for (const t of outputs) lastUse.set(root(t), i);
  });

  const arena = new Arena();
  const offsets = new Map<Tensor, number>();
  const sizes = new Map<Tensor, number>();
  graph.calls.forEach((call, i) => {
    const dying = (t: Tensor) => offsets.has(t) && lastUse.get(t) === i;
    const taken = takenOver(call, graph, (t) => dying(t) && !returned.has(t) && call.inputs.every((u) => u === t || root(u) !== t));
    for (const [o, t] of call.outputs.entries()) {
      if (views.has(t)) continue;
      const bytes = bytesOf(t);
      if (bytes === null) {
        // Nobody but the caller knows how much it is, so nobody but the caller has room for it.
        if (returned.has(t) && lastUse.get(t) === i) continue;
        throw new Error(`internal: the result ${show(t)} of ${call.op} has no bound: its sizes have no capacity`);
      }
      if (o === 0 && taken && (sizes.get(taken) ?? 0) >= bytes) {
        offsets.set(t, offsets.get(taken) as number);
        sizes.set(t, sizes.get(taken) as number);
        sizes.delete(taken); // no longer its own to give back
      } else {
        offsets.set(t, arena.take(bytes));
        sizes.set(t, bytes);
      }
    }
    for (const t of new Set([...call.inputs, ...call.outputs].map(root))) {
      const size = sizes.get(t);
      if (size !== undefined && dying(t)) arena.release(offsets.get(t) as number, size);
    }
  });
  return { offsets, views, bytes: arena.bytes };
}

/** The input whose memory the call's first result may have. */
function takenOver(call: Call, graph: Graph, free: (t: Tensor) => boolean): Tensor | undefined {
  const { inPlace = [] } = graph.row(call.op);
  return inPlace.map((i) => call.inputs[i]).find((t) => t?.kind === "computed" && t.dtype === call.outputs[0].dtype && free(t));
}

/** Calls whose results need no memory of their own. What a run can return is no view: it goes to the caller's memory. */
function findViews(graph: Graph): Map<Tensor, View> {
  const views = new Map<Tensor, View>();
  const returned = new Set(graph.outputs.values());
  for (const call of graph.calls) {
    const [x] = call.inputs;
    const [y] = call.outputs;
    const at = graph.row(call.op).view?.(call) ?? null;
    const stacked = x?.kind === "weight" && x.shape.length > 2; // its parts lie apart
    if (at === null || returned.has(y) || returned.has(x) || stacked) continue;
    const inside = views.get(x);
    const bytes = at * ELEMENT_BYTES[x.dtype as keyof typeof ELEMENT_BYTES];
    if (Number.isNaN(bytes)) continue;
    views.set(y, { of: inside?.of ?? x, bytes: (inside?.bytes ?? 0) + bytes });
  }
  return views;
}

/** Memory in pieces, and the holes between them. */
class Arena {
  bytes = 0;
  /** By position; neighbours are merged. */
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
