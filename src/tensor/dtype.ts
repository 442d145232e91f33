/** Number formats: the dtypes of stored and computed numbers, their sizes, and conversions. No I/O. */

/**
 * Formats that the engine computes with.
 * - `int8`, `int4`, `fp8`: a weight matrix in blocks of 16 rows x 64 columns (see `quantized.ts`).
 * - `bf16pair`: activations as the sum of two bfloat16 numbers, all high parts of a row before its low parts; exact to 2^-17.
 *   Products with bfloat16 weights use it, because rounding activations to a single bfloat16 would change which experts are chosen.
 * - `int8row`: activations quantised row by row, in groups of 64 (see `quantized.ts`); exists only within a step.
 * - `fp8kv`: E4M3 numbers in the cache, one byte each.
 * - `int8kv`: keys and values in the cache, [blocks, heads, tokens, head width] (see `quantized.ts`).
 */
export type Dtype = "f32" | "f16" | "bf16" | "i32" | "int8" | "int4" | "fp8" | "int8row" | "bf16pair" | "int8kv" | "fp8kv";

/** Formats of the KV cache; `bf16` and `fp8kv` only on GPUs. */
export type KvDtype = "f32" | "f16" | "bf16" | "int8kv" | "fp8kv";

/** Bytes per element. Block formats are absent: their elements share bytes and scales. */
export const ELEMENT_BYTES = { f32: 4, f16: 2, bf16: 2, i32: 4, fp8kv: 1 } as const satisfies Partial<Record<Dtype, number>>;

/** Rounds `x` to the nearest bfloat16 value (ties to even), returned as a float32. */
export function roundBf16(x: number): number {
  F32[0] = x;
  if (Number.isNaN(x)) return x;
  U32[0] = (U32[0] + 0x7fff + ((U32[0] >>> 16) & 1)) & 0xffff0000;
  return F32[0];
}

/** Decodes the 16 bits of an IEEE half. */
export function fromF16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Encodes `x` as the 16 bits of the nearest IEEE half (ties to even; from 65520 on, infinity). */
export function toF16(x: number): number {
  F32[0] = x;
  const bits = U32[0];
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = Math.abs(F32[0]);
  if (Number.isNaN(magnitude)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 2 ** -14) return sign | roundEven(magnitude * 2 ** 24);
  const exponent = ((bits >>> 23) & 255) - 127;
  return sign | (((exponent + 15) << 10) + roundEven((magnitude / 2 ** exponent - 1) * 1024));
}

/** Rounds `x` to the nearest E4M3 number, ties to even; larger ones than 448 become 448. */
export function roundE4m3(x: number): number {
  const magnitude = Math.min(448, Math.abs(x));
  const step = 2 ** (Math.max(-6, Math.floor(Math.log2(magnitude))) - 3);
  return Math.sign(x) * roundEven(magnitude / step) * step;
}

/** Decodes the 8 bits of an E4M3 number. */
export function fromE4m3(bits: number): number {
  const exponent = (bits >> 3) & 15;
  const fraction = bits & 7;
  if (exponent === 15 && fraction === 7) return Number.NaN;
  return (bits & 0x80 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -9 : (1 + fraction / 8) * 2 ** (exponent - 7));
}

/** Rounds `x` to the nearest integer, ties to even. */
export function roundEven(x: number): number {
  const low = Math.floor(x);
  const rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

// A scratch word for reinterpreting bits; its value never outlives a call.
const F32 = new Float32Array(1);
const U32 = new Uint32Array(F32.buffer);
