/**
 * Turns a graph into a flat program for a backend. Its computed values share one workspace, whose memory is reused as soon as a
 * value is dead. Planned once per graph and capacity; each run then fills in the symbolic sizes.
 */
import type { Dtype } from "../tensor/dtype.ts";
import { ELEMENT_BYTES } from "../tensor/dtype.ts";
import { int8KvBytes, int8RowBytes } from "../tensor/quantized.ts";
import { elements, type SymbolValues, sizeOf } from "../tensor/shape.ts";
import type { Call, Tensor } from "./call.ts";
import { type Graph, show } from "./graph.ts";
import { type Placement, place } from "./place.ts";

/** The most dimensions of a value that a record has room for. */
export const MAX_RANK = 4;
/**
 * Words of a value's record: place, index, byte offset of a view in its base, output or -1, dtype, rank, then `MAX_RANK` pairs (size
 * or factor, symbol or -1). Checked against the addon's when it loads.
 */
export const VALUE_WORDS = 6 + 2 * MAX_RANK;
/** Offsets in the workspace are in units of this many bytes, which is also their alignment. */
export const ARENA_UNIT = 64;

/**
 * Where a value is stored. `output`: only in the caller's memory; a workspace value with an output number is also written there
 * if a run asks for it. `view`: in the memory of the value `index`. `unused`: no call refers to it.
 */
export const PLACES = { arena: 0, weight: 1, state: 2, input: 3, output: 4, view: 5, unused: 6 } as const;

/** Codes of dtypes in programs. */
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
  fp8: 9,
  fp8kv: 10,
};

export interface Plan {
  /** The planned graph. Outputs are numbered in its order. */
  readonly graph: Graph;
  /** The program's calls: the graph's, without those that became views. */
  readonly calls: readonly Call[];
  readonly weights: readonly Tensor[];
  readonly states: readonly Tensor[];
  readonly inputs: readonly Tensor[];
  /** Symbol names, in the order in which runs pass their values. */
  readonly symbols: readonly string[];
  /** The largest value of each symbol that the workspace has room for; symbols without an entry are unlimited. */
  readonly capacity: SymbolValues;
  /** Bytes of workspace. */
  readonly arenaBytes: number;
  /** The ops used; calls refer to them by position. */
  readonly ops: readonly string[];
  /** `VALUE_WORDS` per value. */
  readonly values: Int32Array;
  /** Per call: op, number of inputs n, number of outputs m, first parameter, n + m value ids. */
  readonly program: Int32Array;
  readonly params: Float64Array;
}

/**
 * Plans `graph`. Throws an `internal:` error if a workspace value has a symbol without a capacity, if a value has more dimensions than
 * a record holds, or if a size exceeds 32 bits.
 */
export function plan(graph: Graph, capacity: SymbolValues): Plan {
  const used = new Uint8Array(graph.values.length);
  const names = new Set(Object.keys(capacity));
  const use = (t: Tensor): void => {
    if (used[t.id]) return;
    used[t.id] = 1;
    for (const d of t.shape) if (typeof d !== "number") names.add(d.symbol);
  };
  for (const c of graph.calls) {
    c.inputs.forEach(use);
    c.outputs.forEach(use);
  }
  const placement = place(graph, (t) => bytesWithin(t, capacity));
  const calls = placement.views.size === 0 ? graph.calls : graph.calls.filter((c) => !c.outputs.some((t) => placement.views.has(t)));
  const bound = (kind: Tensor["kind"]) => graph.values.filter((t) => t.kind === kind && used[t.id] === 1);
  const [weights, states, inputs] = [bound("weight"), bound("state"), bound("input")];
  const symbols = [...names];
  const ops = [...new Set(calls.map((c) => c.op))];
  return {
    graph,
    calls,
    weights,
    states,
    inputs,
    symbols,
    capacity,
    arenaBytes: placement.bytes,
    ops,
    values: records(graph, placement, { weights, states, inputs, symbols }),
    ...flat(calls, ops, graph),
  };
}

