/** Applies weight matrices to activations, one matrix or one per expert, with an optional bias and low-rank adapter. */
import type { Graph, Tensor } from "../graph/graph.ts";

/** A low-rank branch beside a matrix: scale * B(A(x)) (https://arxiv.org/abs/2106.09685). */
export interface Adapter<T = Tensor> {
  /** [rank, in], or [experts, rank, in] */
  readonly a: T;
  /** [out, rank], or [experts, out, rank] */
  readonly b: T;
  readonly scale: number;
  readonly dropout: number;
  /** The stream of random numbers for this adapter's dropout, distinct from every other's. */
  readonly stream: number;
}

export interface Linear<T = Tensor> {
  /** [out, in] */
  readonly weight: T;
  /** [out] */
  readonly bias?: T;
  readonly adapter?: Adapter<T>;
}

/** Stacked matrices, one per expert. */
export interface ExpertLinear<T = Tensor> {
  /** [experts, out, in] */
  readonly weight: T;
  readonly adapter?: Adapter<T>;
}

/** The expert slots sorted by expert, from `route` and `group`. */
export interface Slots {
  readonly order: Tensor;
  readonly offsets: Tensor;
}

/** Maps x [rows, in] to [rows, out]. @param seed seeds the adapter's dropout */
export function linear(g: Graph, x: Tensor, { weight, bias, adapter }: Linear, seed?: Tensor): Tensor {
  const y = g.linear(x, weight, bias);
  if (!adapter) return y;
  // The scale is applied where there are the fewest numbers.
  return g.add(y, g.linear(g.scale(g.linear(dropped(g, x, adapter, seed), adapter.a), adapter.scale), adapter.b));
}

/** Maps x [rows, in], with `slots` slots per row, to [slots * rows, out]: each slot by its expert's matrix. */
export function expertLinear(
  g: Graph,
  x: Tensor,
  { weight, adapter }: ExpertLinear,
  { order, offsets }: Slots,
  slots: number,
  seed?: Tensor,
): Tensor {
  const y = g.groupedLinear(x, weight, order, offsets, slots);
  if (!adapter) return y;
  const low = g.groupedLinear(dropped(g, x, adapter, seed), adapter.a, order, offsets, slots);
  return g.add(y, g.groupedLinear(g.scale(low, adapter.scale), adapter.b, order, offsets, 1));
}

function dropped(g: Graph, x: Tensor, { dropout, stream }: Adapter, seed?: Tensor): Tensor {
  return seed && dropout > 0 ? g.dropout(x, seed, dropout, stream) : x;
}
