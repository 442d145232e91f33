/**
 * Block formats: the memory layout of quantised weights and activations. The kernels read this layout, and files store it
 * unchanged, so they are memory-mapped and used without repacking.
 *
 * A weight matrix [n, k] consists of tiles of 16 rows; each tile is a sequence of blocks of 64 columns. Rows and columns are
 * padded with zeros. A kernel reads a tile from front to back, with one row per lane of its registers. A weight is scale x
 * (stored - offset); scales are IEEE halves.
 *
 * `int8`, 1056 bytes per block: 16 vectors of 16 rows x 4 columns (4 columns of row 0, of row 1, ... of row 15; then the
 * next 4 columns), each byte 128 + an integer from -127 to 127; then 16 scales, one per row. 8.25 bits per weight.
 *
 * `fp8`: the same, but each byte is an E4M3 number (a sign, 4 bits of exponent, 3 of fraction; the largest is 448). The numbers that scales have
 * here are s/8 x 2^e, s from 8 to 15, so that a weight is a bfloat16 number, exactly.
 *
 * `int4`, 576 bytes per block: 8 vectors in the same order, with columns 0 to 31 of the block in the low nibbles and columns
 * 32 to 63 in the high nibbles, each 8 + an integer from -8 to 7; then 16 scales, one per row, for the first 32 columns, and
 * 16 for the others. 4.5 bits per weight.
 *
 * Activations (`int8row`), a matrix [rows, k]: per row, groups of 64 signed bytes, then one float32 scale per group, then
 * three int32 per group that cancel the offset of the weights: -8 times the sum of each half (for int4), and -128 times the sum of all.
 *
 * The KV cache (`int8kv`): a block of 32 tokens of one head takes 68 bytes per token and group of 64 columns, with the head
 * width padded to whole groups. Keys: two tiles of 16 tokens as in `int8`, but with float32 scales. Values: tiles of 16
 * columns, each 8 vectors of 16 columns x 4 tokens, each byte 128 + an integer from -127 to 127; then one float32 scale per token.
 */
import { fromE4m3, fromF16, roundE4m3, roundEven, toF16 } from "./dtype.ts";

/** Rows per tile. */
export const TILE_ROWS = 16;
/** Columns per block, and numbers per group of activations. */
export const GROUP = 64;

/** The block formats for weights. */
export type BlockDtype = "int8" | "int4" | "fp8";

/** Bytes per block of 16 rows x 64 columns, scales included. */
export const BLOCK_BYTES: Readonly<Record<BlockDtype, number>> = {
  int8: TILE_ROWS * GROUP + TILE_ROWS * 2,
  int4: (TILE_ROWS * GROUP) / 2 + TILE_ROWS * 4,
  fp8: TILE_ROWS * GROUP + TILE_ROWS * 2,
};

export function isBlockDtype(dtype: string): dtype is BlockDtype {
  return Object.hasOwn(BLOCK_BYTES, dtype);
}

/** Bytes of a weight matrix [n, k] in a block format, padding included. */
export function blockBytes(dtype: BlockDtype, n: number, k: number): number {
  return Math.ceil(n / TILE_ROWS) * Math.ceil(k / GROUP) * BLOCK_BYTES[dtype];
}

/** Bytes of one row of `k` activations in `int8row`. */
export function int8RowBytes(k: number): number {
  return Math.ceil(k / GROUP) * (GROUP + 16);
}

/** Bytes of one cached key or value of a head of `width` numbers in `int8kv`. */
export function int8KvBytes(width: number): number {
  return Math.ceil(width / GROUP) * (GROUP + 4);
}

/** Rounds activations in place to 255 levels; every `span` numbers share a scale, set by their largest magnitude. */
export function roundActivations(x: Float32Array, span: number): void {
  for (let g = 0; g < x.length; g += span) {
    const group = x.subarray(g, g + span);
    const top = group.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
    const inverse = top > 0 ? Math.fround(127 / top) : 0;
    for (let i = 0; i < group.length; i++) group[i] = roundEven(Math.fround(group[i] * inverse)) * Math.fround(top / 127);
  }
}

