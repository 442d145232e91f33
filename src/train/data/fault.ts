/** Errors of training data: one that stops the reading, and rows that are counted until there are too many. Knows no format. */

/** Training data that cannot be used. The message says what was seen, where, and what to do. */
export class DataError extends RangeError {
  override readonly name = "DataError";
  /** The rows that caused it; empty where the error is not about rows. */
  readonly rows: readonly BadRow[];

  constructor(message: string, rows: readonly BadRow[] = [], options?: ErrorOptions) {
    super(message, options);
    this.rows = rows;
  }
}

/** Why one row cannot be used. Thrown by those who read rows, caught by those who know where the row is. */
export class RowError extends Error {
  override readonly name = "RowError";
}

export interface BadRow {
  readonly file: string;
  /** Of text formats, the line on which the row begins; of Parquet, the row. Counted from 1. */
  readonly line: number;
  readonly unit: "line" | "row";
  readonly reason: string;
}

/** Bad rows that an error lists, and that are kept in all. */
const LISTED = 5;
const KEPT = 100;

/** Counts bad rows. */
export class BadRows {
  readonly #limit: number;
  readonly #kept: BadRow[] = [];
  #count = 0;

  /** @param limit rows that may be bad */
  constructor(limit: number) {
    this.#limit = limit;
  }

  get count(): number {
    return this.#count;
  }

  /** The first hundred. */
  get rows(): readonly BadRow[] {
    return this.#kept;
  }

  /** Throws DataError once there are too many, and enough to list. */
  add(row: BadRow): void {
    this.#count++;
    if (this.#kept.length < KEPT) this.#kept.push(row);
    if (this.#count > this.#limit && this.#count >= LISTED) throw this.#error("at least ");
  }

  /** Throws DataError if there are too many. */
  end(): void {
    if (this.#count > this.#limit) throw this.#error("");
  }

  #error(least: string): DataError {
    const listed = this.#kept.slice(0, LISTED).map((row) => `  ${placed(row)}`);
    const rows = this.#count === 1 ? "1 row cannot be used" : `${this.#count} rows cannot be used`;
    return new DataError(
      `${least}${rows}, and max_bad_rows allows ${this.#limit}:\n${listed.join(";\n")}.\nMend them, or allow more to be skipped with max_bad_rows.`,
      this.#kept,
    );
  }
}

/** `FILE, line N: REASON`. */
export function placed({ file, line, unit, reason }: BadRow): string {
  return `${file}, ${unit} ${line}: ${reason}`;
}

/** A value for a one-line error, cut at 60 characters. */
export function shown(value: unknown): string {
  const text = JSON.stringify(value, (_, each) => (typeof each === "bigint" ? String(each) : each)) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