/** Size of `t` in bytes when its symbols have the values `sizes`. */
export function bytesOf(t: Pick<Tensor, "dtype" | "shape">, sizes: SymbolValues): number {
  if (t.dtype === "int8row") return sizeOf(t.shape[0], sizes) * int8RowBytes(sizeOf(t.shape[1], sizes));
  if (t.dtype === "int8kv") return elements(t.shape.slice(0, 3), sizes) * int8KvBytes(sizeOf(t.shape[3], sizes));
  if (t.dtype === "bf16pair") return elements(t.shape, sizes) * 2 * ELEMENT_BYTES.bf16;
  if (t.dtype === "int8" || t.dtype === "int4" || t.dtype === "fp8")
    throw new Error("internal: only weights can be in block formats, and they have their own memory");
  return elements(t.shape, sizes) * ELEMENT_BYTES[t.dtype];
}

/** Size in bytes at capacity, rounded up to whole units; null if a symbol has no capacity. */
function bytesWithin(t: Tensor, capacity: SymbolValues): number | null {
  if (t.shape.some((d) => typeof d !== "number" && capacity[d.symbol] === undefined)) return null;
  return Math.ceil(bytesOf(t, capacity) / ARENA_UNIT) * ARENA_UNIT;
}

function records(
  graph: Graph,
  { offsets, views, bytes }: Placement,
  { weights, states, inputs, symbols }: Pick<Plan, "weights" | "states" | "inputs" | "symbols">,
) {
  const bound = new Int32Array(graph.values.length).fill(-1);
  for (const list of [weights, states, inputs])
    list.forEach((t, i) => {
      bound[t.id] = i;
    });
  const outputs = new Int32Array(graph.values.length).fill(-1);
  [...graph.outputs.values()].forEach((t, i) => {
    outputs[t.id] = i;
  });
  const numbered = new Map(symbols.map((name, i) => [name, i]));
  const values = new Int32Array(graph.values.length * VALUE_WORDS);
  for (const t of graph.values) {
    if (t.shape.length > MAX_RANK)
      throw new Error(`internal: the value ${t.name ?? t.id} (${show(t)}) has more than ${MAX_RANK} dimensions`);
    const at = t.id * VALUE_WORDS;
    const view = views.get(t);
    let [where, index]: readonly [number, number] = [PLACES.unused, 0];
    if (view) [where, index] = [PLACES.view, view.of.id];
    else if (offsets[t.id] >= 0) [where, index] = [PLACES.arena, offsets[t.id] / ARENA_UNIT];
    else if (outputs[t.id] >= 0) [where, index] = [PLACES.output, outputs[t.id]];
    else if (t.kind !== "computed" && bound[t.id] >= 0) [where, index] = [PLACES[t.kind], bound[t.id]];
    values[at] = where;
    values[at + 1] = fits32(index, t, bytes);
    values[at + 2] = fits32(view?.bytes ?? 0, t, bytes);
    values[at + 3] = outputs[t.id];
    values[at + 4] = DTYPE_CODES[t.dtype];
    values[at + 5] = t.shape.length;
    t.shape.forEach((d, i) => {
      values[at + 6 + 2 * i] = fits32(typeof d === "number" ? d : d.times, t, bytes);
      values[at + 7 + 2 * i] = typeof d === "number" ? -1 : (numbered.get(d.symbol) ?? -1); // a symbol of an unused value has no number
    });
  }
  return values;
}

function fits32(word: number, t: Tensor, bytes: number): number {
  if (word <= 0x7fffffff) return word;
  throw new Error(
    `internal: the value ${t.name ?? t.id} (${show(t)}) needs the number ${word} (of ${bytes} bytes of workspace), which does not fit in 32 bits`,
  );
}

function flat(calls: readonly Call[], ops: readonly string[], graph: Graph): Pick<Plan, "program" | "params"> {
  const program: number[] = [];
  const params: number[] = [];
  const positions = new Map(ops.map((op, i) => [op, i]));
  for (const { op, inputs, outputs, params: given } of calls) {
    program.push(positions.get(op) as number, inputs.length, outputs.length, params.length);
    for (const t of inputs) program.push(t.id);
    for (const t of outputs) program.push(t.id);
    for (const name of graph.row(op).params ?? []) params.push(given[name]);
  }
  return { program: Int32Array.from(program), params: Float64Array.from(params) };
}
