/** One training step as a graph: forward, loss, gradients, and the optimiser's update of the trained parameters. */
import { backward } from "../graph/backward.ts";
import { Graph } from "../graph/graph.ts";
import { remat } from "../graph/remat.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { symbol } from "../tensor/shape.ts";
import { causalLoss } from "./loss.ts";
import { adamw } from "./optimiser.ts";

export interface StepOptions {
  /** Whether a parameter is trained: a float32 state of its name. All others are weights. */
  readonly trains: (parameter: ModelParameter) => boolean;
  /** The format in which each other parameter was loaded. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** Recompute each layer's activations for its gradients instead of storing them. Default true. */
  readonly checkpointing?: boolean;
  /** Largest gradient norm. Default: no limit. */
  readonly clip?: number | null;
  /** Rows whose logits are in memory at a time. Default 128. */
  readonly chunk?: number;
}

export interface TrainingStep {
  /**
   * Inputs: ids, positions, labels [rows] i32, weights [rows], segments [sequences, 3], seed [2] i32, rates [7] (see `adamwRates`).
   * Outputs: loss [1], `gradient.NAME` of each trained parameter, and with `clip` gradientNorm [1].
   */
  readonly graph: Graph;
  readonly trained: readonly ModelParameter[];
}

/** Throws if no parameter is trained. */
export function trainingStep(model: Model, options: StepOptions): TrainingStep {
  const { trains, dtypeOf, checkpointing = true, clip = null, chunk = 128 } = options;
  const trained = model.parameters.filter(trains);
  if (trained.length === 0) throw new RangeError("no parameter of the model is selected for training");
  const names = trained.map((p) => p.name);
  const chosen = new Set(names);
  const g = new Graph();
  const rows = symbol("rows");
  const forward = model.forward(
    g,
    ({ name, shape }) => (chosen.has(name) ? g.state(name, shape, "f32") : g.weight(name, shape, dtypeOf(name))),
    {
      ids: g.input("ids", [rows], "i32"),
      positions: g.input("positions", model.positionAxes === 1 ? [rows] : [model.positionAxes, rows], "i32"),
      segments: g.input("segments", [symbol("sequences"), 3], "i32"),
      cache: null,
      seed: g.input("seed", [2], "i32"),
    },
  );
  g.output("loss", causalLoss(g, forward, g.input("labels", [rows], "i32"), g.input("weights", [rows], "f32"), chunk));
  const gradients = backward(g, "loss", names);
  return { graph: adamw(checkpointing ? remat(gradients, (scope) => scope.startsWith("layers.")) : gradients, names, clip), trained };
}
