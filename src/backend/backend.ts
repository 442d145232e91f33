/** What an engine or a trainer needs from a backend. It runs traced graphs; it knows ops and memory, not models. */
import type { Call } from "../graph/call.ts";
import type { Graph } from "../graph/graph.ts";
import type { Dtype } from "../tensor/dtype.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { StoredFormat } from "../tensor/stored.ts";

/** Tokens of a block of the KV cache. The CPU's kernels are compiled for the same number, which the addon tells. */
export const BLOCK_TOKENS = 32;

/** A piece of a file. */
export interface Slice {
  readonly file: string;
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** Where a weight's numbers are, and the format in which programs read them; the backend converts while loading where the two differ. */
export interface WeightSource {
  readonly name: string;
  readonly stored: StoredFormat;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  /** One slice, or for stacked matrices [n, ...] one for each of the n. */
  readonly parts: readonly Slice[];
}

/** Weights as loaded; programs refer to them by name. */
export interface Weights {
  readonly names: readonly string[];
  /** Bytes that are mapped from files, and bytes of converted copies. */
  readonly mappedBytes: number;
  readonly ownedBytes: number;
  dispose(): void;
}

/** Memory that outlives a run, zero at first: a KV cache, a parameter that is trained, an optimiser's moments. */
export interface State {
  readonly bytes: number;
  /** A copy of its numbers. Of float32 states only: a cache is laid out as the backend wants. */
  read(): Float32Array;
  /** Overwrites all of its numbers. Throws RangeError on another count. */
  write(values: Float32Array): void;
  dispose(): void;
}

/** Bytes that this process may use, the limit of its control group included, and what is left of them. */
export interface Memory {
  readonly total: number;
  readonly free: number;
}

export type Numbers = Float32Array | Int32Array;

export interface Program {
  /** The calls that it is made of, after the backend's own passes. */
  readonly calls: readonly Call[];
  /**
   * Computes what `outputs` names, straight into the arrays given, and whatever writes a state. All arrays must stay untouched until
   * it settles. Inputs that nothing asked for depends on may be left out.
   * Rejects when a size exceeds the capacity, an array is too short or an id is out of range.
   */
  run(sizes: SymbolValues, inputs: Readonly<Record<string, Numbers>>, outputs: Readonly<Record<string, Numbers>>): Promise<void>;
  /** Seconds that each of `calls` took, all runs together. */
  seconds(): readonly number[];
  dispose(): void;
}

export interface Backend {
  /** For people: `reference`, `avx512bf16`, ... */
  readonly name: string;
  readonly threads: number;
  memory(): Memory;
  load(sources: readonly WeightSource[]): Promise<Weights>;
  /** @param shape as traced; how it is laid out is the backend's business */
  state(dtype: Dtype, shape: readonly number[]): State;
  /**
   * Makes a program of a traced graph, which is complete by now, by the backend's own passes: fuse, lower, plan.
   * @param capacity the largest value of each symbol that memory is set aside for
   * @throws when an op has no kernel here, naming it
   */
  prepare(graph: Graph, capacity: SymbolValues, weights: Weights, states: ReadonlyMap<string, State>): Program;
  dispose(): void;
}
