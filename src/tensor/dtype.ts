/** Number formats: what a stored or computed number is, and how many bytes it takes. No I/O. */

/**
 * Formats that the engine computes with.
 * - `int8`, `int4`: a weight matrix in blocks of 16 rows x 64 columns (see `quantized.ts`).
 * - `bf16pair`: activations as the sum of two bfloat16 numbers, a row's first ones before its second ones; exact to 2^-17.
 *   Products with bfloat16 weights take it: rounding activations to one would change which experts are chosen.
 * - `int8row`: activations quantised row by row, in groups of 64 (see `quantized.ts`); lives inside a step only.
 * - `int8kv`: keys and values in the cache, [blocks, heads, tokens, head width] (see `quantized.ts`).
 */
export type Dtype = "f32" | "f16" | "bf16" | "i32" | "int8" | "int4" | "int8row" | "bf16pair" | "int8kv";

/** Formats of the KV cache. */
export type KvDtype = "f32" | "f16" | "int8kv";

/** Bytes of one element; block formats have no single element. */
export const ELEMENT_BYTES = { f32: 4, f16: 2, bf16: 2, i32: 4 } as const satisfies Partial<Record<Dtype, number>>;

/** The float32 nearest to `x` that bfloat16 holds (ties to even). */
export function roundBf16(x: number): number {
  F32[0] = x;
  if (Number.isNaN(x)) return x;
  U32[0] = (U32[0] + 0x7fff + ((U32[0] >>> 16) & 1)) & 0xffff0000;
  return F32[0];
}

/** The float32 that the bits of an IEEE half stand for. */
export function fromF16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The bits of the IEEE half nearest to `x` (ties to even; beyond 65504: infinity). */
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

/** The whole number nearest to `x`, ties to even. */
export function roundEven(x: number): number {
  const low = Math.floor(x);
  const rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

// One word of scratch to reinterpret bits; never read across calls.
const F32 = new Float32Array(1);
const U32 = new Uint32Array(F32.buffer);
