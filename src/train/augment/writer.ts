/** Writes rows to a file of the format that its ending names, all or nothing: the file is there once it is complete. */
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { stringify } from "csv-stringify/sync";
import { DataError, shown } from "../data/fault.ts";
import type { Fields } from "../data/table.ts";

const FORMATS = ["jsonl", "json", "csv", "tsv"] as const;
type Format = (typeof FORMATS)[number];

/** Characters that are gathered before they are written. */
const BUFFERED = 1 << 16;

export class RowWriter {
  readonly #path: string;
  readonly #format: Format;
  readonly #file: Promise<FileHandle>;
  /** Of tables: the columns of the first row. */
  #columns: readonly string[] | null = null;
  #rows = 0;
  /** Not written yet. */
  #held: string[] = [];
  #heldLength = 0;

  /** Throws DataError for an ending that is unknown. @param path ends in .jsonl, .json, .csv or .tsv */
  constructor(path: string) {
    const format = FORMATS.find((each) => path.toLowerCase().endsWith(`.${each}`));
    if (format === undefined)
      throw new DataError(`${path}: rows are written as ${FORMATS.map((each) => `.${each}`).join(", ")}: give the output such an ending`);
    this.#path = path;
    this.#format = format;
    this.#file = open(this.#partial, "w");
    this.#file.catch(() => {}); // told by the first write
  }

  async write(fields: Fields): Promise<void> {
    await this.#put(this.#text(fields));
    this.#rows++;
  }

  /** Completes the file. */
  async end(): Promise<void> {
    if (this.#format === "json") await this.#put(this.#rows === 0 ? "[]\n" : "\n]\n");
    await this.#flush();
    const file = await this.#file;
    await this.#telling(file.sync());
    await file.close();
    await rename(this.#partial, this.#path);
  }

  /** Removes what was written. */
  async abandon(): Promise<void> {
    await this.#file.then((file) => file.close()).catch(() => {});
    await rm(this.#partial, { force: true });
  }

  async #put(text: string): Promise<void> {
    this.#held.push(text);
    this.#heldLength += text.length;
    if (this.#heldLength >= BUFFERED) await this.#flush();
  }

  async #flush(): Promise<void> {
    const text = this.#held.join("");
    [this.#held, this.#heldLength] = [[], 0];
    await this.#telling(this.#file.then((file) => file.writeFile(text)));
  }

  /** Failures name the file. */
  async #telling<T>(done: Promise<T>): Promise<T> {
    try {
      return await done;
    } catch (cause) {
      throw new DataError(`${this.#partial}: the rows cannot be written: ${cause instanceof Error ? cause.message : String(cause)}`, [], {
        cause,
      });
    }
  }

  get #partial(): string {
    return `${this.#path}.partial`;
  }

  #text(fields: Fields): string {
    switch (this.#format) {
      case "jsonl":
        return `${JSON.stringify(fields)}\n`;
      case "json":
        return `${this.#rows === 0 ? "[\n" : ",\n"}${JSON.stringify(fields)}`;
      case "csv":
        return this.#table(fields, (values) => stringify([values]));
      case "tsv":
        return this.#table(fields, (values) => {
          const bad = values.find((value) => /[\t\n\r]/.test(value));
          if (bad !== undefined)
            throw new DataError(`a field has a tab or a line break, which TSV cannot hold: ${shown(bad)}; write .csv or .jsonl`);
          return `${values.join("\t")}\n`;
        });
      default:
        return this.#format satisfies never;
    }
  }

  #table(fields: Fields, line: (values: readonly string[]) => string): string {
    const header = this.#columns === null;
    this.#columns ??= Object.keys(fields);
    const columns = this.#columns;
    const other = Object.keys(fields).find((name) => !columns.includes(name));
    if (other !== undefined) throw new DataError(`a row has the column ${shown(other)}, which the first has not: write .jsonl`);
    const values = columns.map((name) => {
      const value = fields[name] ?? "";
      return typeof value === "object" ? JSON.stringify(value) : String(value);
    });
    return (header ? line(columns) : "") + line(values);
  }
}
