/**
 * How a safetensors file marks a tensor as a matrix in one of our block formats: it is stored as U8 [bytes] under its own
 * name, and `__metadata__` holds `mixtape.format` and, as JSON, `mixtape.int8`, `mixtape.int4` or `mixtape.fp8` = { name: [n, k] }.
 * `tensor/quantized.ts` defines the layout of the bytes.
 */
import { BLOCK_BYTES, type BlockDtype, blockBytes } from "../tensor/quantized.ts";
import type { PackedFormat } from "../tensor/stored.ts";
import { CheckpointError, errorText } from "./error.ts";
import type { SafetensorsHeader } from "./safetensors.ts";

/** Rows and columns of a quantised matrix. */
export type MatrixShape = readonly [n: number, k: number];

/** A tensor that is stored in blocks. */
export interface BlockMatrix {
  readonly dtype: BlockDtype | PackedFormat;
  readonly shape: MatrixShape;
}

const FORMAT = "1";

/** The `__metadata__` of a file that holds these matrices; for `writeSafetensors`. */
export function blockMetadata(matrices: ReadonlyMap<string, BlockMatrix>): Record<string, string> {
  const metadata: Record<string, string> = { "mixtape.format": FORMAT };
  for (const dtype of Object.keys(BLOCK_BYTES)) {
    const own = [...matrices].filter(([, m]) => m.dtype === dtype).map(([name, { shape }]) => [name, shape]);
    if (own.length > 0) metadata[`mixtape.${dtype}`] = JSON.stringify(Object.fromEntries(own));
  }
  return metadata;
}

/**
 * The block matrices of one file, by tensor name; empty for a file that `mixtape quantize` did not write.
 * @throws CheckpointError for another version of the format, a missing tensor, or a size that does not match
 */
export function readBlockMatrices(file: string, { metadata, tensors }: SafetensorsHeader): Map<string, BlockMatrix> {
  const matrices = new Map<string, BlockMatrix>();
  const format = metadata["mixtape.format"];
  const keys = Object.keys(metadata).filter((key) => key.startsWith("mixtape."));
  if (keys.length === 0) return matrices;
  if (format !== FORMAT) {
    throw new CheckpointError(file, `mixtape.format is ${format ?? "missing"}, this version reads ${FORMAT}: quantise it again`);
  }
  for (const dtype of Object.keys(BLOCK_BYTES) as BlockDtype[]) {
    for (const [name, shape] of Object.entries(parse(file, dtype, metadata[`mixtape.${dtype}`] ?? "{}"))) {
      if (!isMatrixShape(shape)) throw new CheckpointError(file, `${dtype} tensor ${name} has the bad shape ${JSON.stringify(shape)}`);
      const entry = tensors.get(name);
      if (!entry) throw new CheckpointError(file, `mixtape.${dtype} names the tensor ${name}, which the file lacks`);
      const bytes = blockBytes(dtype, ...shape);
      if (entry.dtype !== "U8" || entry.shape.length !== 1 || entry.bytes !== bytes) {
        throw new CheckpointError(
          file,
          `${dtype} tensor ${name} is stored as ${entry.dtype} [${entry.shape.join(", ")}], [${shape.join(", ")}] takes U8 [${bytes}]`,
        );
      }
      matrices.set(name, { dtype, shape });
    }
  }
  return matrices;
}

function parse(file: string, dtype: BlockDtype, text: string): object {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new CheckpointError(file, `mixtape.${dtype} in its metadata is not JSON (${errorText(cause)})`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new CheckpointError(file, `mixtape.${dtype} in its metadata is not a JSON object`);
  }
  return value;
}

function isMatrixShape(shape: unknown): shape is MatrixShape {
  return Array.isArray(shape) && shape.length === 2 && shape.every((n) => Number.isSafeInteger(n) && n > 0);
}
