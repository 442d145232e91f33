/** What an engine asks of whoever computes. A backend runs planned programs; it knows ops and memory, not models. */
import type { Plan } from "../graph/plan.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { StoredFormat } from "../tensor/stored.ts";

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

/** Memory that outlives a run, zero at first. Pages are committed when first written. */
export interface State {
  readonly bytes: number;
  dispose(): void;
}

export type Numbers = Float32Array | Int32Array;

export interface Program {
  /**
   * Runs the whole program once. `inputs` and `outputs` are in the plan's order and must stay untouched until it settles.
   * Rejects when a size exceeds the plan's capacity or an id is out of range.
   */
  run(sizes: SymbolValues, inputs: readonly Numbers[], outputs: readonly Numbers[]): Promise<void>;
  /** Seconds that each call of the plan took, all runs together. */
  seconds(): readonly number[];
  dispose(): void;
}

export interface Backend {
  /** For people: `reference`, `avx512bf16`, ... */
  readonly name: string;
  readonly threads: number;
  load(sources: readonly WeightSource[]): Promise<Weights>;
  state(dtype: KvDtype, shape: readonly number[]): State;
  /** Throws when an op has no kernel here, naming it. */
  prepare(plan: Plan, weights: Weights, states: ReadonlyMap<string, State>): Program;
  dispose(): void;
}
