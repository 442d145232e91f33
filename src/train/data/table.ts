/** Reads the rows of data files: all in one pass, or one again by its place. A row is what its format says, a record of fields. */
import { parse } from "csv-parse/sync";
import { DataError, RowError, shown } from "./fault.ts";
import type { DataFile, Format } from "./files.ts";
import type { Handles } from "./handles.ts";
import { type Extent, elements, lines, pieces, type Splitter, scan, tableRows } from "./records.ts";

export type Fields = Readonly<Record<string, unknown>>;

/** Where a row is: bytes of a text file; of Parquet, `offset` is the row, counted from 0, and `length` 1. */
export type Place = Extent;

/** A row of a pass, or why it cannot be read. */
export type Passed = { readonly place: Place } & ({ readonly fields: Fields } | { readonly reason: string });

/** A file of rows, opened when it is read. */
export interface Table {
  readonly unit: "line" | "row";
  /** All rows in order. Throws DataError for a file that is not of its format. */
  pass(): AsyncIterable<Passed>;
  /** Throws RowError. */
  read(place: Place): Promise<Fields>;
  /** The rows, counted from 0, at which groups begin that are read together; null where each row is read alone. */
  readonly groups: readonly number[] | null;
  /** All rows have the same columns. */
  readonly isTable: boolean;
}

export interface TableOptions {
  /** Bytes of a row. */
  readonly maxRowBytes: number;
  /** Names of the columns of CSV and TSV files without a header. */
  readonly header: readonly string[] | null;
  /** Between the columns; default: a comma in CSV, a tab in TSV. */
  readonly delimiter: string | null;
}

/** A file as rows. Parquet is not read here, so that its library is loaded only where it is needed: see `parquet.ts`. */
export class TextTable implements Table {
  readonly unit = "line";
  readonly groups = null;
  readonly isTable: boolean;
  readonly #file: DataFile;
  readonly #format: Exclude<Format, "parquet">;
  readonly #options: TableOptions;
  readonly #delimiter: string;
  /** Column names, once the first row has been read. */
  #header: readonly string[] | null;
  readonly #handles: Handles;

  constructor(file: DataFile, format: Exclude<Format, "parquet">, options: TableOptions, handles: Handles) {
    this.isTable = format === "csv" || format === "tsv";
    this.#file = file;
    this.#handles = handles;
    this.#format = format;
    this.#options = options;
    this.#header = options.header;
    this.#delimiter = options.delimiter ?? (format === "tsv" ? "\t" : ",");
  }

  async *pass(): AsyncGenerator<Passed> {
    const { maxRowBytes } = this.#options;
    let headed = this.#options.header !== null || !this.isTable;
    for await (const record of scan(this.#file.path, this.#splitter(), maxRowBytes)) {
      if ("reason" in record) yield { place: record, reason: record.reason };
      else if (record.bytes === null)
        yield { place: record, reason: `the row has ${record.length} bytes; max_row_bytes allows ${maxRowBytes}` };
      else
        try {
          if (headed) yield { place: record, fields: this.#parse(record.bytes, record) };
          else {
            this.#header = this.#readHeader(decoded(record.bytes));
            headed = true;
          }
        } catch (error) {
          if (!(error instanceof RowError)) throw error;
          if (!headed) throw new DataError(`${this.#file.path}, line ${record.line}: the header cannot be read: ${error.message}`);
          yield { place: record, reason: error.message };
        }
    }
  }

  async read(place: Place): Promise<Fields> {
    return this.#parse(await this.#handles.read(this.#file.path, place.offset, place.length), place);
  }

  #splitter(): Splitter {
    switch (this.#format) {
      case "jsonl":
        return lines();
      case "json":
        return elements(this.#file.path);
      case "csv":
      case "tsv":
        return tableRows(this.#delimiter.charCodeAt(0), this.#format === "csv");
      case "text":
        return pieces();
      default:
        return this.#format satisfies never;
    }
  }

  #parse(bytes: Uint8Array, { offset, length }: Place): Fields {
    const text = decoded(bytes);
    switch (this.#format) {
      case "jsonl":
      case "json":
        return parsedObject(text);
      case "csv":
      case "tsv":
        return this.#columns(this.#split(text));
      case "text":
        return { text, ...(offset + length < this.#file.bytes ? { continues: true } : {}) };
      default:
        return this.#format satisfies never;
    }
  }

  /** One row of a table. Fields of TSV are never in quotes: a quote is a character like any other. */
  #split(text: string): string[] {
    const line = text.replace(/\r$/, "");
    if (this.#format === "tsv") return line.split(this.#delimiter);
    try {
      const rows = parse(line, { delimiter: this.#delimiter, relax_quotes: true, relax_column_count: true });
      return rows[0] ?? [];
    } catch (error) {
      throw new RowError(error instanceof Error ? error.message : String(error));
    }
  }

  #readHeader(text: string): string[] {
    const names = this.#split(text).map((name) => name.trim());
    const twice = names.find((name, i) => names.indexOf(name) < i);
    if (twice !== undefined) throw new RowError(`two columns have the name ${shown(twice)}; give header for a file without one`);
    return names;
  }

  #columns(values: readonly string[]): Fields {
    const names = this.#header ?? [];
    if (values.length !== names.length)
      throw new RowError(`${values.length} columns, where the ${this.#options.header ? "header given" : "first row"} has ${names.length}`);
    return Object.fromEntries(names.map((name, i) => [name, values[i]]));
  }
}

const decoder = new TextDecoder("utf-8", { fatal: true });

function decoded(bytes: Uint8Array): string {
  try {
    return decoder.decode(bytes);
  } catch {
    throw new RowError("not valid UTF-8: convert the file, or remove the row");
  }
}

function parsedObject(text: string): Fields {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    const what = error instanceof Error ? error.message.replace(/, "[\s\S]*/, "").replace(/\s*\n\s*/g, " ") : String(error);
    throw new RowError(`broken JSON: ${what}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new RowError(`not a JSON object: ${shown(value)}`);
  return value as Fields;
}
