/** The arguments of a training run, with transformers' names and defaults, and their checks. Runs nothing. */
import { optionFault } from "../tokenizer/options.ts";
import type { MomentFormat } from "./optimiser.ts";
import { SCHEDULES, type ScheduleName, type ScheduleOptions } from "./schedule.ts";

const STRATEGIES = ["no", "steps", "epoch"] as const;
export type Strategy = (typeof STRATEGIES)[number];
const OPTIMISERS = ["adamw_torch", "adamw_8bit", "adamw_bnb_8bit"] as const;
const REPORTS = ["jsonl", "tensorboard", "none"] as const;
export type Report = (typeof REPORTS)[number];

/** As transformers' `TrainingArguments`; fields of ours say so. */
export interface TrainingArguments {
  /** Folder of checkpoints and logs. Default `trainer_output`. */
  readonly output_dir: string;
  /** Delete what another run left in `output_dir`. Default false: its checkpoints are an error. */
  readonly overwrite_output_dir: boolean;
  readonly per_device_train_batch_size: number;
  readonly per_device_eval_batch_size: number;
  readonly gradient_accumulation_steps: number;
  /** Products in bfloat16, as transformers' autocast; parameters, sums and optimiser stay float32. Default false: float32. */
  readonly bf16: boolean;
  /** Recompute a layer's activations for its gradients. Default true (transformers: false). */
  readonly gradient_checkpointing: boolean;
  readonly num_train_epochs: number;
  /** Optimiser steps; -1: as many as `num_train_epochs` takes. */
  readonly max_steps: number;
  readonly learning_rate: number;
  readonly lr_scheduler_type: ScheduleName;
  readonly lr_scheduler_kwargs: ScheduleOptions;
  /** Steps; below 1, a share of all steps. */
  readonly warmup_steps: number;
  /** A share of all steps, rounded up. */
  readonly warmup_ratio: number;
  /** `adamw_8bit`, also called `adamw_bnb_8bit`: moments in 8 bits. Default `adamw_torch`: in float32. */
  readonly optim: (typeof OPTIMISERS)[number];
  readonly adam_beta1: number;
  readonly adam_beta2: number;
  readonly adam_epsilon: number;
  readonly weight_decay: number;
  /** Ours: decay norms and biases too, as torch's AdamW does of itself. Default true; false: leave them out, as transformers' Trainer does. */
  readonly decay_norms: boolean;
  /** Largest norm of all gradients together; 0: no limit. */
  readonly max_grad_norm: number;
  /** Of new adapters, dropout and the order of rows. */
  readonly seed: number;
  /** Of the order of rows. Default: `seed`. */
  readonly data_seed: number | null;
  /** Ours: false keeps the rows' order. */
  readonly shuffle: boolean;
  /** Batches of rows of similar length. */
  readonly group_by_length: boolean;
  readonly dataloader_drop_last: boolean;
  /** Ours: the most tokens in a row. Default: the model's positions. */
  readonly max_length: number | null;
  readonly logging_strategy: Strategy;
  readonly logging_steps: number;
  readonly logging_first_step: boolean;
  readonly eval_strategy: Strategy;
  /** Default: `logging_steps`. */
  readonly eval_steps: number | null;
  readonly save_strategy: Strategy;
  readonly save_steps: number;
  /** Checkpoints that are kept, the best one included. Null: all. */
  readonly save_total_limit: number | null;
  readonly load_best_model_at_end: boolean;
  /** A name in the evaluation's results, `eval_` in front or not. Default `loss`. */
  readonly metric_for_best_model: string | null;
  /** Default: not for a loss. */
  readonly greater_is_better: boolean | null;
  /** Ours: evaluations without improvement until the run stops. Null: never. */
  readonly early_stopping_patience: number | null;
  readonly early_stopping_threshold: number;
  /** Ours: the decay of a moving average of the trained parameters, which is evaluated and saved in their place. Null: none. */
  readonly ema_decay: number | null;
  /** Weight of the load-balancing loss of all routers (https://arxiv.org/abs/2101.03961), as transformers computes it. Default 0. */
  readonly router_aux_loss_coef: number;
  /** Ours: weight of the routers' z-loss (https://arxiv.org/abs/2202.08906). Default 0. */
  readonly router_z_loss_coef: number;
  /** Ours: how far a step moves the routers' correction biases towards an even load (https://arxiv.org/abs/2408.15664). Default 0. */
  readonly router_bias_update_rate: number;
  /** Files in `output_dir`. Default: none. */
  readonly report_to: readonly Report[];
}

