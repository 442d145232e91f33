/**
 * The op table: one row per op, with its parameters, shape rule and gradient rule. These are the ops that models are traced with
 * and that backend-independent passes produce. Backends match kernels to them by name, and may add rows of their own.
 */
import type { Op } from "./call.ts";
import { ATTENTION_OPS } from "./ops/attention.ts";
import { ELEMENTWISE_OPS } from "./ops/elementwise.ts";
import { EXPERT_OPS } from "./ops/experts.ts";
import { LOSS_OPS } from "./ops/loss.ts";
import { MATRIX_OPS } from "./ops/matrix.ts";
import { SAMPLING_OPS } from "./ops/sampling.ts";
import { TUNING_OPS } from "./ops/tuning.ts";
import { VIEW_OPS } from "./ops/views.ts";

export const OPS = {
  ...MATRIX_OPS,
  ...ELEMENTWISE_OPS,
  ...ATTENTION_OPS,
  ...EXPERT_OPS,
  ...LOSS_OPS,
  ...SAMPLING_OPS,
  ...TUNING_OPS,
  ...VIEW_OPS,
} satisfies Record<string, Op>;

export type OpName = keyof typeof OPS;
