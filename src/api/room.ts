/** Checks before loading whether a model fits this machine: what to reject, and what to warn about. Loads nothing. */
import type { WeightSource } from "../backend/backend.ts";
import { hostMemory } from "../backend/memory.ts";
import { storedBytes } from "../tensor/stored.ts";

export interface Machine {
  /** Bytes that this process may use, and those of them that are free or hold only pages of files, which can be dropped. */
  readonly memory: number;
  readonly free: number;
  /** Physical cores. */
  readonly cores: number;
}

/** This machine, or as much of it as the process's control groups grant. */
export function thisMachine(cores: number, memory = hostMemory()): Machine {
  return { memory: memory.total, free: memory.free, cores };
}

/**
 * Warnings about a model that will run, but slowly.
 * @throws RangeError when copies of weights in another format would not fit memory
 */
export function warningsFor(weights: readonly WeightSource[], threads: number, { memory, free, cores }: Machine): string[] {
  let [mapped, copied] = [0, 0];
  for (const { stored, dtype, shape, parts } of weights) {
    if (stored === dtype) mapped += parts.reduce((sum, part) => sum + part.bytes, 0);
    else copied += storedBytes(dtype, shape);
  }
  if (copied > free)
    throw new RangeError(
      `converting the weights takes ${gib(copied)} GiB of memory, and ${gib(free)} GiB are free; write the model in that format first (mixtape quantize), which takes little memory, and load the result`,
    );
  const warnings: string[] = [];
  if (mapped + copied > memory)
    warnings.push(
      `the weights are ${gib(mapped + copied)} GiB and there are ${gib(memory)} GiB of memory: they will be read from disk over and over, which is many times slower; a smaller format (mixtape quantize --dtype int4) may fit`,
    );
  if (threads > cores)
    warnings.push(`${threads} threads on ${cores} core${cores === 1 ? "" : "s"}: they wait for each other; ${cores} would be faster`);
  return warnings;
}

function gib(bytes: number): string {
  return (bytes / 2 ** 30).toFixed(1);
}
