/** The parts of a graph: values, calls, and the rows of the op table. Knows no op by name. */
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

/** Scalars of a call, by name. Kernels get them in the order that the op's row lists. */
export type Params = Readonly<Record<string, number>>;
/** Sizes of a call's results that do not follow from its inputs, by name. Kernels see them as dimensions of the outputs. */
export type Sizes = Readonly<Record<string, Dim>>;

export interface Call {
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  readonly params: Params;
  readonly sizes: Sizes;
  /** Where the call was traced: a layer such as `layers.3`, prefixed with `BACKWARD` for its gradients, or "" outside of layers. */
  readonly scope: string;
  /** States that the call reads and writes. A call that writes one is never removed or moved. */
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
 * Gradients of a call's inputs, given those of its outputs (null: the loss does not depend on that output). `wanted` says
 * which inputs need one; the others may be null. A null for a wanted input means that its gradient is zero.
 */
export type Gradient = (emit: Emit, call: Call, dy: readonly (Tensor | null)[], wanted: readonly boolean[]) => readonly (Tensor | null)[];

/** A row of the op table. */
export interface Op {
  /** Names of the scalar parameters, in the order in which kernels get them. Default: none. */
  readonly params?: readonly string[];
  /** Shapes and dtypes of the outputs, or null if the inputs do not agree. */
  outputs(inputs: readonly Tensor[], params: Params, sizes: Sizes): readonly Result[] | null;
  /** The gradient rule, or the reason why there is none. */
  readonly gradient: Gradient | string;
  /** Positions of the inputs that are states written by the op. */
  readonly writes?: readonly number[];
  /** Positions of the inputs whose memory the first output may reuse if this call is their last use. */
  readonly inPlace?: readonly number[];
  /** The output's offset in the first input's memory, in elements, if it can be a view; null if it needs a copy. */
  view?(call: Pick<Call, "inputs" | "outputs" | "params">): number | null;
  /** Why the result is kept for the backward pass instead of recomputed; unset if it may be recomputed. */
  readonly kept?: string;
}

export type OpTable = Readonly<Record<string, Op>>;

/** Reasons why an op has no gradient. */
export const FIRST_ORDER = "a gradient itself: losses are differentiated once";
export const SERVING = "used when serving only: training computes whole sequences, without a cache or sampling";
export const WHOLE_NUMBERS = "its results are whole numbers";
export const AFTER_BACKWARD = "made by a later pass, when gradients have been taken";
