// Token ids as callers have them: numbers, bigints, typed arrays, and tensors of transformers.js, which hold 64-bit integers. The one
// reader of all of them. Knows no vocabulary.

/** Ids with their dimensions, as tensors of other libraries have them. */
export interface TensorIds {
  readonly dims: readonly number[];
  readonly data: ArrayLike<number | bigint>;
}

/** The ids of one sequence. A tensor is [n] or [1, n]. */
export type TokenIds = ArrayLike<number | bigint> | TensorIds;
/** The ids of several sequences: a list of them, or a tensor [rows, n]. One sequence is taken for a list of one. */
export type TokenRows = ArrayLike<number | bigint> | readonly TokenIds[] | TensorIds;

/** A number; anything else is returned as it is, for the error of whoever looks it up. */
export function idNumber(id: number | bigint): number {
  return typeof id === "bigint" ? Number(id) : id;
}

/** The ids of one sequence as numbers, or null for a value of another kind. Does not look at the numbers. */
export function idNumbers(ids: TokenIds): number[] | null {
  if (isTensor(ids)) {
    const rows = ids.dims.length <= 1 || (ids.dims.length === 2 && ids.dims[0] === 1);
    return rows ? idNumbers(ids.data) : null;
  }
  return isList(ids) ? Array.from(ids as ArrayLike<number | bigint>, idNumber) : null;
}

/** The rows of `input_ids` as numbers, or null for a value of another kind or a tensor of more than two dimensions. */
export function idRows(rows: TokenRows): number[][] | null {
  if (isTensor(rows)) {
    const { dims, data } = rows;
    if (dims.length < 2) return one(idNumbers(data));
    const [count, width] = dims;
    if (dims.length > 2 || data.length !== count * width) return null;
    const all = Array.from(data, idNumber);
    return Array.from({ length: count }, (_, r) => all.slice(r * width, (r + 1) * width));
  }
  if (!isList(rows)) return null;
  if (typeof rows[0] === "number" || typeof rows[0] === "bigint") return one(idNumbers(rows as TokenIds));
  const each = Array.from(rows as ArrayLike<TokenIds>, idNumbers);
  return each.includes(null) ? null : (each as number[][]);
}

function one(row: number[] | null): number[][] | null {
  return row && [row];
}

function isTensor(value: unknown): value is TensorIds {
  return (
    typeof value === "object" && value !== null && "dims" in value && Array.isArray(value.dims) && "data" in value && isList(value.data)
  );
}

function isList(value: unknown): value is ArrayLike<unknown> {
  return Array.isArray(value) || (ArrayBuffer.isView(value) && !(value instanceof DataView));
}
