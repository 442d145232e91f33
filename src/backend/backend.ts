/** The interface of a backend for engines and trainers. A backend runs traced graphs; it knows ops and memory, not models. */
import type { Call } from "../graph/call.ts";
import type { Graph } from "../graph/graph.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { StoredFormat } from "../tensor/stored.ts";

/** Tokens per block of the KV cache. The CPU's kernels are compiled for the same number, which is checked when the addon loads. */
export const BLOCK_TOKENS = 32;

/** A range of bytes in a file. */
export interface Slice {
  readonly file: string;
  /** In bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** Where a weight is stored and the format in which programs read it; the backend converts it while loading if the two differ. */
export interface WeightSource {
  readonly name: string;
  readonly stored: StoredFormat;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  /** One slice; for stacked matrices [n, ...], n slices. */
  readonly parts: readonly Slice[];
}

/**
 * `auto`: answer from the mapped file at once, and move to huge pages in the background where memory allows it. `resident`: move
 * before the model is ready, or fail. `mapped`: stay in the file's pages, which several processes share.
 */
export const RESIDENCES = ["auto", "resident", "mapped"] as const;
export type Residence = (typeof RESIDENCES)[number];

/** Where weights are, and why not all of them are on huge pages. */
export interface Placement {
  readonly state: "mapped" | "moving" | "resident";
  /** Bytes moved to anonymous memory, of those that programs read from the mapping. */
  readonly movedBytes: number;
  readonly mappedBytes: number;
  /** Why `auto` did not move them, or not all of them; empty otherwise. */
  readonly why: string;
}

/** Loaded weights; programs refer to them by name. */
export interface Weights {
  readonly names: readonly string[];
  /** Bytes mapped from files, and bytes of converted copies. */
  readonly mappedBytes: number;
  readonly ownedBytes: number;
  /** Where the mapped bytes are now. */
  placement(): Placement;
  /** Resolves when no more weights will move, also because they were disposed of. */
  readonly settled: Promise<void>;
  /** Bytes of memory behind the weights, by kind of page. Takes milliseconds for gigabytes. Zeros where the system does not tell. */
  pages(): Promise<{ readonly huge: number; readonly small: number }>;
  /** Whether a run has failed because a file that they are mapped from was truncated or changed; all later runs fail too. */
  lost(): boolean;
  dispose(): void;
}

/** Memory that outlives a run, initially zero: a KV cache, a trained parameter, an optimiser's moments. */
export interface State {
  readonly bytes: number;
  /**
   * Returns a copy of its numbers, or of `count` from `at` on. Only for float32 states, and for those of whole words, whose bits it returns: the
   * layout of a cache is private to the backend.
   */
  read(at?: number, count?: number): Float32Array;
  /** Overwrites all of its numbers; with `at`, as many as are given, from there on. Throws a RangeError if they do not fit. */
  write(values: Float32Array, at?: number): void;
  dispose(): void;
}

/** Bytes that this process may use, within its control group's limit, and how many of them are left. */
export interface Memory {
  readonly total: number;
  readonly free: number;
}

export type Numbers = Float32Array | Int32Array;

export interface Program {
  /** Its calls after the backend's own passes. */
  readonly calls: readonly Call[];
  /**
   * Computes the outputs in `outputs`, directly into the given arrays, and runs every call that writes a state. Do not touch the arrays
   * until the promise settles. Inputs that no requested output depends on may be omitted.
   * Rejects if a size exceeds the capacity, an array is too short or an id is out of range.
   */
  run(sizes: SymbolValues, inputs: Readonly<Record<string, Numbers>>, outputs: Readonly<Record<string, Numbers>>): Promise<void>;
  /** Total seconds spent in each of `calls` over all runs. */
  seconds(): readonly number[];
  dispose(): void;
}

/** What suits a backend where the caller does not choose. */
export interface Defaults {
  /** The most rows of a step. */
  readonly rows: number;
  /** The share of the memory that the weights leave which the KV cache may take. */
  readonly cacheShare: number;
  /** The formats of the KV cache that it has kernels for. */
  readonly kvDtypes: readonly KvDtype[];
  /** The format that its kernels read instead of a matrix in this format: the same one, if they read it. */
  matrixDtype(stored: Dtype): Dtype;
  /** The format of the KV cache of a model whose embedding has this format. */
  kvDtype(embedding: Dtype): KvDtype;
}

export interface Backend {
  /** For display: `reference`, `avx512bf16`, `cuda:0`, ... */
  readonly name: string;
  /** For display, with what computes: `avx512bf16, 2 threads`, or `cuda:0, NVIDIA H200`. */
  readonly device: string;
  readonly threads: number;
  /** Whether it has kernels for gradients and updates. */
  readonly trains: boolean;
  readonly defaults: Defaults;
  memory(): Memory;
  /** @param residence where mapped weights are kept; default `auto` */
  load(sources: readonly WeightSource[], residence?: Residence): Promise<Weights>;
  /** @param shape as traced; the memory layout is up to the backend */
  state(dtype: Dtype, shape: readonly number[]): State;
  /**
   * Compiles a traced graph to a program with the backend's own passes: fuse, lower, plan.
   * @param capacity the largest value of each symbol, for which memory is reserved
   * @throws an error that names the op, if the backend has no kernel for one
   */
  prepare(graph: Graph, capacity: SymbolValues, weights: Weights, states: ReadonlyMap<string, State>): Program;
  dispose(): void;
}
