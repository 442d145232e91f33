/** Runs optimiser steps and evaluations of a trainee: its programs, and the optimiser's moments as states. Knows no data order and no files. */
import type { Numbers, Program, State } from "../backend/backend.ts";
import type { Graph } from "../graph/graph.ts";
import { plan } from "../graph/plan.ts";
import type { Objective } from "./loss.ts";
import { type AdamwOptions, adamwRates, momentName, PLAIN_RATES, RATES } from "./optimiser.ts";
import { evaluationStep, expertsName, trainingStep } from "./step.ts";
import { type Trainee, trainedParameters } from "./trainee.ts";

export interface StepperOptions<R> {
  readonly objective: Objective<R>;
  /** Largest gradient norm; 0: no limit. */
  readonly clip: number;
  readonly checkpointing: boolean;
  readonly decays: (parameter: string) => boolean;
}

export interface StepResult {
  readonly loss: number;
  /** Before clipping. */
  readonly gradientNorm: number;
  /** Where the first number that is not finite came up; null: all are finite. */
  readonly fault: string | null;
}

/** No limit: the factor is exactly 1. */
const UNLIMITED = 3e38;

export class Stepper<R> {
  readonly #trainee: Trainee;
  readonly #options: StepperOptions<R>;
  readonly #training: Graph;
  readonly #evaluation: Graph;
  readonly #states: Map<string, State>;
  readonly #masks: Record<string, Float32Array> = {};
  readonly #plain: boolean;
  readonly #programs = new Map<string, Program>();
  /** The optimiser's moments by name. */
  readonly moments: ReadonlyMap<string, State>;

  constructor(trainee: Trainee, options: StepperOptions<R>) {
    this.#trainee = trainee;
    this.#options = options;
    const shared = {
      trains: (p: { name: string }) => trainee.trained.has(p.name),
      holds: (p: { name: string }) => trainee.states.has(p.name),
      dtypeOf: trainee.dtypeOf,
      objective: options.objective,
    };
    const partial = (name: string) => trainee.experts.has(name);
    this.#training = trainingStep(trainee.model, {
      ...shared,
      partial,
      clip: options.clip > 0 ? options.clip : UNLIMITED,
      checkpointing: options.checkpointing,
      // Decay would change the experts that are not trained.
      decays: (name) => options.decays(name) && !partial(name),
      probes: true,
    }).graph;
    this.#evaluation = evaluationStep(trainee.model, shared);
    this.#plain = this.#training.values.some((t) => t.name === PLAIN_RATES);
    const parameters = trainedParameters(trainee);
    const moments = new Map<string, State>();
    for (const { name, shape, experts } of parameters) {
      for (const which of ["m", "v"] as const) moments.set(momentName(name, which), trainee.backend.state("f32", shape));
      const chosen = trainee.experts.get(name);
      if (chosen) this.#masks[expertsName(name)] = Float32Array.from({ length: experts ?? 0 }, (_, e) => (chosen.includes(e) ? 1 : 0));
    }
    this.moments = moments;
    this.#states = new Map([...trainee.states, ...moments]);
  }

  /** Bytes of the workspace of a step with this many tokens. An upper bound: before the backend's own passes. */
  workspaceBytes(rows: number): number {
    return plan(this.#training, { rows: capacity(rows), sequences: capacity(rows) }).arenaBytes;
  }

  /**
   * One optimiser step over batches of examples, as if they were one batch.
   * @param step counted from 0
   * @param seed of dropout
   */
  async step(batches: readonly (readonly R[])[], step: number, rates: AdamwOptions, seed: number): Promise<StepResult> {
    const { objective } = this.#options;
    const examples = batches.flat();
    const total = examples.reduce((n, e) => n + objective.count(e), 0);
    const { rows, sequences, inputs } = objective.collate(examples, total);
    const outputs: Record<string, Float32Array> = { loss: new Float32Array(1), gradientNorm: new Float32Array(1) };
    for (const name of this.#training.outputs.keys()) if (name.startsWith("probe.")) outputs[name] = new Float32Array(1);
    const given: Record<string, Numbers> = {
      ...inputs,
      ...this.#masks,
      seed: Int32Array.of(seed, step),
      [RATES]: adamwRates(rates, step + 1),
    };
    if (this.#plain) given[PLAIN_RATES] = adamwRates({ ...rates, weightDecay: 0 }, step + 1);
    await this.#program("training", this.#training, rows).run({ rows, sequences }, given, outputs);
    return { loss: outputs.loss[0], gradientNorm: outputs.gradientNorm[0], fault: this.#fault(outputs) };
  }

  /** The loss summed over what the objective counts, and that count. Updates nothing. */
  async evaluate(examples: readonly R[]): Promise<{ sum: number; count: number }> {
    const { objective } = this.#options;
    const count = examples.reduce((n, e) => n + objective.count(e), 0);
    const { rows, sequences, inputs } = objective.collate(examples, count);
    const loss = new Float32Array(1);
    await this.#program("evaluation", this.#evaluation, rows).run({ rows, sequences }, inputs, { loss });
    return { sum: loss[0] * count, count };
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
    for (const state of this.moments.values()) state.dispose();
  }

  #program(kind: string, graph: Graph, rows: number): Program {
    const most = capacity(rows);
    const key = `${kind}:${most}`;
    const { backend, weights } = this.#trainee;
    const made = this.#programs.get(key) ?? backend.prepare(graph, { rows: most, sequences: most }, weights, this.#states);
    this.#programs.set(key, made);
    return made;
  }

  #fault(outputs: Readonly<Record<string, Float32Array>>): string | null {
    const { layers } = this.#trainee.model;
    for (let i = 0; i <= layers; i++)
      if (!Number.isFinite(outputs[`probe.${i}`][0]))
        return i === 0 ? "the embeddings" : i === layers ? `layer ${layers - 1} or the final norm` : `layer ${i - 1}`;
    if (!Number.isFinite(outputs.loss[0])) return "the head's logits";
    if (!Number.isFinite(outputs.gradientNorm[0])) return "the gradients, though the loss is finite";
    return null;
  }
}

/** Programs are prepared for powers of two of rows. */
function capacity(rows: number): number {
  return 2 ** Math.ceil(Math.log2(Math.max(16, rows)));
}
