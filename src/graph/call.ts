/** What graphs are made of: values, calls, and the rows of the op table. Knows no op by name. */
import type { Dtype } from "../tensor/dtype.ts";
import type { Dim, Shape } from "../tensor/shape.ts";

/**
 * Where a value's memory comes from: computed by a call, bound once when the program is prepared (`weight`, `state`), or
 * passed to each run (`input`).
 */
export type Kind = "computed" | "weight" | "state" | "input";

/** A value of a graph. Holds no data: `id` indexes the graph's values. */
export interface Tensor {
  readonly id: number;
  readonly kind: Kind;
  /** The name that a weight, state or input is bound by. */
  readonly name?: string;
  readonly dtype: Dtype;
  readonly shape: Shape;
}

/** Scalars of a call, by name. Kernels get them in the order of the op's row. */
export type Params = Readonly<Record<string, number>>;
/** Sizes of a call's results that its inputs don't tell, by name. Kernels see them as dimensions of the outputs. */
export type Sizes = Readonly<Record<string, Dim>>;

export interface Call {
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  readonly params: Params;
  readonly sizes: Sizes;
  /** What traced the call: a layer, as `layers.3`; behind `BACKWARD` for what differentiates it; "" outside of layers. */
  readonly scope: string;
  /** States that the call reads and writes. A call that writes one must run, and keeps its place. */
  readonly effects: { readonly reads: readonly Tensor[]; readonly writes: readonly Tensor[] };
}

/** Scope prefix of calls that compute gradients. */
export const BACKWARD = "backward/";

export interface Result {
  readonly shape: Shape;
  readonly dtype: Dtype;
}

/** Appends a call and returns its outputs. */
export type Emit = (op: string, inputs: readonly (Tensor | undefined)[], params?: Params, sizes?: Sizes) => Tensor[];

/**
 * Gradients of a call's inputs, given those of its outputs (null: the loss does not depend on that output). `wanted` says of
 * which inputs; the others may be null. A null for a wanted input means that the gradient is zero.
 */
export type Gradient = (emit: Emit, call: Call, dy: readonly (Tensor | null)[], wanted: readonly boolean[]) => readonly (Tensor | null)[];

/** A row of the op table. */
export interface Op {
  /** Names of the scalar parameters, in the order in which kernels get them. Default: none. */
  readonly params?: readonly string[];
  /** Shapes and dtypes of the outputs, or null when the inputs do not agree. */
  outputs(inputs: readonly Tensor[], params: Params, sizes: Sizes): readonly Result[] | null;
  /** The rule, or the reason why there is none. */
  readonly gradient: Gradient | string;
  /** Positions of the inputs that are states and are written. */
  readonly writes?: readonly number[];
  /** Positions of the inputs whose memory the first output may take over where they end with the call. */
  readonly inPlace?: readonly number[];
  /** Where in the first input's memory the output is, in elements, if no copy is needed; null where it is. */
  view?(call: Pick<Call, "inputs" | "outputs" | "params">): number | null;
  /** Set where the result is kept for the backward pass rather than computed again: why. */
  readonly kept?: string;
}

export type OpTable = Readonly<Record<string, Op>>;

/** Reasons why an op has no gradient. */
export const FIRST_ORDER = "a gradient itself: losses are differentiated once";
export const SERVING = "used when serving only: training computes whole sequences, without a cache or sampling";
export const WHOLE_NUMBERS = "its results are whole numbers";
export const AFTER_BACKWARD = "made by a later pass, when gradients have been taken";
