/**
 * Turns a graph into what a backend runs: a flat program whose computed values share one arena, memory being reused as
 * soon as a value is dead. Made once for a graph and a capacity; each run then fills in the symbolic sizes.
 */
import type { Dtype } from "../tensor/dtype.ts";
import { ELEMENT_BYTES } from "../tensor/dtype.ts";
import { int8KvBytes, int8RowBytes } from "../tensor/quantized.ts";
import { elements, type SymbolValues, sizeOf } from "../tensor/shape.ts";
import type { Graph, Tensor } from "./graph.ts";
import { OPS } from "./ops.ts";

/** Words of a value's record: place, index, dtype, rank, then four pairs (size or factor, symbol or -1). `native/plan.cpp` reads the same. */
export const VALUE_WORDS = 12;
/** Offsets in the arena are in units of this many bytes, which is also their alignment. */
export const ARENA_UNIT = 64;

const PLACES = { arena: 0, weight: 1, state: 2, input: 3, output: 4 } as const;
/** Numbers that stand for dtypes in programs; `native/kernels.h` has the same. */
export const DTYPE_CODES: Readonly<Record<Dtype, number>> = {
  f32: 0,
  f16: 1,
  bf16: 2,
  i32: 3,
  int8: 4,
  int8row: 5,
  int4: 6,
  bf16pair: 7,
  int8kv: 8,
};

export interface Plan {
  readonly graph: Graph;
  /** Symbol names, in the order in which a run passes their values. */
  readonly symbols: readonly string[];
  /** The largest value of each symbol that the arena has room for. */
  readonly capacity: SymbolValues;
  readonly arenaBytes: number;
  /** Values by where they are bound, each in the order of its list. */
  readonly weights: readonly Tensor[];
  readonly states: readonly Tensor[];
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  /** The ops that occur; calls refer to them by position. */
  readonly ops: readonly string[];
  /** `VALUE_WORDS` a value. */
  readonly values: Int32Array;
  /** A call: op, inputs n, outputs m, first parameter, n + m value ids. */
  readonly calls: Int32Array;
  readonly params: Float64Array;
}

/**
 * Plans `graph`. `outputs` are the computed values that a run hands to its caller, written straight into the caller's memory.
 * Throws when a symbol has no capacity.
 */
export function plan(graph: Graph, outputs: readonly Tensor[], capacity: SymbolValues): Plan {
  const symbols = Object.keys(capacity);
  const ofKind = (kind: Tensor["kind"]) => graph.values.filter((t) => t.kind === kind);
  const [weights, states, inputs] = [ofKind("weight"), ofKind("state"), ofKind("input")];
  const arena = placeInArena(graph, new Set(outputs.map((t) => t.id)), capacity);

  const values = new Int32Array(graph.values.length * VALUE_WORDS);
  const record = (t: Tensor, place: number, index: number) => {
    const dims = t.shape.flatMap((d) => (typeof d === "number" ? [d, -1] : [d.times, symbols.indexOf(d.symbol)]));
    values.set([place, index, DTYPE_CODES[t.dtype], t.shape.length, ...dims], t.id * VALUE_WORDS);
  };
  weights.forEach((t, i) => {
    record(t, PLACES.weight, i);
  });
  states.forEach((t, i) => {
    record(t, PLACES.state, i);
  });
  inputs.forEach((t, i) => {
    record(t, PLACES.input, i);
  });
  for (const [t, offset] of arena.offsets) record(t, PLACES.arena, offset / ARENA_UNIT);
  outputs.forEach((t, i) => {
    record(t, PLACES.output, i);
  });

  const ops = [...new Set(graph.calls.map((c) => c.op))];
  const calls: number[] = [];
  const params: number[] = [];
  for (const c of graph.calls) {
    calls.push(
      ops.indexOf(c.op),
      c.inputs.length,
      c.outputs.length,
      params.length,
      ...c.inputs.map((t) => t.id),
      ...c.outputs.map((t) => t.id),
    );
    params.push(...OPS[c.op].params.map((name) => c.params[name]));
  }
  return {
    graph,
    symbols,
    capacity,
    arenaBytes: arena.bytes,
    weights,
    states,
    inputs,
    outputs,
    ops,
    values,
    calls: Int32Array.from(calls),
    params: Float64Array.from(params),
  };
}

/** Bytes that `t` takes when its symbols have `sizes`. */
export function bytesOf(t: Pick<Tensor, "dtype" | "shape">, sizes: SymbolValues): number {
  if (t.dtype === "int8row") return sizeOf(t.shape[0], sizes) * int8RowBytes(sizeOf(t.shape[1], sizes));
  if (t.dtype === "int8kv") return elements(t.shape.slice(0, 3), sizes) * int8KvBytes(sizeOf(t.shape[3], sizes));
  if (t.dtype === "bf16pair") return elements(t.shape, sizes) * 2 * ELEMENT_BYTES.bf16;
  if (t.dtype === "int8" || t.dtype === "int4") throw new Error("internal: only weights are in blocks, and they bring their own memory");
  return elements(t.shape, sizes) * ELEMENT_BYTES[t.dtype];
}

interface Hole {
  readonly at: number;
  readonly bytes: number;
}

/** First fit over the holes that dead values leave; an output of a call never overlaps its inputs. */
function placeInArena(graph: Graph, pinned: ReadonlySet<number>, capacity: SymbolValues) {
  const lastUse = new Map<number, number>();
  graph.calls.forEach((c, i) => {
    for (const t of [...c.inputs, ...c.outputs]) lastUse.set(t.id, i);
  });
  const offsets = new Map<Tensor, number>();
  let holes: Hole[] = [];
  let bytes = 0;
  const roundUp = (n: number) => Math.ceil(n / ARENA_UNIT) * ARENA_UNIT;

  const take = (size: number): number => {
    const hole = holes.find((h) => h.bytes >= size);
    if (hole) {
      const rest = { at: hole.at + size, bytes: hole.bytes - size };
      holes = holes.flatMap((h) => (h !== hole ? [h] : rest.bytes ? [rest] : []));
      return hole.at;
    }
    const last = holes.at(-1);
    const at = last && last.at + last.bytes === bytes ? last.at : bytes; // grow the hole at the end
    if (at !== bytes) holes = holes.slice(0, -1);
    bytes = at + size;
    return at;
  };
  const release = (freed: Hole): void => {
    const merged: Hole[] = [];
    for (const h of [...holes, freed].sort((a, b) => a.at - b.at)) {
      const before = merged.at(-1);
      if (before && before.at + before.bytes === h.at) merged[merged.length - 1] = { at: before.at, bytes: before.bytes + h.bytes };
      else merged.push(h);
    }
    holes = merged;
  };

  graph.calls.forEach((c, i) => {
    for (const t of c.outputs) if (!pinned.has(t.id)) offsets.set(t, take(roundUp(bytesOf(t, capacity))));
    for (const t of new Set([...c.inputs, ...c.outputs])) {
      const at = offsets.get(t);
      if (at !== undefined && lastUse.get(t.id) === i) release({ at, bytes: roundUp(bytesOf(t, capacity)) });
    }
  });
  return { offsets, bytes };
}
