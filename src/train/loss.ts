/** Traces the loss of next-token prediction. */
import type { Graph, Tensor } from "../graph/graph.ts";
import type { Forward } from "../model/model.ts";

/**
 * The weighted sum of each row's cross-entropy, [1].
 * @param labels [rows] i32: the next token; rows with a negative label are ignored
 * @param weights [rows]: 1 / (rows with a label) gives the mean
 * @param chunk rows whose logits are in memory at a time
 */
export function causalLoss(g: Graph, { hiddenStates, head }: Forward, labels: Tensor, weights: Tensor, chunk: number): Tensor {
  const last = hiddenStates[hiddenStates.length - 1];
  return g.dot(g.crossEntropy(last, head.weight, labels, chunk, head.bias), weights);
}