/** The offsets of the element in row `r` and column `c` of a matrix with `k` columns: its byte (for int4, also the nibble) and that of its scale. */
export function locateElement(dtype: BlockDtype, k: number, r: number, c: number): { byte: number; highNibble: boolean; scale: number } {
  const block = (Math.floor(r / TILE_ROWS) * Math.ceil(k / GROUP) + Math.floor(c / GROUP)) * BLOCK_BYTES[dtype];
  const [lane, q] = [r % TILE_ROWS, c % GROUP];
  const half = dtype === "int4" ? Math.floor(q / 32) : 0;
  const column = q - half * 32;
  return {
    byte: block + (Math.floor(column / 4) * TILE_ROWS + lane) * 4 + (column % 4),
    highNibble: half === 1,
    scale: block + (dtype === "int4" ? (TILE_ROWS * GROUP) / 2 : TILE_ROWS * GROUP) + (half * TILE_ROWS + lane) * 2,
  };
}

/** The value of an element that `locateElement` found. */
export function readElement(dtype: BlockDtype, bytes: Uint8Array, { byte, highNibble, scale }: ReturnType<typeof locateElement>): number {
  const bits = bytes[byte];
  const number = dtype === "fp8" ? fromE4m3(bits) : dtype === "int8" ? bits - 128 : ((highNibble ? bits >> 4 : bits) & 15) - 8;
  return number * fromF16(bytes[scale] | (bytes[scale + 1] << 8));
}

/** Rounds a row of weights in place to the values that a block format would store; the same rule as `native/quantize.cpp`. */
export function roundToBlocks(dtype: BlockDtype, row: Float32Array): void {
  if (dtype === "fp8") {
    for (let g = 0; g < row.length; g += GROUP) roundToFp8(row.subarray(g, g + GROUP));
    return;
  }
  const span = dtype === "int8" ? GROUP : GROUP / 2;
  const [low, high] = dtype === "int8" ? [-127, 127] : [-8, 7];
  for (let g = 0; g < row.length; g += span) {
    const group = row.subarray(g, g + span);
    const scale = dtype === "int8" ? int8Scale(group) : int4Scale(group);
    for (let i = 0; i < group.length; i++) group[i] = steps(group[i], scale, low, high) * scale;
  }
}

function steps(x: number, scale: number, low: number, high: number): number {
  if (scale === 0) return 0;
  return Math.min(high, Math.max(low, roundEven(Math.fround(x * Math.fround(1 / scale)))));
}

/**
 * Rounds a group: of eight scales, which map the largest magnitude to between 224 and 448, the one with the smallest squared error. Scales are
 * from 2^-21, from which on halves hold them exactly, to 15/8 x 2^15.
 */
function roundToFp8(group: Float32Array): void {
  const scaleAt = (i: number) => ((8 + (i % 8)) / 8) * 2 ** (Math.floor(i / 8) - 21);
  const top = group.reduce((most, w) => Math.max(most, Math.abs(w)), 0);
  let first = 8 * Math.max(0, Math.floor(Math.log2(top / 448)) + 20); // at most the right one, and less than two octaves from it
  while (scaleAt(first) * 448 < top) first++;
  let [best, bestError] = [group, Number.POSITIVE_INFINITY];
  for (let at = first; at < first + 8 && scaleAt(at) < 65504; at++) {
    const scale = scaleAt(at);
    const rounded = group.map((w) => roundE4m3(Math.fround(w / scale)) * scale || 0); // no negative zeros
    const error = group.reduce((sum, w, i) => sum + Math.fround(w - rounded[i]) ** 2, 0);
    if (error < bestError) [best, bestError] = [rounded, error];
  }
  group.set(best);
}

/** The scale that maps the largest magnitude to 127. */
function int8Scale(group: Float32Array): number {
  const largest = group.reduce((top, w) => Math.max(top, Math.abs(w)), 0);
  let bits = toF16(Math.fround(largest / 127));
  if (fromF16(bits) * 127.5 < largest) bits++; // the half was rounded down so far that the largest magnitude would not fit
  return fromF16(bits);
}

/** Of eleven scales, which map the number of largest magnitude to between -8.8 and -6.8, the one with the smallest squared error. */
function int4Scale(group: Float32Array): number {
  const extreme = group.reduce((top, w) => (Math.abs(w) > Math.abs(top) ? w : top), group[0]);
  let [best, bestError] = [0, Number.POSITIVE_INFINITY];
  for (let step = 0; step <= 10; step++) {
    const scale = fromF16(toF16(Math.fround(extreme / Math.fround(-8.8 + 0.2 * step))));
    let error = 0;
    for (const w of group) error += (w - steps(w, scale, -8, 7) * scale) ** 2;
    if (error < bestError) [best, bestError] = [scale, error];
  }
  return best;
}
