/** Learning rates over the steps of a run, computed as transformers computes them. */

export const SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay"] as const;
export type ScheduleName = (typeof SCHEDULES)[number];

/** `lr_scheduler_kwargs`, by transformers' names. */
export interface ScheduleOptions {
  /** Waves of `cosine`, `cosine_with_min_lr` and a cosine decay. Default 0.5: down to the minimum once. */
  readonly num_cycles?: number;
  /** Of `cosine_with_min_lr`: where it ends, as a rate or as a share of the learning rate. */
  readonly min_lr?: number;
  readonly min_lr_rate?: number;
  /** Of `warmup_stable_decay`. `num_stable_steps`: default, the steps that warm-up and decay leave. */
  readonly num_decay_steps?: number;
  readonly num_stable_steps?: number;
  readonly warmup_type?: Shape;
  readonly decay_type?: Shape;
  /** Default 0. */
  readonly min_lr_ratio?: number;
}

const SHAPES = ["linear", "cosine", "1-sqrt"] as const;
type Shape = (typeof SHAPES)[number];

/** The options that a schedule has. */
const OPTIONS: Readonly<Record<ScheduleName, readonly (keyof ScheduleOptions)[]>> = {
  constant: [],
  constant_with_warmup: [],
  linear: [],
  cosine: ["num_cycles"],
  cosine_with_min_lr: ["num_cycles", "min_lr", "min_lr_rate"],
  warmup_stable_decay: ["num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"],
};

export interface ScheduleSetting {
  readonly name: ScheduleName;
  readonly learningRate: number;
  readonly warmupSteps: number;
  readonly totalSteps: number;
  readonly options: ScheduleOptions;
}

/**
 * The learning rate of each step, counted from 0.
 * @throws RangeError for options that the schedule does not have or that contradict each other
 */
export function schedule({ name, learningRate, warmupSteps, totalSteps, options }: ScheduleSetting): (step: number) => number {
  const known = OPTIONS[name];
  for (const [key, value] of Object.entries(options)) {
    if (!(known as readonly string[]).includes(key))
      throw new RangeError(
        `lr_scheduler_kwargs: '${name}' has no option '${key}'${known.length > 0 ? `; it has ${known.join(", ")}` : ""}`,
      );
    const shape = key === "warmup_type" || key === "decay_type";
    if (shape ? !SHAPES.includes(value as Shape) : typeof value !== "number" || !Number.isFinite(value) || value < 0)
      throw new RangeError(`lr_scheduler_kwargs: ${key} is ${value}; expected ${shape ? SHAPES.join(", ") : "a number of at least 0"}`);
  }
  const factor = factorOf({ name, learningRate, warmupSteps, totalSteps, options });
  return (step) => learningRate * factor(step);
}

function factorOf({ name, learningRate, warmupSteps, totalSteps, options }: ScheduleSetting): (step: number) => number {
  const warm = (step: number) => step / Math.max(1, warmupSteps);
  const progress = (step: number) => (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps);
  const wave = (at: number) => 0.5 * (1 + Math.cos(Math.PI * (options.num_cycles ?? 0.5) * 2 * at));
  switch (name) {
    case "constant":
      return () => 1;
    case "constant_with_warmup":
      return (step) => (step < warmupSteps ? warm(step) : 1);
    case "linear":
      return (step) => (step < warmupSteps ? warm(step) : Math.max(0, (totalSteps - step) / Math.max(1, totalSteps - warmupSteps)));
    case "cosine":
      return (step) => (step < warmupSteps ? warm(step) : Math.max(0, wave(progress(step))));
    case "cosine_with_min_lr": {
      const { min_lr, min_lr_rate } = options;
      if ((min_lr === undefined) === (min_lr_rate === undefined))
        throw new RangeError("lr_scheduler_kwargs: cosine_with_min_lr needs min_lr or min_lr_rate, and not both");
      const least = min_lr_rate ?? (min_lr as number) / learningRate;
      return (step) => (step < warmupSteps ? warm(step) : Math.max(0, wave(progress(step)) * (1 - least) + least));
    }
    case "warmup_stable_decay":
      return stable(warmupSteps, totalSteps, options);
    default:
      return name satisfies never;
  }
}

/** https://arxiv.org/abs/2404.06395 */
function stable(warmupSteps: number, totalSteps: number, options: ScheduleOptions): (step: number) => number {
  const { num_decay_steps: decay, warmup_type = "linear", decay_type = "cosine", min_lr_ratio: least = 0, num_cycles = 0.5 } = options;
  if (decay === undefined) throw new RangeError("lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps");
  const level = options.num_stable_steps ?? totalSteps - warmupSteps - decay;
  if (level < 0)
    throw new RangeError(
      `lr_scheduler_kwargs: ${warmupSteps} steps of warm-up and ${decay} of decay are more than the run's ${totalSteps}`,
    );
  const above = (factor: number) => Math.max(0, factor * (1 - least) + least);
  const rising = {
    linear: (p: number) => p,
    cosine: (p: number) => 0.5 * (1 - Math.cos(Math.PI * p)),
    "1-sqrt": (p: number) => 1 - Math.sqrt(1 - p),
  };
  const falling = {
    linear: (p: number) => 1 - p,
    cosine: (p: number) => 0.5 * (1 + Math.cos(Math.PI * num_cycles * 2 * p)),
    "1-sqrt": (p: number) => 1 - Math.sqrt(p),
  };
  return (step) => {
    if (step < warmupSteps) return above(rising[warmup_type](step / Math.max(1, warmupSteps)));
    if (step < warmupSteps + level) return 1;
    if (step < warmupSteps + level + decay) return above(falling[decay_type]((step - warmupSteps - level) / Math.max(1, decay)));
    return least;
  };
}
