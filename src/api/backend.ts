/** Opens the backend that a model runs on, and makes the choice that `auto` leaves open. Loads no weights. */
import type { Backend, WeightSource } from "../backend/backend.ts";
import { nativeBackend } from "../backend/native.ts";
import { storedBytes } from "../tensor/stored.ts";
import { cardOf, DEVICES, isDevice } from "./device.ts";

export interface DeviceOptions {
  readonly device?: string;
  readonly threads?: number;
  readonly isa?: string;
}

/** What a card needs beside the weights for its programs and a small cache. */
const LEAST_BESIDE = 1.5e9;

/**
 * Opens a backend for these weights.
 * @param warn called if `auto` passes over a GPU
 * @throws RangeError for an unknown device; Error with figures if a GPU that was asked for cannot be used, or is too small
 */
export async function openBackend(
  { device = "auto", threads, isa }: DeviceOptions,
  weights: readonly WeightSource[],
  warn: (message: string) => void,
): Promise<Backend> {
  if (!isDevice(device)) throw new RangeError(`device '${device}' is not known; known are ${DEVICES}`);
  if (device === "reference") return (await import("../backend/reference/reference.ts")).referenceBackend();
  if (device === "cpu" || (device === "auto" && (threads !== undefined || isa !== undefined))) return nativeBackend({ threads, isa });
  const { cudaBackend, cudaSystem } = await import("../backend/cuda/cuda.ts");
  const needed = weights.reduce((sum, { dtype, shape }) => sum + storedBytes(dtype, shape), LEAST_BESIDE);
  const gb = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
  if (device === "auto") {
    const { cards, driver, refused } = cudaSystem();
    const [card] = cards;
    if (!card) {
      // A driver without a card is worth a word, unless its cards were hidden on purpose.
      if (driver !== null && !["", "-1"].includes(process.env["CUDA_VISIBLE_DEVICES"] ?? "0"))
        warn(`no GPU is used, but the CPU: ${refused}`);
      return nativeBackend({});
    }
    const small =
      card.free < needed ? `${gb(needed)} are needed with this model's weights, ${gb(card.free)} of ${gb(card.total)} are free` : "";
    const why = refused || card.refused || small;
    if (!why) return cudaBackend({ card: 0 });
    if (driver !== null) warn(`${card.name} is not used, but the CPU: ${why}`);
    return nativeBackend({});
  }
  const card = cardOf(device);
  const backend = cudaBackend({ card });
  const { free, total } = backend.memory();
  if (free >= needed) return backend;
  backend.dispose();
  throw new Error(
    `device '${device}': out of memory: ${gb(needed)} are needed with this model's weights, ${gb(free)} of ${gb(total)} are free; a smaller format (--dtype, or mixtape quantize) may fit`,
  );
}
