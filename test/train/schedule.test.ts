/** Learning rates against values that transformers 5.18 gives, and the arguments of schedules. */
import { expect, test } from "vitest";
import { trainingArguments, warmupSteps } from "../../src/train/arguments.ts";
import { type ScheduleName, type ScheduleOptions, schedule } from "../../src/train/schedule.ts";

const of = (name: ScheduleName, warmup: number, total: number, options: ScheduleOptions = {}) =>
  schedule({ name, learningRate: 2, warmupSteps: warmup, totalSteps: total, options });

/** By hand from the formulas of transformers/optimization.py, learning rate 2. */
test.each<[ScheduleName, number, number, ScheduleOptions, readonly (readonly [number, number])[]]>([
  [
    "constant",
    5,
    10,
    {},
    [
      [0, 2],
      [9, 2],
    ],
  ],
  [
    "constant_with_warmup",
    4,
    10,
    {},
    [
      [0, 0],
      [1, 0.5],
      [4, 2],
      [9, 2],
    ],
  ],
  [
    "linear",
    2,
    10,
    {},
    [
      [0, 0],
      [1, 1],
      [2, 2],
      [6, 1],
      [10, 0],
      [11, 0],
    ],
  ],
  [
    "linear",
    0,
    4,
    {},
    [
      [0, 2],
      [3, 0.5],
    ],
  ],
  [
    "cosine",
    2,
    10,
    {},
    [
      [1, 1],
      [2, 2],
      [6, 1],
      [8, 2 * 0.5 * (1 + Math.cos(0.75 * Math.PI))],
      [10, 0],
    ],
  ],
  [
    "cosine",
    0,
    8,
    { num_cycles: 1 },
    [
      [4, 0],
      [8, 2],
    ],
  ],
  [
    "cosine_with_min_lr",
    2,
    10,
    { min_lr: 0.5 },
    [
      [0, 0],
      [2, 2],
      [6, 1.25],
      [10, 0.5],
    ],
  ],
  [
    "cosine_with_min_lr",
    2,
    10,
    { min_lr_rate: 0.25 },
    [
      [6, 1.25],
      [10, 0.5],
    ],
  ],
  [
    "warmup_stable_decay",
    2,
    10,
    { num_decay_steps: 4, min_lr_ratio: 0.1 },
    [
      [0, 0.2],
      [1, 1.1],
      [2, 2],
      [5, 2],
      [6, 2],
      [8, 1.1],
      [10, 0.2],
    ],
  ],
  [
    "warmup_stable_decay",
    0,
    10,
    { num_decay_steps: 4, decay_type: "linear" },
    [
      [0, 2],
      [7, 1.5],
      [10, 0],
    ],
  ],
  [
    "warmup_stable_decay",
    4,
    10,
    { num_decay_steps: 4, decay_type: "1-sqrt", warmup_type: "1-sqrt" },
    [
      [3, 1],
      [7, 1],
      [10, 0],
    ],
  ],
  [
    "warmup_stable_decay",
    4,
    10,
    { num_decay_steps: 4, num_stable_steps: 1, warmup_type: "cosine" },
    [
      [2, 1],
      [4, 2],
      [5, 2],
      [9, 0],
    ],
  ],
])("%s, %d steps of warm-up in %d, %j", (name, warmup, total, options, points) => {
  const rate = of(name, warmup, total, options);
  for (const [step, expected] of points) expect(rate(step), `step ${step}`).toBeCloseTo(expected, 12);
});

test("options that a schedule lacks, and that contradict, are refused", () => {
  expect(() => of("linear", 0, 10, { min_lr: 1 })).toThrow("'linear' has no option 'min_lr'");
  expect(() => of("cosine_with_min_lr", 0, 10)).toThrow("needs min_lr or min_lr_rate, and not both");
  expect(() => of("warmup_stable_decay", 0, 10)).toThrow("needs num_decay_steps");
  expect(() => of("warmup_stable_decay", 8, 10, { num_decay_steps: 4 })).toThrow(
    "8 steps of warm-up and 4 of decay are more than the run's 10",
  );
  expect(() => of("cosine", 0, 10, { num_cycles: -1 })).toThrow("num_cycles is -1");
});

test("warm-up in steps, as a share in warmup_steps, and as warmup_ratio", () => {
  expect(warmupSteps(trainingArguments({ warmup_steps: 7 }), 100)).toBe(7);
  expect(warmupSteps(trainingArguments({ warmup_steps: 0.031 }), 100)).toBe(4);
  expect(warmupSteps(trainingArguments({ warmup_ratio: 0.031 }), 100)).toBe(4);
});
