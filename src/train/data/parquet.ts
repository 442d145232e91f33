/** Reads Parquet files by groups of rows, a few of which are kept. Knows nothing of what a row says. */
import { type AsyncBuffer, type FileMetaData, parquetMetadataAsync, parquetReadObjects } from "hyparquet";
import { compressors } from "hyparquet-compressors";
import { DataError, RowError } from "./fault.ts";
import type { DataFile } from "./files.ts";
import type { Handles } from "./handles.ts";
import type { Fields, Passed, Place, Table } from "./table.ts";

/** Bytes of a group of rows, uncompressed: it is read as a whole. */
const MOST_GROUP_BYTES = 512 * 1024 ** 2;
/** Bytes of the groups that are kept, uncompressed; at least one group is. */
const KEPT_BYTES = 128 * 1024 ** 2;

/** Groups that have been read, of all files of a data set; the ones unused for longest are dropped. */
export class Groups {
  readonly #kept = new Map<string, { readonly rows: Promise<Fields[]>; readonly bytes: number }>();
  #bytes = 0;
  #complete = true;

  /** Nothing was dropped yet: all groups that were ever read are kept. */
  get complete(): boolean {
    return this.#complete;
  }

  get(key: string, bytes: number, read: () => Promise<Fields[]>): Promise<Fields[]> {
    const known = this.#kept.get(key);
    if (known) this.#kept.delete(key);
    else this.#bytes += bytes;
    const { rows } = known ?? { rows: read() };
    this.#kept.set(key, { rows, bytes });
    for (const [oldest, { bytes: freed }] of this.#kept) {
      if (this.#bytes <= KEPT_BYTES || oldest === key) break;
      this.#kept.delete(oldest);
      this.#bytes -= freed;
      this.#complete = false;
    }
    return rows;
  }
}

/** Opens a file. Throws DataError for one that is no Parquet, or has groups of rows too large to read. */
export async function openParquet(file: DataFile, maxRowBytes: number, handles: Handles, groups: Groups): Promise<Table> {
  const { path, bytes: byteLength } = file;
  const buffer: AsyncBuffer = {
    byteLength,
    async slice(start, end = byteLength) {
      const { buffer, byteOffset } = await handles.read(path, start, end - start);
      return buffer.slice(byteOffset, byteOffset + end - start) as ArrayBuffer;
    },
  };
  const metadata = await parquetMetadataAsync(buffer).catch((cause) => {
    throw new DataError(`${path}: not a Parquet file that can be read: ${reason(cause)}`, [], { cause });
  });
  const large = metadata.row_groups.findIndex((group) => group.total_byte_size > MOST_GROUP_BYTES);
  if (large >= 0)
    throw new DataError(
      `${path}: row group ${large} has ${metadata.row_groups[large].total_byte_size} bytes, and is read as a whole; at most ${MOST_GROUP_BYTES} are read: write the file again with fewer rows a group`,
    );
  return new ParquetTable(path, buffer, metadata, maxRowBytes, groups);
}

class ParquetTable implements Table {
  readonly unit = "row";
  readonly isTable = true;
  readonly groups: readonly number[];
  readonly #path: string;
  readonly #buffer: AsyncBuffer;
  readonly #metadata: FileMetaData;
  readonly #rows: number;
  readonly #maxRowBytes: number;
  readonly #kept: Groups;

  constructor(path: string, buffer: AsyncBuffer, metadata: FileMetaData, maxRowBytes: number, groups: Groups) {
    this.#path = path;
    this.#buffer = buffer;
    this.#metadata = metadata;
    this.#maxRowBytes = maxRowBytes;
    this.#kept = groups;
    let rows = 0;
    this.groups = metadata.row_groups.map((group) => {
      rows += Number(group.num_rows);
      return rows - Number(group.num_rows);
    });
    this.#rows = rows;
  }

  async *pass(): AsyncGenerator<Passed> {
    for (const [g, start] of this.groups.entries())
      for (const [i, fields] of (await this.#group(g)).entries()) {
        const place = { offset: start + i, length: 1, line: start + i + 1 };
        const bytes = sizeOf(fields);
        if (bytes <= this.#maxRowBytes) yield { place, fields };
        else yield { place, reason: `the row has about ${bytes} bytes; max_row_bytes allows ${this.#maxRowBytes}` };
      }
  }

  async read({ offset }: Place): Promise<Fields> {
    const g = this.groups.findLastIndex((start) => start <= offset);
    const row = (await this.#group(g))[offset - this.groups[g]];
    if (row === undefined) throw new RowError("the file has fewer rows than when it was indexed");
    return row;
  }

  #group(g: number): Promise<Fields[]> {
    const [rowStart, rowEnd] = [this.groups[g], this.groups[g + 1] ?? this.#rows];
    const read = async () => {
      try {
        return (await parquetReadObjects({ file: this.#buffer, metadata: this.#metadata, compressors, rowStart, rowEnd })).map(plain);
      } catch (cause) {
        throw new DataError(`${this.#path}: rows ${rowStart + 1} to ${rowEnd} cannot be read: ${reason(cause)}`, [], { cause });
      }
    };
    return this.#kept.get(`${g} ${this.#path}`, Number(this.#metadata.row_groups[g].total_byte_size), read);
  }
}

/** The row with whole numbers as numbers: Parquet's 64-bit integers are read as bigints. */
function plain(row: Fields): Fields {
  return plainValue(row) as Fields;
}

function plainValue(value: unknown): unknown {
  if (typeof value === "bigint") return Number.isSafeInteger(Number(value)) ? Number(value) : String(value);
  if (Array.isArray(value)) return value.map(plainValue);
  if (typeof value !== "object" || value === null || value instanceof Date || ArrayBuffer.isView(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plainValue(each)]));
}

/** Bytes of a row's texts and numbers. */
function sizeOf(value: unknown): number {
  if (typeof value === "string") return Buffer.byteLength(value);
  if (ArrayBuffer.isView(value)) return value.byteLength;
  if (Array.isArray(value)) return value.reduce((sum: number, each) => sum + sizeOf(each), 0);
  if (typeof value === "object" && value !== null) return Object.values(value).reduce((sum: number, each) => sum + sizeOf(each), 0);
  return 8;
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}
