/** One training step as a graph: forward, loss, gradients, and the optimiser's update of the trained parameters. */
import { backward, gradientName } from "../graph/backward.ts";
import { checked, Graph } from "../graph/graph.ts";
import { narrow } from "../graph/narrow.ts";
import { remat } from "../graph/remat.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { symbol } from "../tensor/shape.ts";
import { causalLoss } from "./loss.ts";
import { adamw, update } from "./optimiser.ts";

export interface StepOptions {
  /** Whether a parameter is trained: a float32 state of its name. All others are weights. */
  readonly trains: (parameter: ModelParameter) => boolean;
  /** The format in which each other parameter was loaded. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** Recompute each layer's activations for its gradients instead of storing them. Default true. */
  readonly checkpointing?: boolean;
  /** Largest gradient norm. Default: no limit. */
  readonly clip?: number | null;
  /** Rows whose logits are in memory at a time, at most. Default 128. */
  readonly chunk?: number;
  /**
   * The format of products. `bf16`: trained matrices are rounded to bfloat16 once a step, and activations and gradients where they meet a
   * bfloat16 matrix, trained or frozen; sums, parameters and the optimiser stay float32. Fast where processors multiply bfloat16. Default `f32`.
   */
  readonly compute?: "f32" | "bf16";
}

export interface TrainingStep {
  /**
   * Inputs: ids, positions, labels [rows] i32, weights [rows], segments [sequences, 3], seed [2] i32, rates [7] (see `adamwRates`).
   * Outputs: loss [1], `gradient.NAME` of each trained parameter, and with `clip` gradientNorm [1].
   */
  readonly graph: Graph;
  readonly trained: readonly ModelParameter[];
}

/** A step on several batches whose gradients add up. */
export interface AccumulatingStep {
  /**
   * Adds a batch's gradients to the states `gradient.NAME`, which are as large as their parameters. Inputs as in a `TrainingStep`, without
   * rates; `weights` are those of the whole step, for example 1 / (rows with a label in all of its batches). Outputs: loss [1], the batch's
   * share, and `gradient.NAME`.
   */
  readonly gradients: Graph;
  /** Updates the parameters with the states `gradient.NAME` and sets these to zeros. Input: rates [7]. Output: with `clip` gradientNorm [1]. */
  readonly update: Graph;
  readonly trained: readonly ModelParameter[];
}

/** Throws if no parameter is trained. */
export function trainingStep(model: Model, options: StepOptions): TrainingStep {
  const { graph, trained } = gradientsOf(model, options);
  const names = trained.map((p) => p.name);
  return { graph: adamw(graph, names, options.clip ?? null), trained };
}

/** Throws if no parameter is trained. */
export function accumulatingStep(model: Model, options: StepOptions): AccumulatingStep {
  const { graph, trained } = gradientsOf(model, options);
  const gradients = graph.branch();
  for (const call of graph.calls) gradients.push(call);
  for (const { name, shape } of trained) {
    const gradient = graph.outputs.get(gradientName(name));
    gradients.call("accumulate", [gradients.state(gradientName(name), shape, "f32"), gradient]);
  }
  const g = new Graph();
  const steps = trained.map(({ name, shape }) => ({
    name,
    parameter: g.state(name, shape, "f32"),
    gradient: g.state(gradientName(name), shape, "f32"),
  }));
  update(g, steps, options.clip ?? null);
  for (const { gradient } of steps) g.call("clear", [gradient]);
  return { gradients: checked(gradients, "accumulate"), update: checked(g, "adamw"), trained };
}

/** The loss and its gradients. */
function gradientsOf(model: Model, options: StepOptions): TrainingStep {
  const { trains, dtypeOf, checkpointing = true, chunk = 128, compute = "f32" } = options;
  const trained = model.parameters.filter(trains);
  if (trained.length === 0) throw new RangeError("no parameter of the model is selected for training");
  const names = trained.map((p) => p.name);
  const chosen = new Set(names);
  const g = new Graph();
  const rows = symbol("rows");
  const half = compute === "bf16";
  const forward = model.forward(
    g,
    ({ name, shape, kind }) => {
      if (!chosen.has(name)) return g.weight(name, shape, dtypeOf(name));
      const state = g.state(name, shape, "f32");
      return half && kind !== "float32" ? g.call("castBf16", [state])[0] : state;
    },
    {
      ids: g.input("ids", [rows], "i32"),
      positions: g.input("positions", model.positionAxes === 1 ? [rows] : [model.positionAxes, rows], "i32"),
      segments: g.input("segments", [symbol("sequences"), 3], "i32"),
      cache: null,
      seed: g.input("seed", [2], "i32"),
    },
  );
  g.output("loss", causalLoss(g, forward, g.input("labels", [rows], "i32"), g.input("weights", [rows], "f32"), chunk));
  const gradients = backward(half ? narrow(g) : g, "loss", names);
  return { graph: checkpointing ? remat(gradients, (scope) => scope.startsWith("layers.")) : gradients, trained };
}
