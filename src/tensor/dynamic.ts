/**
 * Block-wise dynamic 8-bit numbers (https://arxiv.org/abs/2110.02861), for an optimiser's moments: blocks of 256 numbers that share their
 * largest magnitude, each number a code of the nearest level. Levels take a step of ten as a decimal digit's place: seven decades, each with
 * twice as many levels as the one below. The native kernels have the same levels, to the bit (native/dynamic.h).
 */

/** Numbers that share a scale. */
export const DYNAMIC_BLOCK = 256;

export interface DynamicLevels {
  /** Magnitudes in ascending order, from 0 to 1. */
  readonly levels: Float32Array;
  /** Between each level and the next; a number beyond it belongs to the next. */
  readonly middles: Float32Array;
}

/** @param first levels of the lowest decade */
function magnitudes(first: number): DynamicLevels {
  const levels = [0];
  for (let decade = 0; decade < 7; decade++) {
    const count = first * 2 ** decade;
    for (let j = 0; j < count; j++) levels.push((0.1 + (0.9 * (j + 0.5)) / count) * TENS[decade]);
  }
  const rounded = Float32Array.from([...levels, 1]);
  const middles = Float32Array.from({ length: rounded.length - 1 }, (_, i) => Math.fround(rounded[i] + rounded[i + 1]) / 2);
  return { levels: rounded, middles };
}

const TENS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1];

/** Of numbers with a sign: code 127 + i is level i, code 127 - i its negative; -1 has no code. */
export const SIGNED = magnitudes(1);
/** Of numbers from 0 on: code i is level i. */
export const UNSIGNED = magnitudes(2);

/** The level nearest to x, from 0 to 1; between two of them the lower one. */
function nearest({ middles }: DynamicLevels, x: number): number {
  let [low, high] = [0, middles.length];
  while (low < high) {
    const at = (low + high) >> 1;
    if (x > middles[at]) low = at + 1;
    else high = at;
  }
  return low;
}

/** The largest magnitude of a block, which is its scale. */
function largest(values: Float32Array): number {
  return values.reduce((top, x) => Math.max(top, Math.abs(x)), 0);
}

/** Writes a block's codes, and returns its scale. */
export function encodeDynamic(values: Float32Array, signed: boolean, codes: Uint8Array): number {
  const scale = largest(values);
  values.forEach((x, i) => {
    const share = scale > 0 ? Math.fround(Math.abs(x) / scale) : 0;
    const level = nearest(signed ? SIGNED : UNSIGNED, share);
    codes[i] = !signed ? level : x < 0 ? 127 - Math.min(127, level) : 127 + level;
  });
  return scale;
}

/** The number that a code of a block with this scale stands for. */
export function decodeDynamic(code: number, signed: boolean, scale: number): number {
  if (!signed) return UNSIGNED.levels[code] * scale;
  return code < 127 ? -SIGNED.levels[127 - code] * scale : SIGNED.levels[code - 127] * scale;
}
