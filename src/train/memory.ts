/** How much memory a run will take, before it starts. */
import { elements } from "../tensor/shape.ts";
import { type MomentFormat, momentStates } from "./optimiser.ts";
import { type Trainee, trainedParameters } from "./trainee.ts";

export interface MemoryEstimate {
  /** All in bytes. Weights that stay frozen: mapped from files, and converted copies. */
  readonly weights: number;
  /** Trained parameters, float32. */
  readonly parameters: number;
  /** Gradients, the optimiser's two moments, and moving averages. */
  readonly moments: number;
  /** Activations of the largest batch, and gradients on the way, estimated. */
  readonly workspace: number;
  readonly total: number;
  /** What the process may still take, weights that are mapped but not yet read counted as taken. */
  readonly free: number;
}

/** @param workspace bytes of the largest step's. @param averages whether moving averages are kept. @param format of the moments */
export function estimateMemory(trainee: Trainee, workspace: number, averages: boolean, format: MomentFormat): MemoryEstimate {
  const trained = trainedParameters(trainee);
  const bytes = trained.reduce((n, p) => n + 4 * elements(p.shape), 0);
  const held = trained.flatMap((p) => momentStates(p.name, p.shape, format)).reduce((n, s) => n + 4 * elements(s.shape), 0);
  const { weights, backend } = trainee;
  const moved = weights.placement().movedBytes;
  const parts = {
    weights: weights.mappedBytes + weights.ownedBytes,
    parameters: bytes,
    moments: (averages ? 2 : 1) * bytes + held,
    workspace,
  };
  const free = Math.max(0, backend.memory().free - (weights.mappedBytes - moved));
  return { ...parts, total: Object.values(parts).reduce((a, b) => a + b, 0), free };
}

/** Throws a RangeError with figures if what is not allocated yet does not fit. */
export function checkMemory(estimate: MemoryEstimate): void {
  const { moments, workspace, free } = estimate;
  if (moments + workspace <= free) return;
  throw new RangeError(
    `not enough memory: ${describe(estimate)}; take a smaller per_device_train_batch_size or max_length, train less of the model, or give the process more memory`,
  );
}

/** The estimate in one line. */
export function describe({ weights, parameters, moments, workspace, free }: MemoryEstimate): string {
  return `weights ${gib(weights)}, trained parameters ${gib(parameters)}, gradients and optimiser ${gib(moments)} and workspace ${gib(workspace)}, of which ${gib(moments + workspace)} are still to be allocated and ${gib(free)} are free`;
}

function gib(bytes: number): string {
  return bytes < 2 ** 30 / 10 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
