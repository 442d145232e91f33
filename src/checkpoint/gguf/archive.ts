/** A GGUF file as a checkpoint: its tensors under the hub's names, stacked experts split, its keys as configs. Reads no weights. */
import { dirname } from "node:path";
import { isPacked } from "../../tensor/stored.ts";
import type { BlockMatrix } from "../blocks.ts";
import { CheckpointError } from "../error.ts";
import type { StoredDtype, TensorEntry } from "../safetensors.ts";
import { type GgufTensor, readGguf } from "./header.ts";
import { hubName } from "./layout.ts";
import { configOf, generationOf } from "./metadata.ts";

const DTYPES: Readonly<Record<GgufTensor["format"], StoredDtype>> = { f32: "F32", f16: "F16", bf16: "BF16", q8_0: "U8", q4_0: "U8" };

/** The most experts that the kernels take. */
const MAX_EXPERTS = 4096;

/**
 * Opens a GGUF file of an ERNIE-4.5 model as a `Checkpoint`.
 * @param file absolute path
 * @throws CheckpointError for a broken file, or one of another model
 */
export async function openArchive(file: string) {
  const head = await readGguf(file);
  const config = configOf(file, head);
  const tensors = new Map<string, TensorEntry>();
  const blocks = new Map<string, BlockMatrix>();
  const add = (name: string, { format, offset, bytes }: GgufTensor, shape: readonly number[]) => {
    if (tensors.has(name)) throw new CheckpointError(file, `two tensors are the model's ${name}`);
    const packed = isPacked(format);
    tensors.set(name, { name, dtype: DTYPES[format], shape: packed ? [bytes] : shape, file, offset, bytes });
    if (packed) blocks.set(name, { dtype: format, shape: [shape.length === 1 ? 1 : (shape.at(-2) ?? 0), shape.at(-1) ?? 0] });
  };
  for (const tensor of head.tensors.values()) {
    const hub = hubName(tensor.name);
    const [experts, ...each] = tensor.shape;
    if (!hub) add(tensor.name, tensor, tensor.shape);
    else if (!hub.stacked) add(hub.name, tensor, hub.name.endsWith("e_score_correction_bias") ? [1, ...tensor.shape] : tensor.shape);
    else {
      if (tensor.shape.length !== 3 || experts > MAX_EXPERTS)
        throw new CheckpointError(
          file,
          `${tensor.name} has the shape [${tensor.shape.join(", ")}]; matrices of at most ${MAX_EXPERTS} experts are read`,
        );
      const bytes = tensor.bytes / experts;
      for (let e = 0; e < experts; e++) {
        add(hub.name.replace("{e}", String(e)), { ...tensor, offset: tensor.offset + e * bytes, bytes }, each);
      }
    }
  }
  return { folder: dirname(file), config, generationConfig: generationOf(head), tensors, metadata: {}, blocks };
}
