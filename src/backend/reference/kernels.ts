/** The reference backend's kernels: one function per op, which defines what the op computes. */
import type { OpName } from "../../graph/ops.ts";
import type { CpuOpName } from "../cpu.ts";
import { ATTENTION_KERNELS } from "./attention.ts";
import { CPU_KERNELS } from "./cpu.ts";
import { ELEMENTWISE_KERNELS } from "./elementwise.ts";
import { EXPERT_KERNELS } from "./experts.ts";
import { LOSS_KERNELS } from "./loss.ts";
import { MATRIX_KERNELS } from "./matrix.ts";
import type { Kernel } from "./operand.ts";
import { SAMPLING_KERNELS } from "./sampling.ts";
import { TUNING_KERNELS } from "./tuning.ts";
import { VIEW_KERNELS } from "./views.ts";

/** The kernels of all ops, including those of the CPU's lowering. */
export const KERNELS: Readonly<Record<OpName | CpuOpName, Kernel>> = {
  ...MATRIX_KERNELS,
  ...ELEMENTWISE_KERNELS,
  ...ATTENTION_KERNELS,
  ...EXPERT_KERNELS,
  ...LOSS_KERNELS,
  ...SAMPLING_KERNELS,
  ...TUNING_KERNELS,
  ...VIEW_KERNELS,
  ...CPU_KERNELS,
};
