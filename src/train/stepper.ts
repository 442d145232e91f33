/** Runs optimiser steps and evaluations of a trainee: its programs, and the optimiser's moments as states. Knows no data order and no files. */
import type { Numbers, Program, State } from "../backend/backend.ts";
import { gradientName } from "../graph/backward.ts";
import type { Graph } from "../graph/graph.ts";
import { plan } from "../graph/plan.ts";
import type { Meter, Objective } from "./loss.ts";
import { type AdamwOptions, adamwRates, type MomentFormat, momentStates, PLAIN_RATES, RATES } from "./optimiser.ts";
import { type RouterLosses, type RouterOptions, Routers } from "./router.ts";
import { type AccumulatingStep, accumulatingStep, evaluationStep, expertsName } from "./step.ts";
import { type Trainee, trainedParameters } from "./trainee.ts";

export interface StepperOptions<R> {
  readonly objective: Objective<R>;
  /** Largest gradient norm; 0: no limit. */
  readonly clip: number;
  readonly checkpointing: boolean;
  readonly decays: (parameter: string) => boolean;
  /** The format of products. */
  readonly compute: "f32" | "bf16";
  /** The format of the optimiser's moments. */
  readonly moments: MomentFormat;
  /** Losses of the routers, and the update of their biases. */
  readonly router: RouterOptions;
}

export interface StepResult {
  readonly loss: number;
  /** Before clipping. */
  readonly gradientNorm: number;
  /** Where the first number that is not finite came up; null: all are finite. */
  readonly fault: string | null;
  /** Measures beside the loss, by name. */
  readonly metrics: Readonly<Record<string, number>>;
}

/** No limit: the factor is exactly 1. */
const UNLIMITED = 3e38;

export class Stepper<R> {
  readonly #trainee: Trainee;
  readonly #options: StepperOptions<R>;
  readonly #training: AccumulatingStep;
  readonly #evaluation: Graph;
  readonly #states: Map<string, State>;
  readonly #gradients: ReadonlyMap<string, State>;
  readonly #masks: Record<string, Float32Array> = {};
  readonly #plain: boolean;
  readonly #programs = new Map<string, Program>();
  readonly #routers: Routers;
  /** The optimiser's moments by the names of `momentStates`. */
  readonly moments: ReadonlyMap<string, State>;

