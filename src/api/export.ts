/** Exports a model as one GGUF file for llama.cpp and its derivatives, with tokenizer and chat template. Runs no model. */
import { stat } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { basename, resolve } from "node:path";
import { convertStored } from "../backend/native.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { GgufFormat } from "../checkpoint/gguf/header.ts";
import { ggufName } from "../checkpoint/gguf/layout.ts";
import { type GgufEntry, metadataOf } from "../checkpoint/gguf/metadata.ts";
import { type GgufTensorData, ggufBytes, writeGguf } from "../checkpoint/gguf/packer.ts";
import { checkTiedHead, locate, unusedText } from "../checkpoint/names.ts";
import type { ErnieConfig } from "../model/config.ts";
import { parameterDtype, parameters } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import type { ModelParameter } from "../model/model.ts";
import { PACK } from "../tensor/stored.ts";
import { openPieces, pieceEntries, placeholderPieces } from "./pieces.ts";

export type GgufExportType = "q8_0" | "q4_0" | "bf16" | "f16" | "f32";

/** llama.cpp's file types, by the format of most tensors. */
const FILE_TYPES: Readonly<Record<GgufExportType, number>> = { f32: 0, f16: 1, q4_0: 2, q8_0: 7, bf16: 32 };

export interface ExportOptions {
  readonly type: GgufExportType;
  /** Called after each tensor, with bytes of the result. */
  readonly onProgress?: (progress: { readonly tensor: string; readonly doneBytes: number; readonly totalBytes: number }) => void;
  readonly signal?: AbortSignal;
  /** Called with tensors that are left out because the model does not use them. Default: a process warning. */
  readonly onWarning?: (message: string) => void;
  /** Write a placeholder tokenizer (the 256 bytes) if the model has none. Default false: that is an error. */
  readonly withoutTokenizer?: boolean;
}

/**
 * Writes `outFile`. int4 to q4_0 and int8 to q8_0 are lossless. Norms, the router and its bias are float32; with q4_0 the
 * embedding and the head are q8_0. Holds a few matrices in memory at a time.
 * Rejects with a one-line error for a model that GGUF can't represent or a file that exists; no partial file is left behind.
 */
export async function exportGguf(source: string, outFile: string, options: ExportOptions): Promise<{ bytes: number; tensors: number }> {
  if ((options.type as string) === "fp8")
    throw new RangeError("type 'fp8': GGUF has no 8-bit floats; bf16 holds fp8 exactly, q8_0 is as small");
  if (!Object.hasOwn(FILE_TYPES, options.type))
    throw new RangeError(`type '${options.type}' is not known; known are ${Object.keys(FILE_TYPES).join(", ")}`);
  const file = resolve(outFile);
  if (await stat(file).catch(() => null)) throw new CheckpointError(file, "already exists; name another file or delete it first");
  const checkpoint = await openCheckpoint(source);
  const config = configFor(checkpoint);
  if (config.classifier) throw new CheckpointError(source, "is a classifier, and only models that predict tokens are written as GGUF");
  if (config.moe && config.moe.endLayer !== config.layers - 1)
    throw new CheckpointError(file, `GGUF can't represent that layer ${config.moe.endLayer} of ${config.layers} is the last with experts`);

  const all = parameters(config);
  const located = locate(all, checkpoint);
  await checkTiedHead(located, checkpoint);
  const unused = unusedText(located);
  if (unused) (options.onWarning ?? process.emitWarning)(`${source}: ${unused}`);
  const { sources } = located;
  const tensors = all.map((p): GgufTensorData => {
    const found = sources.get(p.name);
    const name = ggufName(p.name);
    if (!found || !name) throw new Error(`internal: ${p.name} ${found ? "has no name in GGUF" : "was not located"}`);
    const shape = p.shape.length === 2 && p.shape[0] === 1 && name.endsWith("exp_probs_b.bias") ? p.shape.slice(1) : p.shape;
    const format = formatOf(p, options.type);
    const k = shape.at(-1) ?? 0;
    const bytes = ggufBytes(file, { name, format, shape }) / found.parts.length;
    const n = shape.reduce((product, size) => product * size, 1) / k / found.parts.length;
    const parts = found.parts.map((part, e) => async () => {
      options.signal?.throwIfAborted();
      const to = new Uint8Array(bytes);
      await convertStored(part, found.dtype, format, n, k, to, p.experts ? `${p.name} of expert ${e}` : p.name);
      return to;
    });
    return { name, format, shape, parts };
  });

  const totalBytes = tensors.reduce((sum, tensor) => sum + ggufBytes(file, tensor), 0);
  const tokenizer = await tokenizerEntries(source, config, options.withoutTokenizer ?? false);
  const general: GgufEntry[] = [
    ["general.name", "string", basename(checkpoint.folder)],
    ["general.file_type", "u32", FILE_TYPES[options.type]],
    ["general.quantization_version", "u32", 2],
  ];
  const model = metadataOf(config, checkpoint.config, checkpoint.generationConfig ?? {});
  const entries = new Map([...tokenizer, ...model, ...general].map((entry) => [entry[0], entry]));
  const architecture = entries.get("general.architecture");
  if (architecture) entries.delete(architecture[0]);
  let doneBytes = 0;
  await writeGguf(file, [...(architecture ? [architecture] : []), ...entries.values()], tensors, {
    concurrency: availableParallelism(),
    onWritten: (tensor, bytes) => {
      doneBytes += bytes;
      options.onProgress?.({ tensor, doneBytes, totalBytes });
    },
  });
  return { bytes: totalBytes, tensors: tensors.length };
}

/** Matrices whose rows do not fill blocks of 32 are written in half precision; with q4_0, the embedding and the head in q8_0. */
function formatOf(parameter: ModelParameter, type: GgufExportType): GgufFormat {
  const { kind, shape } = parameter;
  if (kind === "float32") return "f32";
  if ((type === "q8_0" || type === "q4_0") && (shape.at(-1) ?? 0) % PACK !== 0) return "f16";
  return type === "q4_0" && parameterDtype(parameter, "int4") === "int8" ? "q8_0" : type;
}

async function tokenizerEntries(source: string, config: ErnieConfig, optional: boolean): Promise<GgufEntry[]> {
  try {
    return pieceEntries(await openPieces(source), config.vocabSize);
  } catch (error) {
    if (optional && error instanceof Error && error.message.includes("no tokenizer in "))
      return pieceEntries(placeholderPieces(config.vocabSize), config.vocabSize);
    throw error;
  }
}
