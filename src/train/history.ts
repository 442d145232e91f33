/** What a run has done so far: its place, its log, its best evaluation. The part of a checkpoint that is JSON. */

/** One line of the log, as transformers has them: `loss`, `grad_norm`, `learning_rate`, or `eval_...`; always with `step` and `epoch`. */
export interface LogEntry {
  readonly step: number;
  readonly epoch: number;
  readonly loss?: number;
  readonly grad_norm?: number;
  readonly learning_rate?: number;
  readonly eval_loss?: number;
  readonly [name: string]: number | undefined;
}

/** As transformers' `TrainerState`. */
export interface TrainerState {
  global_step: number;
  epoch: number;
  max_steps: number;
  num_train_epochs: number;
  /** Tokens of the rows trained on so far. */
  num_input_tokens_seen: number;
  log_history: LogEntry[];
  best_metric: number | null;
  best_model_checkpoint: string | null;
  /** Evaluations in a row without improvement. */
  stale_evaluations: number;
  /** The sum of the losses of all steps so far. */
  total_loss: number;
  unlogged: Unlogged;
}

/** Sums over the steps since the last line of the log. */
export interface Unlogged {
  loss: number;
  steps: number;
  /** Of measures beside the loss, by name. */
  metrics: Record<string, number>;
}

export function newState(): TrainerState {
  return {
    global_step: 0,
    epoch: 0,
    max_steps: 0,
    num_train_epochs: 0,
    num_input_tokens_seen: 0,
    log_history: [],
    best_metric: null,
    best_model_checkpoint: null,
    stale_evaluations: 0,
    total_loss: 0,
    unlogged: { loss: 0, steps: 0, metrics: {} },
  };
}

/** Set by a callback to steer the run. */
export interface TrainerControl {
  should_training_stop: boolean;
  should_save: boolean;
  should_evaluate: boolean;
}
