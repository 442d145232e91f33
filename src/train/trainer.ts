/**
 * The training loop, with the names of transformers' Trainer: steps, evaluations, checkpoints, and going on exactly where a run
 * stopped. What comes next follows from the step's number and the seeds alone. Knows no text and no model's layers.
 */
import { mkdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { decaysByName, momentFormat, type TrainingArguments, trainingArguments, warmupSteps } from "./arguments.ts";
import { Average } from "./average.ts";
import type { CausalExample } from "./data/example.ts";
import { listCheckpoints, readState, readStates, removeUnfinished, STATE_FILE, writeCheckpoint, writeJson, writeStates } from "./folder.ts";
import { type LogEntry, newState, type TrainerControl, type TrainerState } from "./history.ts";
import { CAUSAL, type Objective } from "./loss.ts";
import { checkMemory, estimateMemory, type MemoryEstimate } from "./memory.ts";
import { holdsCodes } from "./optimiser.ts";
import { reporter, type TrainerCallback } from "./report.ts";
import { EvaluatedRouters } from "./router.ts";
import { schedule } from "./schedule.ts";
import { ROUTER_BIAS } from "./selection.ts";
import { type EpochRows, ordered, type Rows, rowsOf, type TrainingData } from "./source.ts";
import { Stepper } from "./stepper.ts";
import { type Trainable, type Trainee, trainableTable } from "./trainee.ts";

export interface TrainerOptions<R = CausalExample> {
  readonly model: Trainable;
  readonly args?: Partial<TrainingArguments>;
  readonly train_dataset?: TrainingData<R>;
  readonly eval_dataset?: TrainingData<R>;
  readonly callbacks?: readonly TrainerCallback[];
  /** Default: the model's own: the problem of a classifier, else next-token prediction. */
  readonly objective?: Objective<R>;
}

export interface TrainOptions {
  /** A checkpoint's folder; true: the newest one in `output_dir`. */
  readonly resume_from_checkpoint?: boolean | string | null;
  /** Aborting it stops the run after the step, with a checkpoint unless `save_strategy` is `no`. */
  readonly signal?: AbortSignal;
}

export interface TrainOutput {
  readonly global_step: number;
  /** The mean loss over all steps. */
  readonly training_loss: number;
  readonly metrics: LogEntry;
}

/** A loss or gradient that is not finite. The parameters are those before the step. */
export class DivergenceError extends Error {
  override readonly name = "DivergenceError";
  readonly step: number;
  constructor(step: number, message: string) {
    super(message);
    this.step = step;
  }
}

/** The parts of a run that are fixed once it begins. */
interface Plan<R> {
  readonly rows: Rows<R>;
  readonly stepsPerEpoch: number;
  readonly total: number;
  readonly rate: (step: number) => number;
}

export class Trainer<R = CausalExample> {
  readonly args: TrainingArguments;
  readonly state: TrainerState = newState();
  readonly #model: Trainable;
  readonly #objective: Objective<R>;
  readonly #training: TrainingData<R> | undefined;
  readonly #evaluation: Rows<R> | null;
  readonly #evaluationAtHand: boolean;
  readonly #callbacks: TrainerCallback[];
  readonly #control: TrainerControl = { should_training_stop: false, should_save: false, should_evaluate: false };
  #trainee: Trainee | null = null;
  #stepper: Stepper<R> | null = null;
  #average: Average | null = null;
  #planned: Plan<R> | null = null;
  #epoch: { readonly number: number; readonly rows: EpochRows<R> } | null = null;

  /** Throws RangeError for arguments that are unknown, out of range or contradictory, and for data that is empty. */
  constructor({ model, args, train_dataset, eval_dataset, callbacks = [], objective }: TrainerOptions<R>) {
    this.args = trainingArguments(args, eval_dataset !== undefined);
    this.#model = model;
    this.#objective = objective ?? ((model.objective ?? CAUSAL) as unknown as Objective<R>);
    this.#training = train_dataset;
    if (train_dataset) rowsOf(train_dataset, "train_dataset", this.#objective.length);
    this.#evaluationAtHand = Array.isArray(eval_dataset);
    this.#evaluation = eval_dataset ? rowsOf(eval_dataset, "eval_dataset", this.#objective.length) : null;
    this.#callbacks = [...this.args.report_to.map(reporter), ...callbacks];
  }

  add_callback(callback: TrainerCallback): void {
    this.#callbacks.push(callback);
  }

  /** The table of trainable parameters by kind of module. */
  async parameters(): Promise<string> {
    return trainableTable(await this.#subject());
  }

  /** The rows of a step, counted from 0. */
  async rows(step = 0): Promise<R[]> {
    const { rows, stepsPerEpoch } = this.#plan();
    const epoch = this.#order(rows, Math.floor(step / stepsPerEpoch));
    const at = (step % stepsPerEpoch) * this.#rowsPerStep;
    return rowsAt(epoch, at, Math.min(epoch.length, at + this.#rowsPerStep));
  }

  /** Optimiser steps of the whole run, and in an epoch. */
  steps(): { readonly total: number; readonly perEpoch: number } {
    const { total, stepsPerEpoch } = this.#plan();
    return { total, perEpoch: stepsPerEpoch };
  }

  /** The memory that the run will take, for steps as long as the first epoch's longest. */
  async memory(): Promise<MemoryEstimate> {
    const { rows } = this.#plan();
    const stepper = await this.#steps();
    const perStep = this.#rowsPerStep;
    const epoch = this.#order(rows, 0);
    let most = 0;
    for (let at = 0; at < epoch.length; at += perStep) {
      let tokens = 0;
      for (let i = at; i < Math.min(epoch.length, at + perStep); i++) tokens += epoch.tokens(i);
      most = Math.max(most, tokens);
    }
    if (!Array.isArray(this.#training)) most *= this.#objective.sequences ?? 1;
    return estimateMemory(await this.#subject(), stepper.workspaceBytes(most), this.args.ema_decay !== null, momentFormat(this.args));
  }

  /**
   * Trains. Rejects with RangeError for rows that cannot be used and for a run that does not fit into memory, with CheckpointError for a
   * checkpoint that cannot be written or does not fit, and with DivergenceError for a loss that is not finite.
   */
  async train({ resume_from_checkpoint: resume = false, signal }: TrainOptions = {}): Promise<TrainOutput> {
    const { args, state } = this;
    const plan = this.#plan();
    const stepper = await this.#steps();
    const trainee = await this.#subject();
    if (Array.isArray(this.#training)) await this.#checkRows(plan.rows, "train_dataset", trainee);
    if (this.#evaluationAtHand && this.#evaluation) await this.#checkRows(this.#evaluation, "eval_dataset", trainee);
    checkMemory(await this.memory());
    if (args.ema_decay !== null) {
      const trained = new Map([...trainee.states].filter(([name]) => trainee.trained.has(name)));
      this.#average = new Average(trained, args.ema_decay);
    }
    await this.#begin(resume, plan);
    state.max_steps = plan.total;
    state.num_train_epochs = Math.ceil(plan.total / plan.stepsPerEpoch);
    const begun = performance.now();
    const first = state.global_step;
    const seen = state.num_input_tokens_seen;
    this.#control.should_training_stop = false;
    await this.#call("on_train_begin", {});
    while (state.global_step < plan.total && !this.#control.should_training_stop) {
      await this.#step(stepper, plan);
      await this.#after(plan);
      if (signal?.aborted) this.#control.should_training_stop = true;
    }
    if (signal?.aborted && state.global_step < plan.total && args.save_strategy !== "no") await this.#save();
    if (args.load_best_model_at_end && state.best_model_checkpoint) await this.#load(state.best_model_checkpoint, true);
    else this.#average?.apply();
    const runtime = (performance.now() - begun) / 1000;
    const steps = state.global_step - first;
    const metrics: LogEntry = {
      train_runtime: runtime,
      train_samples_per_second: (steps * this.#rowsPerStep) / runtime,
      train_steps_per_second: steps / runtime,
      train_tokens_per_second: (state.num_input_tokens_seen - seen) / runtime,
      train_loss: state.total_loss / Math.max(1, state.global_step),
      epoch: state.epoch,
      step: state.global_step,
    };
    await this.#log(metrics);
    await this.#call("on_train_end", {});
    return { global_step: state.global_step, training_loss: metrics.train_loss as number, metrics };
  }

  /**
   * The mean loss over all tokens with a label, as `eval_loss`, and how long it took. Where losses of the routers count they are in it, as in the
   * training loss, and by themselves beside it.
   */
  async evaluate(dataset?: TrainingData<R>): Promise<LogEntry> {
    const rows = dataset ? rowsOf(dataset, "eval_dataset", this.#objective.length) : this.#evaluation;
    if (!rows) throw new RangeError("evaluate: there is no eval_dataset");
    const stepper = await this.#steps();
    const trainee = await this.#subject();
    const compute = async () => {
      const begun = performance.now();
      const epoch = rows.epoch(0, { shuffle: false });
      const size = this.args.per_device_eval_batch_size;
      const meter = this.#objective.meter?.();
      let [sum, count] = [0, 0];
      const routers = new EvaluatedRouters();
      for (let at = 0; at < epoch.length; at += size) {
        const batch = await this.#checkedRows(epoch, at, Math.min(epoch.length, at + size), "eval_dataset", trainee);
        const found = await stepper.evaluate(batch, meter);
        sum += found.sum;
        count += found.count;
        routers.add(found);
      }
      const runtime = (performance.now() - begun) / 1000;
      return {
        ...routers.losses(sum / Math.max(1, count)),
        ...Object.fromEntries(Object.entries(meter?.values() ?? {}).map(([name, x]) => [`eval_${name}`, x])),
        eval_runtime: runtime,
        eval_samples_per_second: epoch.length / runtime,
        epoch: this.state.epoch,
        step: this.state.global_step,
      };
    };
    const metrics = await (this.#average ? this.#average.inPlace(compute) : compute());
    await this.#log(metrics);
    await this.#call("on_evaluate", { metrics });
    return metrics;
  }

  /** Writes what is trained, for use without the trainer. Default folder: `output_dir`. */
  async save_model(folder: string = this.args.output_dir): Promise<void> {
    await this.#model.save_pretrained(folder);
  }

  /** Frees the optimiser's memory. The model stays as it is. */
  dispose(): void {
    this.#stepper?.dispose();
    this.#stepper = null;
  }

  get #rowsPerStep(): number {
    return this.args.per_device_train_batch_size * this.args.gradient_accumulation_steps;
  }

  #plan(): Plan<R> {
    this.#planned ??= this.#newPlan();
    return this.#planned;
  }

  #newPlan(): Plan<R> {
    const { args } = this;
    if (!this.#training) throw new RangeError("train: there is no train_dataset");
    const rows = rowsOf(this.#training, "train_dataset", this.#objective.length);
    const { length } = this.#order(rows, 0);
    const batches = length / args.per_device_train_batch_size;
    const perEpoch = args.dataloader_drop_last ? Math.floor(batches) : Math.ceil(batches);
    if (perEpoch === 0)
      throw new RangeError(
        `train_dataset has ${length} rows, fewer than one batch of ${args.per_device_train_batch_size}, and dataloader_drop_last drops it`,
      );
    const stepsPerEpoch = Math.ceil(perEpoch / args.gradient_accumulation_steps);
    const total = args.max_steps > 0 ? args.max_steps : Math.ceil(args.num_train_epochs * stepsPerEpoch);
    const rate = schedule({
      name: args.lr_scheduler_type,
      learningRate: args.learning_rate,
      warmupSteps: warmupSteps(args, total),
      totalSteps: total,
      options: args.lr_scheduler_kwargs,
    });
    return { rows, stepsPerEpoch, total, rate };
  }

  #order(rows: Rows<R>, epoch: number): EpochRows<R> {
    const { seed, data_seed, shuffle, group_by_length } = this.args;
    return ordered(rows, epoch, { seed: data_seed ?? seed, shuffle, rowsPerStep: this.#rowsPerStep, grouped: group_by_length });
  }

  async #subject(): Promise<Trainee> {
    this.#trainee ??= await this.#model.trainee();
    return this.#trainee;
  }

  async #steps(): Promise<Stepper<R>> {
    const { max_grad_norm, gradient_checkpointing, decay_norms, bf16, router_aux_loss_coef, router_z_loss_coef, ...args } = this.args;
    this.#stepper ??= new Stepper(await this.#subject(), {
      objective: this.#objective,
      clip: max_grad_norm,
      checkpointing: gradient_checkpointing,
      decays: (name) => decay_norms || decaysByName(name),
      compute: bf16 ? "bf16" : "f32",
      moments: momentFormat(this.args),
      router: { aux: router_aux_loss_coef, z: router_z_loss_coef, biasRate: args.router_bias_update_rate },
    });
    return this.#stepper;
  }

  /** Rows at hand are checked before anything is computed; those in files, when they are read. */
  async #checkRows(rows: Rows<R>, name: string, trainee: Trainee): Promise<void> {
    const epoch = rows.epoch(0, { shuffle: false });
    let counted = 0;
    for (const row of await this.#checkedRows(epoch, 0, epoch.length, name, trainee)) counted += this.#objective.count(row);
    if (counted === 0)
      throw new RangeError(`${name}: no token of any row has a label, so there is nothing to learn; labels of -100 are left out`);
  }

  async #checkedRows(epoch: EpochRows<R>, from: number, to: number, name: string, { model }: Trainee): Promise<R[]> {
    const limits = { name, vocabSize: model.vocabSize, longest: this.args.max_length ?? model.maxPositions };
    const rows = await rowsAt(epoch, from, to);
    rows.forEach((row, i) => {
      this.#objective.check(row, from + i, limits);
    });
    return rows;
  }

  async #begin(resume: boolean | string | null, plan: Plan<R>): Promise<void> {
    const { output_dir: folder, overwrite_output_dir, save_strategy } = this.args;
    const found = await listCheckpoints(folder);
    if (resume) {
      await removeUnfinished(folder);
      const path = typeof resume === "string" ? resume : found.at(-1)?.path;
      if (path === undefined) throw new RangeError(`resume_from_checkpoint: ${folder} holds no checkpoint`);
      await this.#load(path, false, plan.rows.fingerprint);
      return;
    }
    if (found.length > 0 && save_strategy !== "no") {
      if (!overwrite_output_dir)
        throw new RangeError(
          `${folder} holds ${found.length} checkpoint${found.length === 1 ? "" : "s"} of another run; go on with it by resume_from_checkpoint, name another output_dir, or give overwrite_output_dir`,
        );
      for (const { path } of found) await rm(path, { recursive: true, force: true });
    }
    await removeUnfinished(folder);
    Object.assign(this.state, newState());
  }

  async #step(stepper: Stepper<R>, { rows, stepsPerEpoch, rate }: Plan<R>): Promise<void> {
    const { args, state } = this;
    const step = state.global_step;
    const number = Math.floor(step / stepsPerEpoch);
    if (this.#epoch?.number !== number) this.#epoch = { number, rows: this.#order(rows, number) };
    const epoch = this.#epoch.rows;
    const trainee = await this.#subject();
    const at = (step % stepsPerEpoch) * this.#rowsPerStep;
    const size = args.per_device_train_batch_size;
    const usable = args.dataloader_drop_last ? Math.floor(epoch.length / size) * size : epoch.length;
    const batches: R[][] = [];
    for (let i = at; i < Math.min(usable, at + this.#rowsPerStep); i += size)
      batches.push(await this.#checkedRows(epoch, i, Math.min(usable, i + size), "train_dataset", trainee));
    const learningRate = rate(step);
    const { adam_beta1: beta1, adam_beta2: beta2, adam_epsilon: eps, weight_decay: weightDecay } = args;
    const result = await stepper.step(batches, step, { learningRate, beta1, beta2, eps, weightDecay }, args.seed);
    if (result.fault !== null) await this.#diverged(step, result.loss, result.fault);
    state.global_step = step + 1;
    state.epoch = (step + 1) / stepsPerEpoch;
    state.total_loss += result.loss;
    state.unlogged.loss += result.loss;
    state.unlogged.steps++;
    for (const [name, x] of Object.entries(result.metrics)) state.unlogged.metrics[name] = (state.unlogged.metrics[name] ?? 0) + x;
    for (const batch of batches) for (const row of batch) state.num_input_tokens_seen += this.#objective.length(row);
    this.#average?.update();
    const logs =
      args.logging_strategy === "steps" &&
      (state.global_step % args.logging_steps === 0 || (state.global_step === 1 && args.logging_first_step));
    if (logs || (args.logging_strategy === "epoch" && state.global_step % stepsPerEpoch === 0)) {
      const { loss: sum, steps, metrics } = state.unlogged;
      const means = Object.fromEntries(Object.entries(metrics).map(([name, total]) => [name, total / steps]));
      state.unlogged = { loss: 0, steps: 0, metrics: {} };
      const place = { epoch: state.epoch, step: state.global_step };
      await this.#log({ loss: sum / steps, grad_norm: result.gradientNorm, learning_rate: learningRate, ...means, ...place });
    }
    await this.#call("on_step_end", {});
  }

  /** Evaluates and saves when it is time. */
  async #after({ stepsPerEpoch, total }: Plan<R>): Promise<void> {
    const { args, state } = this;
    const step = state.global_step;
    const due = (strategy: string, every: number) =>
      strategy === "steps" ? step % every === 0 : strategy === "epoch" && (step % stepsPerEpoch === 0 || step === total);
    const control = this.#control;
    const evaluates =
      due(args.eval_strategy, args.eval_steps ?? args.logging_steps) || (control.should_evaluate && this.#evaluation !== null);
    let best = false;
    if (evaluates) best = this.#judge(await this.evaluate());
    const saves = due(args.save_strategy, args.save_steps) || (args.save_strategy !== "no" && step === total) || control.should_save;
    Object.assign(control, { should_evaluate: false, should_save: false });
    if (saves) await this.#save(best);
  }

  /** Whether the newest evaluation is the best; counts those that are not. */
  #judge(metrics: LogEntry): boolean {
    const { args, state } = this;
    const name = args.metric_for_best_model ?? "loss";
    const value = metrics[name] ?? metrics[`eval_${name}`];
    if (value === undefined)
      throw new RangeError(`metric_for_best_model: the evaluation has no '${name}'; it has ${Object.keys(metrics).join(", ")}`);
    const greater = args.greater_is_better ?? !/loss$/.test(name);
    const gain = state.best_metric === null ? Number.POSITIVE_INFINITY : (greater ? 1 : -1) * (value - state.best_metric);
    const better = gain > 0;
    if (better) state.best_metric = value;
    state.stale_evaluations = better && gain > args.early_stopping_threshold ? 0 : state.stale_evaluations + 1;
    if (args.early_stopping_patience !== null && state.stale_evaluations >= args.early_stopping_patience)
      this.#control.should_training_stop = true;
    return better;
  }

  async #save(best = false): Promise<void> {
    const { args, state } = this;
    const path = join(args.output_dir, `checkpoint-${state.global_step}`);
    await this.#checkFinite();
    if (best) state.best_model_checkpoint = path;
    await mkdir(args.output_dir, { recursive: true });
    await writeCheckpoint(args.output_dir, state.global_step, async (temporary) => {
      await (this.#average ? this.#average.inPlace(() => this.#model.save_pretrained(temporary)) : this.#model.save_pretrained(temporary));
      await writeStates(temporary, await this.#kept());
      await writeJson(join(temporary, STATE_FILE), { ...state, args, data: this.#plan().rows.fingerprint });
    });
    if (args.save_total_limit !== null) {
      const found = await listCheckpoints(args.output_dir);
      const keep = new Set([state.best_model_checkpoint && args.load_best_model_at_end ? state.best_model_checkpoint : "", path]);
      let over = found.length - args.save_total_limit;
      for (const each of found) {
        if (over <= 0) break;
        if (keep.has(each.path)) continue;
        await rm(each.path, { recursive: true, force: true });
        over--;
      }
    }
    await this.#call("on_save", { checkpoint: path });
  }

  /** A checkpoint never holds numbers that are not finite. */
  async #checkFinite(): Promise<void> {
    for (const [name, state] of await this.#kept()) {
      if (holdsCodes(name)) continue;
      const at = state.read().findIndex((x) => !Number.isFinite(x));
      if (at >= 0) await this.#diverged(this.state.global_step - 1, null, `the update of ${name}`);
    }
  }

  /** The states that a checkpoint holds. */
  async #kept() {
    const trainee = await this.#subject();
    const updated = (name: string) => this.args.router_bias_update_rate > 0 && ROUTER_BIAS.test(name);
    const trained = [...trainee.states].filter(([name]) => trainee.trained.has(name) || updated(name));
    return new Map([...trained, ...(await this.#steps()).moments, ...(this.#average?.states() ?? [])]);
  }

  /** @param best only the parameters, which go on as they were evaluated. @param fingerprint of the data that the run goes on with */
  async #load(path: string, best: boolean, fingerprint?: string): Promise<void> {
    const kept = await this.#kept();
    if (best) {
      await readStates(path, kept);
      this.#average?.apply();
      return;
    }
    const { args, data, ...state } = await readState(path);
    this.#checkSame((args ?? {}) as Partial<TrainingArguments>, path);
    if (data !== fingerprint)
      throw new RangeError(
        `${path} was trained on other data than this train_dataset, so its position in the data means nothing; train from the beginning`,
      );
    await readStates(path, kept);
    Object.assign(this.state, state);
  }

  /** Throws RangeError for an argument that decides which rows come next and differs from the checkpoint's. */
  #checkSame(saved: Partial<TrainingArguments>, path: string): void {
    const names = [
      "per_device_train_batch_size",
      "gradient_accumulation_steps",
      "seed",
      "data_seed",
      "shuffle",
      "group_by_length",
      "dataloader_drop_last",
    ] as const;
    const other = names.find((name) => saved[name] !== this.args[name]);
    if (other !== undefined)
      throw new RangeError(
        `${path} was trained with ${other} ${JSON.stringify(saved[other])}, this run has ${JSON.stringify(this.args[other])}; give the same to go on`,
      );
  }

  async #diverged(step: number, loss: number | null, fault: string): Promise<never> {
    const last = (await listCheckpoints(this.args.output_dir)).at(-1);
    throw new DivergenceError(
      step + 1,
      `step ${step + 1}:${loss === null ? "" : ` the loss is ${loss};`} the first numbers that are not finite came from ${fault}. The run stops; ${
        last ? `the last checkpoint is ${last.path}` : "no checkpoint was saved"
      }. A smaller learning_rate, warm-up or max_grad_norm help most often`,
    );
  }

  async #log(logs: LogEntry): Promise<void> {
    this.state.log_history.push(logs);
    await this.#call("on_log", { logs });
  }

  async #call(name: keyof TrainerCallback, more: object): Promise<void> {
    const event = { args: this.args, state: this.state, control: this.#control, ...more };
    for (const callback of this.#callbacks)
      await (callback[name] as ((event: object) => void | Promise<void>) | undefined)?.call(callback, event);
  }
}

async function rowsAt<R>(epoch: EpochRows<R>, from: number, to: number): Promise<R[]> {
  const rows: R[] = [];
  for (let i = from; i < to; i++) rows.push(await epoch.row(i));
  return rows;
}