const DEFAULTS: TrainingArguments = {
  output_dir: "trainer_output",
  overwrite_output_dir: false,
  per_device_train_batch_size: 8,
  per_device_eval_batch_size: 8,
  gradient_accumulation_steps: 1,
  bf16: false,
  gradient_checkpointing: true,
  num_train_epochs: 3,
  max_steps: -1,
  learning_rate: 5e-5,
  lr_scheduler_type: "linear",
  lr_scheduler_kwargs: {},
  warmup_steps: 0,
  warmup_ratio: 0,
  optim: "adamw_torch",
  adam_beta1: 0.9,
  adam_beta2: 0.999,
  adam_epsilon: 1e-8,
  weight_decay: 0,
  decay_norms: true,
  max_grad_norm: 1,
  seed: 42,
  data_seed: null,
  shuffle: true,
  group_by_length: false,
  dataloader_drop_last: false,
  max_length: null,
  logging_strategy: "steps",
  logging_steps: 500,
  logging_first_step: false,
  eval_strategy: "no",
  eval_steps: null,
  save_strategy: "steps",
  save_steps: 500,
  save_total_limit: null,
  load_best_model_at_end: false,
  metric_for_best_model: null,
  greater_is_better: null,
  early_stopping_patience: null,
  early_stopping_threshold: 0,
  ema_decay: null,
  router_aux_loss_coef: 0,
  router_z_loss_coef: 0,
  router_bias_update_rate: 0,
  report_to: [],
};

export const ARGUMENT_NAMES = Object.keys(DEFAULTS) as (keyof TrainingArguments)[];

/** Arguments of transformers that have no meaning here, and what to do instead. */
const REMEDIES: Readonly<Record<string, string>> = {
  evaluation_strategy: "give eval_strategy",
  fp16: "give bf16, or leave it out for float32",
  use_cpu: "the device is from_pretrained's device",
  no_cuda: "the device is from_pretrained's device",
  deepspeed: "there is one process; leave it out",
  fsdp: "there is one process; leave it out",
  push_to_hub: "upload the folder with another tool",
  packing: "pack when reading the data",
  output_router_logits: "give router_aux_loss_coef",
  dataloader_num_workers: "rows are read in this process; leave it out",
};

type Check = readonly [fits: (value: unknown) => boolean, expected: string];
const whole = (least: number): Check => [(n) => Number.isSafeInteger(n) && (n as number) >= least, `a whole number of at least ${least}`];
const real = (least: number, most = Number.POSITIVE_INFINITY): Check => [
  (n) => typeof n === "number" && Number.isFinite(n) && n >= least && n <= most,
  most === Number.POSITIVE_INFINITY ? `a number of at least ${least}` : `a number from ${least} to ${most}`,
];
const below1: Check = [(n) => typeof n === "number" && n >= 0 && n < 1, "a number from 0 up to 1"];
const flag: Check = [(b) => typeof b === "boolean", "true or false"];
const text: Check = [(s) => typeof s === "string" && s.length > 0, "a name"];
const oneOf = (names: readonly string[]): Check => [(s) => names.includes(s as string), names.join(", ")];
const orNull = ([fits, expected]: Check): Check => [(v) => v === null || fits(v), `${expected}, or null`];

const CHECKS: Readonly<Record<keyof TrainingArguments, Check>> = {
  output_dir: text,
  overwrite_output_dir: flag,
  per_device_train_batch_size: whole(1),
  per_device_eval_batch_size: whole(1),
  gradient_accumulation_steps: whole(1),
  bf16: flag,
  gradient_checkpointing: flag,
  num_train_epochs: [(n) => typeof n === "number" && Number.isFinite(n) && n > 0, "a number above 0"],
  max_steps: [(n) => n === -1 || (Number.isSafeInteger(n) && (n as number) > 0), "a whole number above 0, or -1"],
  learning_rate: real(0),
  lr_scheduler_type: oneOf(SCHEDULES),
  lr_scheduler_kwargs: [(o) => typeof o === "object" && o !== null && !Array.isArray(o), "an object of the schedule's options"],
  warmup_steps: real(0),
  warmup_ratio: real(0, 1),
  optim: oneOf(OPTIMISERS),
  adam_beta1: below1,
  adam_beta2: below1,
  adam_epsilon: real(0),
  weight_decay: real(0),
  decay_norms: flag,
  max_grad_norm: real(0),
  seed: whole(0),
  data_seed: orNull(whole(0)),
  shuffle: flag,
  group_by_length: flag,
  dataloader_drop_last: flag,
  max_length: orNull(whole(1)),
  logging_strategy: oneOf(STRATEGIES),
  logging_steps: whole(1),
  logging_first_step: flag,
  eval_strategy: oneOf(STRATEGIES),
  eval_steps: orNull(whole(1)),
  save_strategy: oneOf(STRATEGIES),
  save_steps: whole(1),
  save_total_limit: orNull(whole(1)),
  load_best_model_at_end: flag,
  metric_for_best_model: orNull(text),
  greater_is_better: orNull(flag),
  early_stopping_patience: orNull(whole(1)),
  early_stopping_threshold: real(0),
  ema_decay: orNull(below1),
  router_aux_loss_coef: real(0),
  router_z_loss_coef: real(0),
  router_bias_update_rate: real(0, 1),
  report_to: [(list) => Array.isArray(list) && list.every((r) => REPORTS.includes(r)), `a list of ${REPORTS.join(", ")}`],
};

