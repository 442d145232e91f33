/** Preference tuning with the names of TRL's DPOTrainer. Knows no text. */
import type { TrainingArguments } from "./arguments.ts";
import type { TrainerState } from "./history.ts";
import { type PreferenceRow, preference, Reference } from "./preference.ts";
import type { TrainerCallback } from "./report.ts";
import type { TrainingData } from "./source.ts";
import type { Trainable } from "./trainee.ts";
import { Trainer, type TrainOptions, type TrainOutput } from "./trainer.ts";

/** Arguments of `Trainer`, and those of TRL's `DPOConfig`. */
export interface DPOArguments extends TrainingArguments {
  /** How closely the model stays with the reference: larger is closer. Default 0.1. */
  readonly beta: number;
  /** The probability that a preference is the wrong way round, below 0.5. Default 0. */
  readonly label_smoothing: number;
  /** Default and only one: `sigmoid`. */
  readonly loss_type: "sigmoid";
}

export interface DPOTrainerOptions {
  readonly model: Trainable;
  /** What the model is compared with. Default: the base of a model with adapters. Not needed for rows that have `ref_chosen_logps` and `ref_rejected_logps`. */
  readonly ref_model?: Trainable;
  readonly args?: Partial<DPOArguments>;
  readonly train_dataset?: TrainingData<PreferenceRow>;
  readonly eval_dataset?: TrainingData<PreferenceRow>;
  readonly callbacks?: readonly TrainerCallback[];
}

/**
 * A Trainer whose rows are preferences. Its log has TRL's `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`,
 * `logps/chosen` and `logps/rejected`. The reference's log-probabilities of a row are computed when the row is first used.
 */
export class DPOTrainer {
  readonly #trainer: Trainer<PreferenceRow>;
  readonly #reference: Reference | null;

  /** Throws RangeError for arguments that are unknown or out of range, and for a model without adapters and `ref_model`. */
  constructor({ model, ref_model, args = {}, ...rest }: DPOTrainerOptions) {
    const { beta = 0.1, label_smoothing = 0, loss_type = "sigmoid", ...others } = args;
    if (!(Number.isFinite(beta) && beta > 0)) throw new RangeError(`args: beta is ${beta}; expected a number above 0`);
    if (!(label_smoothing >= 0 && label_smoothing < 0.5))
      throw new RangeError(`args: label_smoothing is ${label_smoothing}; expected a number from 0 up to 0.5`);
    if (loss_type !== "sigmoid") throw new RangeError(`args: loss_type is '${String(loss_type)}'; 'sigmoid' is supported`);
    const compared = ref_model?.frozen?.() ?? model.reference?.() ?? null;
    if (!compared && ref_model) throw new RangeError("ref_model: not a model that can be compared with");
    this.#reference = compared && new Reference(compared);
    this.#trainer = new Trainer({ model, args: others, objective: preference({ beta, label_smoothing }, this.#reference), ...rest });
  }

  get trainer(): Trainer<PreferenceRow> {
    return this.#trainer;
  }

  get state(): TrainerState {
    return this.#trainer.state;
  }

  train(options: TrainOptions = {}): Promise<TrainOutput> {
    return this.#trainer.train(options);
  }

  evaluate(dataset?: TrainingData<PreferenceRow>) {
    return this.#trainer.evaluate(dataset);
  }

  save_model(folder?: string): Promise<void> {
    return this.#trainer.save_model(folder);
  }

  /** Frees the optimiser's memory and the reference's programs. The models stay as they are. */
  dispose(): void {
    this.#trainer.dispose();
    this.#reference?.dispose();
  }
}
