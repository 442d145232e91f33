/**
 * INT8 block formats: how quantised weights and activations lie in memory. Kernels of every backend read this layout.
 *
 * Weights (`int8`), a matrix [n, k]: tiles of 16 rows, each tile a run of blocks of 64 columns, rows and columns padded
 * with zeros. A block is 1056 bytes: 64/4 x 16 x 4 unsigned bytes (4 columns of row 0, 4 columns of row 1, ... of row 15;
 * then the next 4 columns), each 128 + round(w / scale), then 16 scales as IEEE halves, one a row. A kernel walks a tile
 * from front to back, each lane of its registers being a row.
 *
 * Activations (`int8row`), a matrix [rows, k]: per row, groups of 64 signed bytes, then a float32 scale a group, then the
 * int32 sum of the bytes of each group (it cancels the 128 of the weights).
 */
import { fromF16, roundEven, toF16 } from "./dtype.ts";

export const TILE_ROWS = 16;
export const GROUP = 64;
export const BLOCK_BYTES = TILE_ROWS * GROUP + TILE_ROWS * 2;

/** Bytes of a matrix [n, k] in `int8`. */
export function int8Bytes(n: number, k: number): number {
  return Math.ceil(n / TILE_ROWS) * Math.ceil(k / GROUP) * BLOCK_BYTES;
}

/** Bytes of one row of `k` activations in `int8row`. */
export function int8RowBytes(k: number): number {
  return Math.ceil(k / GROUP) * (GROUP + 8);
}

/** Rounds a row of weights in place to the numbers that `int8` would hold for it. */
export function roundInt8(row: Float32Array): void {
  for (let g = 0; g < row.length; g += GROUP) {
    const group = row.subarray(g, g + GROUP);
    const largest = group.reduce((top, w) => Math.max(top, Math.abs(w)), 0);
    let bits = toF16(Math.fround(largest / 127));
    if (fromF16(bits) * 127.5 < largest) bits++; // rounded down too far: the largest would not fit
    const scale = fromF16(bits);
    group.forEach((w, i) => {
      group[i] = scale > 0 ? Math.min(127, Math.max(-127, roundEven(Math.fround(w / scale)))) * scale : 0;
    });
  }
}