/**
 * The arguments with defaults filled in.
 * @throws RangeError for an unknown one, with the nearest known name, for a value out of range, and for arguments that contradict each other
 */
export function trainingArguments(given: Partial<TrainingArguments> = {}, hasEvaluation = true): TrainingArguments {
  const fault = optionFault("args", given, ARGUMENT_NAMES, REMEDIES);
  if (fault !== null) throw new RangeError(fault);
  const present = Object.fromEntries(
    Object.entries(given).filter(([name, v]) => v !== undefined && ARGUMENT_NAMES.includes(name as keyof TrainingArguments)),
  );
  if (typeof present.report_to === "string") present.report_to = [present.report_to as Report];
  const args: TrainingArguments = { ...DEFAULTS, ...present };
  for (const name of ARGUMENT_NAMES) {
    const [fits, expected] = CHECKS[name];
    if (!fits(args[name])) throw new RangeError(`args: ${name} is ${JSON.stringify(args[name])}; expected ${expected}`);
  }
  const clash = contradiction(args, hasEvaluation);
  if (clash) throw new RangeError(`args: ${clash}`);
  return args;
}

function contradiction(args: TrainingArguments, hasEvaluation: boolean): string | null {
  const { eval_strategy: evaluates, save_strategy: saves } = args;
  if (evaluates !== "no" && !hasEvaluation) return `eval_strategy is '${evaluates}', but there is no eval_dataset`;
  if (args.load_best_model_at_end) {
    if (evaluates === "no") return "load_best_model_at_end needs an eval_strategy, or no checkpoint is the best";
    if (saves !== evaluates)
      return `load_best_model_at_end needs save_strategy and eval_strategy to be the same; they are '${saves}' and '${evaluates}'`;
    const every = args.eval_steps ?? args.logging_steps;
    if (saves === "steps" && args.save_steps % every !== 0)
      return `load_best_model_at_end needs save_steps (${args.save_steps}) to be a multiple of eval_steps (${every}), or the best step may not be saved`;
  }
  if (args.early_stopping_patience !== null && evaluates === "no") return "early_stopping_patience needs an eval_strategy";
  if (args.early_stopping_threshold > 0 && args.early_stopping_patience === null)
    return "early_stopping_threshold has no effect without early_stopping_patience";
  if (args.warmup_ratio > 0 && args.warmup_steps > 0) return "warmup_steps and warmup_ratio say the same thing; give one";
  if (args.group_by_length && !args.shuffle) return "group_by_length orders the rows, and shuffle: false keeps their order; give one";
  if (args.report_to.includes("none") && args.report_to.length > 1) return "report_to names 'none' and others";
  return null;
}

/** The format of the optimiser's moments. */
export function momentFormat({ optim }: TrainingArguments): MomentFormat {
  return optim === "adamw_torch" ? "f32" : "8bit";
}

/** Steps of warm-up in a run of `total` steps. */
export function warmupSteps({ warmup_steps, warmup_ratio }: TrainingArguments, total: number): number {
  if (warmup_ratio > 0) return Math.ceil(total * warmup_ratio);
  return warmup_steps >= 1 ? Math.floor(warmup_steps) : Math.ceil(total * warmup_steps);
}

const UNDECAYED = [/bias/, /layernorm/, /rmsnorm/, /(^|\.)norm($|\.)/, /_norm($|\.)/];

/** Whether transformers' Trainer applies weight decay to a parameter: to all but biases and norms, by name. */
export function decaysByName(name: string): boolean {
  return !UNDECAYED.some((pattern) => pattern.test(name));
}
