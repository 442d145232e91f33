/** Merges adapters into matrices: W + scale * B A, in memory or from folder to folder. Runs no model. */
import { readdir } from "node:fs/promises";
import { resolve } from "node:path";
import { convertStored } from "../backend/native.ts";
import { adaptersIn, expertName, openAdapter, readAdapter } from "../checkpoint/adapter.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { type AdapterConfig, lowRankAt } from "../checkpoint/lora.ts";
import { locate, partName } from "../checkpoint/names.ts";
import { ernie } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import { FORMATS, type WriteModelOptions, writeModel } from "./folder.ts";
import { checkpointOrigin } from "./quantize.ts";
import { encode } from "./tuning.ts";

/** The adapter of one matrix, or of a stack of them. */
export interface Branch {
  /** The name of the matrix, and its shape. */
  readonly weight: string;
  readonly shape: readonly number[];
  readonly experts?: number;
  readonly rank: number;
  readonly scale: number;
  /** [experts, rank, in], [experts, out, rank] */
  readonly a: Float32Array;
  readonly b: Float32Array;
  /** The lengths of the adapted matrix's rows (DoRA), [out] or [experts, out]. */
  readonly magnitude?: Float32Array;
}

export function adapterParameters(model: Model): ModelParameter[] {
  return model.parameters.filter((p) => p.kind === "adapter");
}

/** The adapters of a model, one after the other. @param read the numbers of an adapter's parameter */
export function* branchesOf(model: Model, config: AdapterConfig, read: (name: string) => Float32Array): Generator<Branch> {
  const byName = new Map(model.parameters.map((p) => [p.name, p]));
  for (const p of adapterParameters(model)) {
    if (!p.name.endsWith(".lora_A.weight")) continue;
    const module = p.name.replace(/\.lora_A\.weight$/, "");
    const weight = byName.get(`${module}.weight`);
    if (!weight) throw new Error(`internal: ${module} has an adapter and no weight`);
    const { rank, scale } = lowRankAt(config, p.experts === undefined ? module : expertName(module, 0));
    yield {
      weight: weight.name,
      shape: weight.shape,
      experts: p.experts,
      rank,
      scale,
      a: read(p.name),
      b: read(`${module}.lora_B.weight`),
      ...(config.use_dora ? { magnitude: read(`${module}.lora_magnitude_vector`) } : {}),
    };
  }
}

/** Adds an adapter's product to a matrix [out, in], in place, and gives its rows their lengths, if any. @param expert which of a stack's */
export function addProduct(matrix: Float32Array, { shape, rank, scale, a, b, magnitude }: Branch, expert: number): void {
  const [out, into] = shape.slice(-2);
  for (let i = 0; i < out; i++) {
    const row = matrix.subarray(i * into, (i + 1) * into);
    for (let r = 0; r < rank; r++) {
      const by = scale * b[(expert * out + i) * rank + r];
      if (by === 0) continue;
      const from = a.subarray((expert * rank + r) * into, (expert * rank + r + 1) * into);
      for (let j = 0; j < into; j++) row[j] += by * from[j];
    }
    if (magnitude) {
      const factor = magnitude[expert * out + i] / lengthOf(row);
      for (let j = 0; j < into; j++) row[j] *= factor;
    }
  }
}

export function lengthOf(row: Float32Array): number {
  let sum = 0;
  for (const x of row) sum += x * x;
  return Math.sqrt(sum);
}

export interface MergeOptions extends Pick<WriteModelOptions, "onProgress" | "signal"> {
  /** Default: the stored format, bf16 where that is in blocks. */
  readonly dtype?: "fp32" | "bf16" | "fp16";
  readonly onWarning?: (message: string) => void;
}

/**
 * Reads a model and an adapter and writes the merged model, a few matrices in memory at a time.
 * @throws CheckpointError naming what does not fit, Error when `out` already holds a model
 */
export async function mergeAdapter(
  source: string,
  adapterFolder: string,
  out: string,
  options: MergeOptions = {},
): Promise<{ tensors: number; merged: number }> {
  if (resolve(source) === resolve(out)) throw new Error(`${out}: source and result are the same folder; name another for the result`);
  if ((await readdir(out).catch(() => [] as string[])).includes("model.safetensors"))
    throw new Error(`${out}: already contains a model; name another folder or delete it first`);
  const checkpoint = await openCheckpoint(source);
  const config = configFor(checkpoint);
  const adapter = await openAdapter(adapterFolder);
  const whole = [...adapter.tensors.keys()].find((name) => !/\.lora_/.test(name));
  if (whole !== undefined)
    throw new RangeError(
      `${adapterFolder} holds ${whole} as a whole (modules_to_save): load it with PeftModel.from_pretrained and save what merge_and_unload gives`,
    );
  const model = ernie(config, adaptersIn(adapter));
  const values = await readAdapter(adapter, adapterParameters(model));
  const branches = new Map(
    [...branchesOf(model, adapter.config, (name) => values.get(name) as Float32Array)].map((branch) => [branch.weight, branch]),
  );
  const { sources } = locate(ernie(config).parameters, checkpoint);
  const origin = await checkpointOrigin(source, options.onWarning);
  const stored = [...sources.values()].find((s) => s.shape.length > 1)?.dtype;
  const usual = stored === "f32" ? "fp32" : stored === "f16" ? "fp16" : "bf16";
  const written = await writeModel(
    {
      ...origin,
      async fill(p, index, dtype, n, k, to) {
        const branch = branches.get(p.name);
        if (!branch) return origin.fill(p, index, dtype, n, k, to);
        const found = sources.get(p.name);
        if (!found) throw new Error(`internal: ${p.name} was not located`);
        const matrix = new Float32Array(n * k);
        await convertStored(
          found.parts[index],
          found.dtype,
          "f32",
          n,
          k,
          new Uint8Array(matrix.buffer),
          partName(p.name, index, p.experts !== undefined),
        );
        addProduct(matrix, branch, index);
        encode(matrix, dtype, to);
      },
    },
    out,
    { ...options, format: FORMATS[options.dtype ?? usual], archive: origin.folder === null ? undefined : await ggufFile(resolve(source)) },
  );
  return { tensors: written.tensors, merged: branches.size };
}