  constructor(trainee: Trainee, options: StepperOptions<R>) {
    this.#trainee = trainee;
    this.#options = options;
    const shared = {
      trains: (p: { name: string }) => trainee.trained.has(p.name),
      holds: (p: { name: string }) => trainee.states.has(p.name),
      dtypeOf: trainee.dtypeOf,
      objective: options.objective,
      compute: options.compute,
    };
    if (!trainee.backend.trains) throw new Error(`the ${trainee.backend.name} backend does not train; load the model with device: "cpu"`);
    this.#routers = new Routers(trainee, options.router);
    const partial = (name: string) => trainee.experts.has(name);
    this.#training = accumulatingStep(trainee.model, {
      ...shared,
      router: options.router,
      partial,
      clip: options.clip > 0 ? options.clip : UNLIMITED,
      checkpointing: options.checkpointing,
      moments: options.moments,
      // Decay would change the experts that are not trained.
      decays: (name) => options.decays(name) && !partial(name),
      probes: true,
    });
    this.#evaluation = evaluationStep(trainee.model, { ...shared, router: options.router });
    this.#plain = this.#training.update.values.some((t) => t.name === PLAIN_RATES);
    const parameters = trainedParameters(trainee);
    const moments = new Map<string, State>();
    for (const { name, shape, experts } of parameters) {
      for (const s of momentStates(name, shape, options.moments)) moments.set(s.name, trainee.backend.state(s.dtype, s.shape));
      const chosen = trainee.experts.get(name);
      if (chosen) this.#masks[expertsName(name)] = Float32Array.from({ length: experts ?? 0 }, (_, e) => (chosen.includes(e) ? 1 : 0));
    }
    this.moments = moments;
    this.#gradients = new Map(parameters.map((p) => [gradientName(p.name), trainee.backend.state("f32", p.shape)]));
    this.#states = new Map([...trainee.states, ...moments, ...this.#gradients]);
  }

  /**
   * Bytes of the workspace of a batch with this many tokens, estimated: planned before the backend's own passes, which convert activations and
   * for int8 and int4 weights need up to 14 % more (measured on four layers of the 21B shape, 2,048 tokens).
   */
  workspaceBytes(rows: number): number {
    return 1.15 * plan(this.#training.gradients, { rows: capacity(rows), sequences: capacity(rows) }).arenaBytes;
  }

  /**
   * One optimiser step over batches of examples, as if they were one batch. If a number is not finite, the parameters stay as they were.
   * @param step counted from 0
   * @param seed of dropout
   */
  async step(batches: readonly (readonly R[])[], step: number, rates: AdamwOptions, seed: number): Promise<StepResult> {
    const { objective } = this.#options;
    const { gradients, norm, update } = this.#training;
    const total = batches.flat().reduce((n, e) => n + objective.count(e), 0);
    const probes: Record<string, Float32Array> = { loss: new Float32Array(1) };
    for (const name of gradients.outputs.keys()) if (name.startsWith("probe.")) probes[name] = new Float32Array(1);
    const meter = objective.meter?.();
    this.#routers.begin();
    let loss = 0;
    for (const [i, batch] of batches.entries()) {
      await objective.prepare?.(batch);
      const collated = objective.collate(batch, total);
      const { rows, sequences, inputs } = collated;
      const share = batch.reduce((n, e) => n + objective.count(e), 0) / Math.max(1, total);
      const given = { ...inputs, ...this.#masks, ...this.#routers.inputs(share), seed: Int32Array.of(seed, step * batches.length + i) };
      const measured = sized(objective.outputs?.(collated));
      const outputs = { ...probes, ...measured };
      await this.#program("gradients", gradients, rows).run({ rows, sequences }, given, { ...outputs, ...this.#routers.outputs });
      meter?.add(batch, measured);
      this.#routers.add(share);
      loss += outputs.loss[0];
      const fault = this.#fault(outputs);
      if (fault !== null) return this.#halted(loss, fault);
    }
    const gradientNorm = new Float32Array(1);
    await this.#program("norm", norm, 1).run({}, {}, { gradientNorm });
    if (!Number.isFinite(gradientNorm[0])) return this.#halted(loss, this.#badGradient());
    const given: Record<string, Numbers> = { [RATES]: adamwRates(rates, step + 1) };
    if (this.#plain) given[PLAIN_RATES] = adamwRates({ ...rates, weightDecay: 0 }, step + 1);
    await this.#program("update", update, 1).run({}, given, { gradientNorm });
    return { loss, gradientNorm: gradientNorm[0], fault: null, metrics: { ...meter?.values(), ...this.#routers.end(loss) } };
  }

  /** The loss summed over what the objective counts, that count, and the routers' losses, which are not in the sum. Updates nothing. */
  async evaluate(examples: readonly R[], meter?: Meter<R>): Promise<{ sum: number; count: number; routers: RouterLosses | null }> {
    const { objective } = this.#options;
    const count = examples.reduce((n, e) => n + objective.count(e), 0);
    await objective.prepare?.(examples);
    const collated = objective.collate(examples, count);
    const { rows, sequences, inputs } = collated;
    const loss = new Float32Array(1);
    const measured = sized(objective.outputs?.(collated));
    await this.#program("evaluation", this.#evaluation, rows).run({ rows, sequences }, inputs, {
      loss,
      ...measured,
      ...this.#routers.evaluationOutputs,
    });
    meter?.add(examples, measured);
    return { sum: loss[0] * count, count, routers: this.#routers.losses };
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
    for (const state of [...this.moments.values(), ...this.#gradients.values()]) state.dispose();
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
    return Number.isFinite(outputs.loss[0]) ? null : "the head's logits";
  }

  #halted(loss: number, fault: string): StepResult {
    for (const state of this.#gradients.values()) state.write(new Float32Array(state.bytes / 4));
    return { loss, gradientNorm: Number.NaN, fault, metrics: {} };
  }

  /** The gradient that is not finite, of the layer nearest to the loss. */
  #badGradient(): string {
    const bad = [...this.#gradients].reverse().find(([, state]) => state.read().some((x) => !Number.isFinite(x)));
    return bad ? `the ${bad[0].replace(".", " of ")}` : "the norm of all gradients together";
  }
}

function sized(counts: Readonly<Record<string, number>> = {}): Record<string, Float32Array> {
  return Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, new Float32Array(count)]));
}

/** Programs are prepared for powers of two of rows. */
function capacity(rows: number): number {
  return 2 ** Math.ceil(Math.log2(Math.max(16, rows)));
}
