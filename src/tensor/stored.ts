/** The formats in which weights are stored: those that the engine computes with, and those that it converts while loading. No I/O. */
import { type Dtype, ELEMENT_BYTES } from "./dtype.ts";
import { blockBytes, isBlockDtype } from "./quantized.ts";

/**
 * GGUF's quantised formats: row by row, in blocks of 32 numbers, each block a scale (an IEEE half) followed by the numbers.
 * - `q8_0`, 34 bytes per block: 32 signed bytes.
 * - `q4_0`, 18 bytes per block: 8 + an integer from -8 to 7; numbers 0 to 15 in the low nibbles, 16 to 31 in the high nibbles.
 */
export type PackedFormat = "q8_0" | "q4_0";

export type StoredFormat = Dtype | PackedFormat;

/** Numbers per block; they share a scale. */
export const PACK = 32;

/** Bytes per block of 32 numbers, scale included. */
export const PACK_BYTES: Readonly<Record<PackedFormat, number>> = { q8_0: 34, q4_0: 18 };

export function isPacked(format: string): format is PackedFormat {
  return Object.hasOwn(PACK_BYTES, format);
}

/** Bytes of a matrix [n, k] in a packed format; k must be a multiple of 32. */
export function packedBytes(format: PackedFormat, n: number, k: number): number {
  return n * (k / PACK) * PACK_BYTES[format];
}

/** Bytes of a stored weight: a vector, a matrix [n, k], or a stack of matrices [count, n, k]. */
export function storedBytes(format: StoredFormat, shape: readonly number[]): number {
  const [n, k] = shape.length === 1 ? [1, shape[0]] : shape.slice(-2);
  const count = shape.length === 3 ? shape[0] : 1;
  if (isBlockDtype(format)) return count * blockBytes(format, n, k);
  if (isPacked(format)) return count * packedBytes(format, n, k);
  return count * n * k * ELEMENT_BYTES[format as keyof typeof ELEMENT_BYTES];
}

/** The format in which programs read a weight stored in `format`, unless another dtype is requested. */
export function computedAs(format: StoredFormat): Dtype {
  return format === "q8_0" ? "int8" : format === "q4_0" ? "int4" : format;
}
