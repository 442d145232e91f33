/**
 * How a safetensors file says that a tensor is an int8 matrix: it is stored as U8 [bytes] under its own name, and
 * `__metadata__` holds `mixtape.format` and, as JSON, `mixtape.int8` = { name: [n, k] }. The layout of the bytes is
 * `tensor/int8.ts`'s.
 */
import { int8Bytes } from "../tensor/int8.ts";
import { CheckpointError, errorText } from "./error.ts";
import type { SafetensorsHeader } from "./safetensors.ts";

/** Rows and columns of a quantised matrix. */
export type MatrixShape = readonly [n: number, k: number];

const FORMAT = "1";

/** The `__metadata__` of a file that holds these int8 matrices; for `writeSafetensors`. */
export function int8Metadata(shapes: ReadonlyMap<string, MatrixShape>): Record<string, string> {
  return { "mixtape.format": FORMAT, "mixtape.int8": JSON.stringify(Object.fromEntries(shapes)) };
}

/**
 * The int8 matrices of one file, by tensor name; empty for a file that `mixtape quantize` did not write.
 * @throws CheckpointError for another version of the format, a tensor that is not there, or a size that does not agree
 */
export function readInt8Shapes(file: string, { metadata, tensors }: SafetensorsHeader): Map<string, MatrixShape> {
  const shapes = new Map<string, MatrixShape>();
  const format = metadata["mixtape.format"];
  const text = metadata["mixtape.int8"];
  if (format === undefined && text === undefined) return shapes;
  if (format !== FORMAT) {
    throw new CheckpointError(file, `mixtape.format is ${format ?? "missing"}, this version reads ${FORMAT}: quantise it again`);
  }
  for (const [name, shape] of Object.entries(parse(file, text ?? "{}"))) {
    if (!isMatrixShape(shape)) throw new CheckpointError(file, `int8 tensor ${name} has the bad shape ${JSON.stringify(shape)}`);
    const entry = tensors.get(name);
    if (!entry) throw new CheckpointError(file, `mixtape.int8 names the tensor ${name}, which the file lacks`);
    const bytes = int8Bytes(...shape);
    if (entry.dtype !== "U8" || entry.shape.length !== 1 || entry.bytes !== bytes) {
      throw new CheckpointError(
        file,
        `int8 tensor ${name} is stored as ${entry.dtype} [${entry.shape.join(", ")}], [${shape.join(", ")}] takes U8 [${bytes}]`,
      );
    }
    shapes.set(name, shape);
  }
  return shapes;
}

function parse(file: string, text: string): object {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new CheckpointError(file, `mixtape.int8 in its metadata is not JSON (${errorText(cause)})`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new CheckpointError(file, "mixtape.int8 in its metadata is not a JSON object");
  }
  return value;
}

function isMatrixShape(shape: unknown): shape is MatrixShape {
  return Array.isArray(shape) && shape.length === 2 && shape.every((n) => Number.isSafeInteger(n) && n > 0);
}
