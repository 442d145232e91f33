/** What training minimises: how rows become a step's inputs, and how the loss is traced from them. Here: next-token prediction. */
import type { Numbers } from "../backend/backend.ts";
import type { Graph, Tensor } from "../graph/graph.ts";
import { crossEntropy } from "../model/linear.ts";
import type { Forward } from "../model/model.ts";
import { symbol } from "../tensor/shape.ts";
import { checkCausal, type RowLimits, segmentsOf } from "./check.ts";
import { type CausalExample, IGNORED } from "./data/example.ts";

/** The inputs of one run of a training or evaluation program, without rates and seed. */
export interface Batch {
  readonly rows: number;
  readonly sequences: number;
  /** By input name: ids, positions, segments, and what the objective declares. */
  readonly inputs: Readonly<Record<string, Numbers>>;
}

/** A training objective, by the kind of its rows. */
export interface Objective<R = CausalExample> {
  /**
   * Traces the loss, [1]: a sum over the batch's rows that are weighted such that the losses of all batches of an optimiser step add up to
   * the step's. Declares further inputs.
   * @param chunk rows whose logits are in memory at a time
   */
  readonly loss: (g: Graph, forward: Forward, chunk: number) => Tensor;
  /** How much an example counts in a step's mean: for a language model, its tokens with a label. */
  readonly count: (example: R) => number;
  /** The tokens of an example, for batches and memory. */
  readonly length: (example: R) => number;
  /** How many sequences an example is at most, each as long as the data set says the example is. Default 1. */
  readonly sequences?: number;
  /** Throws a RangeError that names the row if it cannot be used. */
  readonly check: (example: R, index: number, limits: RowLimits) => void;
  /** @param total the sum of `count` over all batches of the step */
  readonly collate: (examples: readonly R[], total: number) => Batch;
  /** Called with a batch's examples before they are collated: what the loss compares with is computed here. Default: nothing. */
  readonly prepare?: (examples: readonly R[]) => Promise<void>;
  /** Outputs of the loss's graph that the meter reads, by name: how many numbers of a batch each has. Default: none. */
  readonly outputs?: (batch: Batch) => Readonly<Record<string, number>>;
  /** Measures of a step or of an evaluation beside the loss, from the outputs of its batches. Default: none. */
  readonly meter?: () => Meter<R>;
}

/** Takes note of the batches of a step or of an evaluation. */
export interface Meter<R> {
  add(examples: readonly R[], outputs: Readonly<Record<string, Float32Array>>): void;
  /** Numbers for the log, by name. */
  values(): Readonly<Record<string, number>>;
}

/**
 * The weighted sum of each row's cross-entropy, [1].
 * @param labels [rows] i32: the next token; rows with a negative label are ignored
 * @param weights [rows]: 1 / (rows with a label) gives the mean
 * @param chunk rows whose logits are in memory at a time
 */
export function causalLoss(g: Graph, { hiddenStates, head, branches }: Forward, labels: Tensor, weights: Tensor, chunk: number): Tensor {
  const last = hiddenStates[hiddenStates.length - 1];
  return g.dot(crossEntropy(g, last, head, labels, chunk, branches), weights);
}

/** Next-token prediction: the mean over all tokens that have a label, each predicted from those before it in its segment. */
export const CAUSAL: Objective = {
  loss(g, forward, chunk) {
    const rows = symbol("rows");
    return causalLoss(g, forward, g.input("labels", [rows], "i32"), g.input("weights", [rows], "f32"), chunk);
  },
  check: checkCausal,
  length: (example) => example.input_ids.length,
  count: (example) => segmentsOf(example).reduce((n, segment) => n + predicted(example, segment), 0),
  collate(examples, total) {
    const rows = examples.reduce((n, e) => n + e.input_ids.length, 0);
    const segments = examples.flatMap(segmentsOf);
    const inputs = {
      ids: new Int32Array(rows),
      positions: new Int32Array(rows),
      labels: new Int32Array(rows).fill(-1),
      weights: new Float32Array(rows).fill(1 / Math.max(1, total)),
      segments: new Int32Array(segments.length * 3),
    };
    let [row, sequence] = [0, 0];
    for (const example of examples) {
      inputs.ids.set(example.input_ids, row);
      for (const [start, length] of segmentsOf(example)) {
        inputs.segments.set([row + start, length, 0], sequence++ * 3);
        for (let i = 0; i < length; i++) {
          inputs.positions[row + start + i] = i;
          // The label of a token is the next token's, as transformers shifts them; the last of a segment predicts nothing.
          const label = i + 1 < length ? example.labels[start + i + 1] : IGNORED;
          inputs.labels[row + start + i] = label === IGNORED ? -1 : label;
        }
      }
      row += example.input_ids.length;
    }
    return { rows, sequences: segments.length, inputs };
  },
};

function predicted({ labels }: CausalExample, [start, length]: readonly [number, number]): number {
  let n = 0;
  for (let i = start + 1; i < start + length; i++) if (labels[i] !== IGNORED) n++;
  return n;
}
