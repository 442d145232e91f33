/** One training step as a graph: forward, loss, gradients, and the optimiser's update of the trained parameters. */
import { backward, gradientName } from "../graph/backward.ts";
import { checked, Graph, type Tensor } from "../graph/graph.ts";
import { narrow } from "../graph/narrow.ts";
import { remat } from "../graph/remat.ts";
import type { Forward, Model, ModelParameter } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { symbol } from "../tensor/shape.ts";
import { CAUSAL, type Objective } from "./loss.ts";
import { adamw, type MomentFormat, update } from "./optimiser.ts";
import { type RouterOptions, routedLoss, routerLosses } from "./router.ts";

export interface LossOptions {
  /** Whether a parameter is trained: a float32 state of its name. All others are weights. */
  readonly trains: (parameter: ModelParameter) => boolean;
  /** Whether a parameter is a float32 state without being trained: a frozen adapter. Default: none. */
  readonly holds?: (parameter: ModelParameter) => boolean;
  /** The format in which each other parameter was loaded. */
  readonly dtypeOf: (parameter: string) => Dtype;
  /** Default: next-token prediction. */
  readonly objective?: Pick<Objective, "loss">;
  /** Rows whose logits are in memory at a time, at most. Default 128. */
  readonly chunk?: number;
  /** What is added to the loss in training for the routers, and what is counted of them. Default: nothing. */
  readonly router?: RouterOptions | null;
  /**
   * The format of products. `bf16`: trained matrices are rounded to bfloat16 once a step, and activations and gradients where they meet a
   * bfloat16 matrix, trained or frozen; sums, parameters and the optimiser stay float32. Fast where processors multiply bfloat16. Default `f32`.
   */
  readonly compute?: "f32" | "bf16";
}

export interface StepOptions extends LossOptions {
  /** Recompute each layer's activations for its gradients instead of storing them. Default true. */
  readonly checkpointing?: boolean;
  /** Largest gradient norm. Default: no limit. */
  readonly clip?: number | null;
  /** Whether weight decay applies to a trained parameter. Default: to all. */
  readonly decays?: (parameter: string) => boolean;
  /** The format of the optimiser's moments. Default `f32`. */
  readonly moments?: MomentFormat;
  /** Whether only some experts of a stacked parameter are trained: those with a 1 in the input `experts.NAME` [experts, 1]. Default: no. */
  readonly partial?: (parameter: string) => boolean;
  /** Add the outputs `probe.i`: the norm of the hidden states before layer i, or after the final norm. Default false. */
  readonly probes?: boolean;
}

export interface TrainingStep {
  /**
   * Inputs: ids, positions, segments [sequences, 3], seed [2] i32, rates [7] (see `adamwRates`; `rates.plain` without decay), and those of the
   * objective. Outputs: loss [1], `gradient.NAME` of each trained parameter, and with `clip` gradientNorm [1].
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
  /** The norm of all states `gradient.NAME` together, as the output gradientNorm [1]. */
  readonly norm: Graph;
  /** Updates the parameters with the states `gradient.NAME` and sets these to zeros. Input: rates [7]. Output: with `clip` gradientNorm [1]. */
  readonly update: Graph;
  readonly trained: readonly ModelParameter[];
}

/** The input that says which experts of a parameter are trained. */
export function expertsName(parameter: string): string {
  return `experts.${parameter}`;
}

/** Throws if no parameter is trained. */
export function trainingStep(model: Model, options: StepOptions): TrainingStep {
  const { graph, trained } = gradientsOf(model, options);
  const names = trained.map((p) => p.name);
  return { graph: adamw(graph, names, options.clip ?? null, options.decays, options.moments), trained };
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
  update(g, steps, options.clip ?? null, options.decays, options.moments);
  for (const { gradient } of steps) g.call("clear", [gradient]);
  const norm = new Graph();
  const all = trained.map(({ name, shape }) => norm.state(gradientName(name), shape, "f32"));
  norm.output("gradientNorm", norm.call("norm", all)[0]);
  return { gradients: checked(gradients, "accumulate"), norm, update: checked(g, "adamw"), trained };
}

/** A graph whose outputs are the loss and, apart from it, the routers' losses if they count, for evaluation: nothing is dropped. */
export function evaluationStep(model: Model, options: LossOptions): Graph {
  return lossGraph(model, options, false).graph;
}

/** The loss and its gradients. */
function gradientsOf(model: Model, options: StepOptions): TrainingStep {
  const { trains, checkpointing = true, partial = () => false, probes = false, compute = "f32" } = options;
  const trained = model.parameters.filter(trains);
  if (trained.length === 0) throw new RangeError("no parameter of the model is selected for training");
  const { graph: g, forward } = lossGraph(model, options, true);
  if (probes)
    forward.hiddenStates.forEach((t, i) => {
      g.output(`probe.${i}`, g.call("norm", [t])[0]);
    });
  const names = trained.map((p) => p.name);
  const gradients = backward(compute === "bf16" ? narrow(g) : g, "loss", names);
  const graph = checkpointing ? remat(gradients, (scope) => scope.startsWith("layers.")) : gradients;
  for (const { name, shape } of trained) {
    if (!partial(name)) continue;
    const [experts, n, k] = shape;
    const gradient = graph.outputs.get(gradientName(name)) as Tensor;
    const mask = graph.input(expertsName(name), [experts, 1], "f32");
    const [masked] = graph.call("spread", [graph.reshape(gradient, [experts, n * k]), mask]);
    graph.outputs.delete(gradientName(name));
    graph.output(gradientName(name), graph.reshape(masked, [experts, n, k]));
  }
  return { graph, trained };
}

/** @param drops whether it is for a step of training: it drops numbers, and its loss has the routers' in it */
function lossGraph(model: Model, options: LossOptions, drops: boolean): { graph: Graph; forward: Forward } {
  const { trains, holds = () => false, dtypeOf, objective = CAUSAL, chunk = 128, compute = "f32", router = null } = options;
  const graph = new Graph();
  const rows = symbol("rows");
  const forward = model.forward(
    graph,
    (p) => {
      if (!trains(p) && !holds(p)) return graph.weight(p.name, p.shape, dtypeOf(p.name));
      const state = graph.state(p.name, p.shape, "f32");
      return compute === "bf16" && p.kind !== "float32" && !p.name.endsWith(".lora_magnitude_vector")
        ? graph.call("castBf16", [state])[0]
        : state;
    },
    {
      ids: graph.input("ids", [rows], "i32"),
      positions: graph.input("positions", model.positionAxes === 1 ? [rows] : [model.positionAxes, rows], "i32"),
      segments: graph.input("segments", [symbol("sequences"), 3], "i32"),
      cache: null,
      ...(drops ? { seed: graph.input("seed", [2], "i32") } : {}),
    },
  );
  const loss = objective.loss(graph, forward, chunk);
  graph.output("loss", drops && router ? routedLoss(graph, loss, forward, router) : loss);
  if (!drops && router) routerLosses(graph, forward, router);
  return { graph, forward };
}
