/** A weight matrix applied to activations, with its bias where it has one. */
import type { Graph, Tensor } from "../graph/graph.ts";

export interface Linear {
  /** [out, in] */
  readonly weight: Tensor;
  /** [out] */
  readonly bias?: Tensor;
}

/** x [rows, in] to [rows, out]. */
export function linear(g: Graph, x: Tensor, w: Linear): Tensor {
  return g.linear(x, w.weight, w.bias);
}
