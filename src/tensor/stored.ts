/** What a weight may be stored as: the formats that the engine computes with, and those that it converts while loading. No I/O. */
import { type Dtype, ELEMENT_BYTES } from "./dtype.ts";
import { blockBytes, isBlockDtype } from "./quantized.ts";

/**
 * GGUF's quantised formats: row by row, blocks of 32 numbers, each a scale (an IEEE half), then the numbers.
 * - `q8_0`, 34 bytes a block: 32 signed bytes.
 * - `q4_0`, 18 bytes a block: 8 + a whole number from -8 to 7; low nibbles are numbers 0 to 15, high nibbles 16 to 31.
 */
export type PackedFormat = "q8_0" | "q4_0";

export type StoredFormat = Dtype | PackedFormat;

/** Numbers that share a scale. */
export const PACK = 32;

export const PACK_BYTES: Readonly<Record<PackedFormat, number>> = { q8_0: 34, q4_0: 18 };

export function isPacked(format: string): format is PackedFormat {
  return Object.hasOwn(PACK_BYTES, format);
}

/** Bytes of a matrix [n, k]; k is a multiple of 32. */
export function packedBytes(format: PackedFormat, n: number, k: number): number {
  return n * (k / PACK) * PACK_BYTES[format];
}

/** Bytes of a weight: a vector, a matrix [n, k], or a stack of them. */
export function storedBytes(format: StoredFormat, shape: readonly number[]): number {
  const [n, k] = shape.length === 1 ? [1, shape[0]] : shape.slice(-2);
  const count = shape.length === 3 ? shape[0] : 1;
  if (isBlockDtype(format)) return count * blockBytes(format, n, k);
  if (isPacked(format)) return count * packedBytes(format, n, k);
  return count * n * k * ELEMENT_BYTES[format as keyof typeof ELEMENT_BYTES];
}

/** The format in which programs read what is stored like this, unless another is asked for. */
export function computedAs(format: StoredFormat): Dtype {
  return format === "q8_0" ? "int8" : format === "q4_0" ? "int4" : format;
}
