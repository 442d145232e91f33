/** Reads the recorded outputs of the reference implementation that lie beside each fixture checkpoint. */

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { readHeader, readTensor } from "../src/checkpoint/safetensors.ts";

export const GOLDENS = fileURLToPath(new URL("./fixtures/goldens/", import.meta.url));

export interface Goldens {
  readonly folder: string;
  /** Prompt lengths that were recorded. */
  readonly lengths: readonly number[];
  /** Greedy continuations by prompt length. */
  readonly greedy: Readonly<Record<string, readonly number[]>>;
  tensor(name: string): Promise<{ shape: readonly number[]; data: Float32Array | Int32Array }>;
  ids(length: number): Promise<number[]>;
}

export async function openGoldens(variant: string, file = "goldens.safetensors"): Promise<Goldens> {
  const folder = `${GOLDENS}${variant}`;
  const { tensors } = await readHeader(`${folder}/${file}`);
  const meta = JSON.parse(readFileSync(`${folder}/goldens.json`, "utf8"));
  const tensor = async (name: string) => {
    const entry = tensors.get(name);
    if (!entry) throw new Error(`no recorded tensor ${name}`);
    const bytes = await readTensor(entry);
    const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
    return { shape: entry.shape, data: entry.dtype === "I32" ? new Int32Array(buffer) : new Float32Array(buffer) };
  };
  return {
    folder,
    lengths: meta.lengths,
    greedy: meta.greedy,
    tensor,
    ids: async (n) => [...(await tensor(`forward.${n}.input_ids`)).data],
  };
}

/** Largest difference, as a share of the largest absolute value expected. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) throw new Error(`${actual.length} values, ${expected.length} expected`);
  let [worst, top] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    if (Number.isNaN(actual[i])) return Number.POSITIVE_INFINITY;
    worst = Math.max(worst, Math.abs(actual[i] - expected[i]));
    top = Math.max(top, Math.abs(expected[i]));
  }
  return worst === 0 ? 0 : worst / top;
}

/** The optimiser of the recorded runs, as arguments of a Trainer. */
export const RECORDED_ARGS = {
  learning_rate: 5e-3,
  adam_beta1: 0.9,
  adam_beta2: 0.95,
  adam_epsilon: 1e-8,
  weight_decay: 0.01,
  max_grad_norm: 0,
  lr_scheduler_type: "constant",
  max_steps: 10,
} as const;
