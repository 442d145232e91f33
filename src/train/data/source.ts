/** The files of a data set as rows: opens each once, finds its layout by its first row, reads rows again by their place. Knows no tokens. */
import { type BadRow, DataError, RowError } from "./fault.ts";
import { type DataFile, findFiles } from "./files.ts";
import { Handles } from "./handles.ts";
import { type Layout, layoutOf, readRow } from "./layout.ts";
import type { ReadOptions } from "./options.ts";
import type { Groups } from "./parquet.ts";
import type { Row } from "./row.ts";
import { type Fields, type Place, type Table, TextTable } from "./table.ts";

export type SourceOptions = Pick<ReadOptions, "format" | "layout" | "columns" | "header" | "delimiter" | "max_row_bytes">;

/** A row of a pass. */
export interface SourceRow {
  /** Of the list of files. */
  readonly file: number;
  readonly place: Place;
  readonly fields: Fields;
  readonly layout: Layout;
  readonly row: Row;
  /** It is the first, or the first of a group of rows that are read together. */
  readonly startsGroup: boolean;
}

export class Source {
  readonly files: readonly DataFile[];
  readonly #options: SourceOptions;
  readonly #handles = new Handles();
  readonly #tables: Promise<Table>[] = [];
  /** Of each file, from its first good row. */
  readonly #layouts: Layout[] = [];
  /** Of Parquet files; null without any. */
  #groups: Groups | null = null;

  private constructor(files: readonly DataFile[], options: SourceOptions) {
    this.files = files;
    this.#options = options;
  }

  /** Finds the files. Throws DataError when there are none. */
  static async open(source: string | readonly string[], options: SourceOptions): Promise<Source> {
    return new Source(await findFiles(source, options.format ?? null), options);
  }

  get bytes(): number {
    return this.files.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** Every row that has been read may be read again at little cost, in any order. */
  get isRandom(): boolean {
    return this.#groups === null || this.#groups.complete;
  }

  /**
   * All rows in order. Throws DataError for a file that is not of its format, or a table of no known layout.
   * @param take a good row; RowErrors that it throws make the row a bad one
   * @param onBad a row that cannot be used
   */
  async pass(take: (row: SourceRow) => void | Promise<void>, onBad: (row: BadRow) => void, signal?: AbortSignal): Promise<void> {
    for (const [file, { path }] of this.files.entries()) {
      const table = await this.#table(file);
      let group = -1;
      for await (const passed of table.pass()) {
        signal?.throwIfAborted();
        const { place } = passed;
        const own = table.groups?.findLastIndex((start) => start <= place.offset) ?? 0;
        try {
          if ("reason" in passed) throw new RowError(passed.reason);
          const { fields } = passed;
          const layout = (this.#layouts[file] ??= this.#options.layout ?? this.#detect(path, table, fields));
          const row = readRow(fields, layout, this.#options.columns);
          await take({ file, place, fields, layout, row, startsGroup: own !== group });
          group = own;
        } catch (error) {
          const reason = error instanceof RowError ? error.message : isTooDeep(error) ? "the row is nested too deeply" : null;
          if (reason === null) throw error;
          onBad({ file: path, line: place.line, unit: table.unit, reason });
        }
      }
    }
  }

  /** A row of a pass again. Throws RowError or DataError if it is no longer there. */
  async read(file: number, place: Place): Promise<{ readonly fields: Fields; readonly row: Row; readonly layout: Layout }> {
    const fields = await (await this.#table(file)).read(place);
    const layout = this.#layouts[file];
    return { fields, layout, row: readRow(fields, layout, this.#options.columns) };
  }

  /** The place of a row for an error. */
  placed(file: number, line: number, reason: string): BadRow {
    const { path, format } = this.files[file];
    return { file: path, line, unit: format === "parquet" ? "row" : "line", reason };
  }

  /** Closes files. Reading again opens them again. */
  close(): Promise<void> {
    return this.#handles.close();
  }

  #table(f: number): Promise<Table> {
    this.#tables[f] ??= this.#open(this.files[f]);
    return this.#tables[f];
  }

  async #open(file: DataFile): Promise<Table> {
    const { max_row_bytes: maxRowBytes, header = null, delimiter = null } = this.#options;
    if (file.format !== "parquet") return new TextTable(file, file.format, { maxRowBytes, header, delimiter }, this.#handles);
    const { Groups, openParquet } = await import("./parquet.ts");
    this.#groups ??= new Groups();
    return openParquet(file, maxRowBytes, this.#handles, this.#groups);
  }

  #detect(path: string, table: Table, fields: Fields): Layout {
    try {
      return layoutOf(fields, this.#options.columns);
    } catch (error) {
      // Of a table, no other row will do.
      if (error instanceof RowError && table.isTable) throw new DataError(`${path}: ${error.message}`);
      throw error;
    }
  }
}

/** V8's error for a recursion that is too deep, such as that of JSON.stringify. */
function isTooDeep(error: unknown): boolean {
  return error instanceof RangeError && error.message === "Maximum call stack size exceeded";
}
