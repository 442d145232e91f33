/** Writes a model folder anew with its matrices in another format. Norms, biases and the router become float32. */
import { copyFile, mkdir, readdir, rename, rm, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { convertStored } from "../backend/native.ts";
import { CONFIG, openCheckpoint } from "../checkpoint/checkpoint.ts";
import { type BlockMatrix, blockMetadata } from "../checkpoint/blocks.ts";
import { locate } from "../checkpoint/names.ts";
import { type TensorData, writeSafetensors } from "../checkpoint/writer.ts";
import { readConfig } from "../model/config.ts";
import { parameters } from "../model/ernie.ts";
import { type Dtype, ELEMENT_BYTES } from "../tensor/dtype.ts";
import { blockBytes, isBlockDtype } from "../tensor/quantized.ts";

export interface QuantizeOptions {
  readonly dtype: "int8" | "int4" | "bf16" | "fp16" | "fp32";
  /** Called before each tensor. Bytes are of the result. */
  readonly onProgress?: (progress: { readonly tensor: string; readonly doneBytes: number; readonly totalBytes: number }) => void;
  readonly signal?: AbortSignal;
}

const FORMATS = {
  int8: { dtype: "int8", stored: "U8", config: "int8" },
  int4: { dtype: "int4", stored: "U8", config: "int4" },
  bf16: { dtype: "bf16", stored: "BF16", config: "bfloat16" },
  fp16: { dtype: "f16", stored: "F16", config: "float16" },
  fp32: { dtype: "f32", stored: "F32", config: "float32" },
} as const;
const COPIED =
  /^(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json$|^tokenizer\.model$|^chat_template[\w.-]*$|^(LICENSE|README)/;

/**
 * Reads the model folder `source` and writes `out`, in the hub's layout. Matrices are converted one at a time, so memory
 * stays small; the weights come last and under their own name only when whole, so a folder cut off halfway does not load.
 * @throws CheckpointError for whatever is wrong with the source, Error when `out` holds a model already
 */
export async function quantize(source: string, out: string, options: QuantizeOptions): Promise<{ bytes: number; tensors: number }> {
  if (!Object.hasOwn(FORMATS, options.dtype))
    throw new RangeError(`dtype '${options.dtype}' is not known; known are ${Object.keys(FORMATS).join(", ")}`);
  const format = FORMATS[options.dtype];
  const checkpoint = await openCheckpoint(source);
  const config = readConfig(checkpoint.config);
  if (resolve(source) === resolve(out)) throw new Error(`${out}: source and result are the same folder; name another for the result`);
  await mkdir(out, { recursive: true });
  const there = await readdir(out);
  if (there.includes("model.safetensors")) throw new Error(`${out}: holds a model already; name another folder or delete it first`);

  const all = parameters(config);
  const { sources } = locate(all, checkpoint);
  const blocks = new Map<string, BlockMatrix>();
  const tensors: TensorData[] = [];
  let doneBytes = 0;
  for (const p of all) {
    const found = sources.get(p.name);
    if (!found) throw new Error(`internal: ${p.name} was not located`);
    const dtype: Exclude<Dtype, "i32" | "int8row"> = p.kind === "matrix" ? format.dtype : "f32";
    const shape = p.experts ? p.shape.slice(1) : p.shape;
    const [n, k] = shape.length === 1 ? [1, shape[0]] : shape;
    const bytes = isBlockDtype(dtype) ? blockBytes(dtype, n, k) : n * k * ELEMENT_BYTES[dtype];
    found.parts.forEach((part, e) => {
      const name = p.experts ? p.name.replace(".experts.", `.experts.${e}.`) : p.name;
      if (isBlockDtype(dtype)) blocks.set(name, { dtype, shape: [n, k] });
      tensors.push({
        name,
        dtype: p.kind === "matrix" ? format.stored : "F32",
        shape: isBlockDtype(dtype) ? [bytes] : shape,
        data: async () => {
          options.signal?.throwIfAborted();
          options.onProgress?.({ tensor: name, doneBytes, totalBytes });
          doneBytes += bytes;
          const to = new Uint8Array(bytes);
          await convertStored(part, found.dtype, dtype, n, k, to);
          return to;
        },
      });
    });
  }
  const sizes = tensors.map((t) => (t.dtype === "U8" ? t.shape[0] : t.shape.reduce((a, b) => a * b, t.dtype === "F32" ? 4 : 2)));
  const totalBytes = sizes.reduce((a, b) => a + b, 0);

  for (const name of await readdir(source)) if (COPIED.test(name)) await copyFile(join(source, name), join(out, name));
  await writeAtomically(join(out, CONFIG), `${JSON.stringify({ ...checkpoint.config, dtype: format.config }, null, 1)}\n`);
  await writeSafetensors(join(out, "model.safetensors"), tensors, blocks.size > 0 ? blockMetadata(blocks) : { format: "pt" });
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
