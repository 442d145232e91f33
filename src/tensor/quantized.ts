/**
 * Block formats: how quantised weights and activations lie in memory. Kernels of every backend read this layout, and
 * files hold it as it is, so that they are memory-mapped and used without repacking.
 *
 * A weight matrix [n, k] is tiles of 16 rows, each tile a run of blocks of 64 columns, rows and columns padded with
 * zeros. A kernel walks a tile from front to back, each lane of its registers being a row. Numbers are scale x (stored -
 * middle); scales are IEEE halves.
 *
 * `int8`, 1056 bytes a block: 16 vectors of 16 rows x 4 columns (4 columns of row 0, of row 1, ... of row 15; then the
 * next 4 columns), each byte 128 + a whole number from -127 to 127; then 16 scales, one a row. 8.25 bits a weight.
 *
 * `int4`, 576 bytes a block: 8 vectors in the same order, whose low nibbles are columns 0 to 31 of the block and whose
 * high nibbles are columns 32 to 63, each 8 + a whole number from -8 to 7; then 16 scales, one a row, of the first 32
 * columns, and 16 of the others. 4.5 bits a weight.
 *
 * Activations (`int8row`), a matrix [rows, k]: per row, groups of 64 signed bytes, then a float32 scale a group, then the
 * int32 sums of each 32 bytes (they cancel the middle of the weights).
 *
 * The KV cache (`int8kv`): a block of 32 tokens of a head takes 68 bytes a token and 64 columns, the head's width padded
 * to whole groups. Keys: two tiles of 16 tokens as in `int8`, but with float32 scales. Values: tiles of 16 columns, each
 * 8 vectors of 16 columns x 4 tokens, each byte 128 + a whole number from -127 to 127; then a float32 scale a token.
 */
import { fromF16, roundEven, toF16 } from "./dtype.ts";

export const TILE_ROWS = 16;
export const GROUP = 64;

/** Weight formats in blocks. */
export type BlockDtype = "int8" | "int4";

export const BLOCK_BYTES: Readonly<Record<BlockDtype, number>> = {
  int8: TILE_ROWS * GROUP + TILE_ROWS * 2,
  int4: (TILE_ROWS * GROUP) / 2 + TILE_ROWS * 4,
};

export function isBlockDtype(dtype: string): dtype is BlockDtype {
  return Object.hasOwn(BLOCK_BYTES, dtype);
}

/** Bytes of a matrix [n, k]. */
export function blockBytes(dtype: BlockDtype, n: number, k: number): number {
  return Math.ceil(n / TILE_ROWS) * Math.ceil(k / GROUP) * BLOCK_BYTES[dtype];
}

/** Bytes of one row of `k` activations in `int8row`. */
export function int8RowBytes(k: number): number {
  return Math.ceil(k / GROUP) * (GROUP + 12);
}

/** Bytes of one cached key or value of a head of `width` numbers in `int8kv`. */
export function int8KvBytes(width: number): number {
  return Math.ceil(width / GROUP) * (GROUP + 4);
}

/** Rounds activations in place to the nearest of 255 steps; each `span` numbers share a scale, that of the largest. */
export function roundActivations(x: Float32Array, span: number): void {
  for (let g = 0; g < x.length; g += span) {
    const group = x.subarray(g, g + span);
    const top = group.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
    const inverse = top > 0 ? Math.fround(127 / top) : 0;
    for (let i = 0; i < group.length; i++) group[i] = roundEven(Math.fround(group[i] * inverse)) * Math.fround(top / 127);
  }
}

/** Where column `c` of row `r` of a matrix with `k` columns lies: its byte (of int4, and which nibble), and its scale's byte. */
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

/** Rounds a row of weights in place to the numbers that a block format would hold for it; the same rule as `native/quantize.cpp`. */
export function roundToBlocks(dtype: BlockDtype, row: Float32Array): void {
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

/** The largest magnitude is 127 steps. */
function int8Scale(group: Float32Array): number {
  const largest = group.reduce((top, w) => Math.max(top, Math.abs(w)), 0);
  let bits = toF16(Math.fround(largest / 127));
  if (fromF16(bits) * 127.5 < largest) bits++; // rounded down too far: the largest would not fit
  return fromF16(bits);
}

/** The scale with the smallest squared error among some that make the number of largest magnitude -6.8 to -8.8 steps. */
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
