/** Writes a model folder in the hub's layout, from any origin of its numbers. Runs no model. */
import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, rename, rm, writeFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { type BlockMatrix, blockMetadata } from "../checkpoint/blocks.ts";
import { CONFIG } from "../checkpoint/checkpoint.ts";
import { partName, type Source } from "../checkpoint/names.ts";
import { type TensorData, writeSafetensors } from "../checkpoint/writer.ts";
import type { ErnieConfig } from "../model/config.ts";
import { parameterDtype, parameters } from "../model/ernie.ts";
import type { ModelParameter } from "../model/model.ts";
import { ELEMENT_BYTES } from "../tensor/dtype.ts";
import { type BlockDtype, blockBytes, isBlockDtype } from "../tensor/quantized.ts";
import { unpackConfigs } from "./pieces.ts";

/** Weight formats by the names of options, with the name that config.json gives them. */
export const FORMATS = {
  int8: { dtype: "int8", config: "int8" },
  int4: { dtype: "int4", config: "int4" },
  fp8: { dtype: "fp8", config: "float8_e4m3fn" },
  bf16: { dtype: "bf16", config: "bfloat16" },
  fp16: { dtype: "f16", config: "float16" },
  fp32: { dtype: "f32", config: "float32" },
} as const;
const STORED = { int8: "U8", int4: "U8", fp8: "U8", bf16: "BF16", f16: "F16", f32: "F32" } as const;

/** File with a digest of each tensor, beside the weights. */
export const CHECKSUMS = "checksums.json";
const COPIED =
  /^(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json$|^tokenizer\.model$|^chat_template[\w.-]*$|^(LICENSE|README)/;

/** Source of the weights: a checkpoint or a seeded generator. */
export interface Origin {
  readonly config: Record<string, unknown>;
  readonly model: ErnieConfig;
  /** Writes part `index` of a parameter, a matrix [n, k], into `to`. */
  fill(p: ModelParameter, index: number, dtype: BlockDtype | "f32" | "bf16" | "f16", n: number, k: number, to: Uint8Array): Promise<void>;
  /** Folder with further files to copy; null: none. */
  readonly folder: string | null;
  /** Where the parameters are stored, by name; absent: nowhere. */
  readonly sources?: ReadonlyMap<string, Source>;
  /** Of the text that decides how matrices are rounded, if one does. */
  readonly digest?: string;
}

export interface WriteModelOptions {
  readonly format: (typeof FORMATS)[keyof typeof FORMATS];
  /** The GGUF file that holds tokenizer and configs; default: they are files of the origin's folder. */
  readonly archive?: string;
  readonly onProgress?: (progress: { readonly tensor: string; readonly doneBytes: number; readonly totalBytes: number }) => void;
  readonly signal?: AbortSignal;
  /** Keep the weights of an interrupted run and go on with them. Default true. */
  readonly resumable?: boolean;
}

/** Writes weights last, and renames them when complete; `checksums.json` holds a SHA-256 of each tensor. Holds a few matrices in memory. */
export async function writeModel(origin: Origin, out: string, options: WriteModelOptions): Promise<{ bytes: number; tensors: number }> {
  const { format, archive } = options;
  await mkdir(out, { recursive: true });
  const blocks = new Map<string, BlockMatrix>();
  const tensors: TensorData[] = [];
  let [doneBytes, totalBytes] = [0, 0];
  for (const p of parameters(origin.model)) {
    const dtype = parameterDtype(p, format.dtype);
    const shape = p.experts ? p.shape.slice(1) : p.shape;
    const [n, k] = shape.length === 1 ? [1, shape[0]] : shape;
    const bytes = isBlockDtype(dtype) ? blockBytes(dtype, n, k) : n * k * ELEMENT_BYTES[dtype];
    for (let e = 0; e < (p.experts ?? 1); e++) {
      const name = partName(p.name, e, p.experts !== undefined);
      if (isBlockDtype(dtype)) blocks.set(name, { dtype, shape: [n, k] });
      totalBytes += bytes;
      tensors.push({
        name,
        dtype: STORED[dtype],
        shape: isBlockDtype(dtype) ? [bytes] : shape,
        data: async () => {
          options.signal?.throwIfAborted();
          const to = new Uint8Array(bytes);
          await origin.fill(p, e, dtype, n, k, to);
          return to;
        },
      });
    }
  }

  const { folder } = origin;
  if (archive) await unpackConfigs(archive, out);
  else if (folder !== null)
    for (const name of await readdir(folder)) if (COPIED.test(name)) await copyFile(join(folder, name), join(out, name));
  await writeAtomically(join(out, CONFIG), `${JSON.stringify({ ...origin.config, dtype: format.config }, null, 1)}\n`);
  const checksums: Record<string, string> = {};
  const metadata = blocks.size > 0 ? blockMetadata(blocks) : { format: "pt" };
  await writeSafetensors(join(out, "model.safetensors"), tensors, {
    // With another text, a partial file is another model's, and does not go on.
    metadata: origin.digest ? { ...metadata, "mixtape.calibration": origin.digest } : metadata,
    concurrency: availableParallelism(),
    resumable: options.resumable ?? true,
    onWritten: (tensor, data) => {
      checksums[tensor] = createHash("sha256").update(data).digest("hex");
      doneBytes += data.byteLength;
      options.onProgress?.({ tensor, doneBytes, totalBytes });
    },
  });
  await writeAtomically(join(out, CHECKSUMS), `${JSON.stringify({ algorithm: "sha256", tensors: checksums })}\n`);
  return { bytes: totalBytes, tensors: tensors.length };
}

async function writeAtomically(path: string, text: string): Promise<void> {
  const temporary = `${path}.${process.pid}.tmp`;
  try {
    await writeFile(temporary, text);
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}
