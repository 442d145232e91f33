/** The reference backend's kernels: one function an op, the definition of what it computes. */
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
import { VIEW_KERNELS } from "./views.ts";

/** Every op's kernel, those of the CPU's lowering included. */
export const KERNELS: Readonly<Record<OpName | CpuOpName, Kernel>> = {
  ...MATRIX_KERNELS,
  ...ELEMENTWISE_KERNELS,
  ...ATTENTION_KERNELS,
  ...EXPERT_KERNELS,
  ...LOSS_KERNELS,
  ...SAMPLING_KERNELS,
  ...VIEW_KERNELS,
  ...CPU_KERNELS,
};
