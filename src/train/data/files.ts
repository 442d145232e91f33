/** Finds the files of a data set: a file, a folder, a pattern, or a list of these. Knows their formats by name, not what is in them. */
import { stat } from "node:fs/promises";
import { resolve } from "node:path";
import { DataError } from "./fault.ts";

export const FORMATS = ["jsonl", "json", "csv", "tsv", "parquet", "text"] as const;
export type Format = (typeof FORMATS)[number];

export interface DataFile {
  /** As found from `source`, for messages. */
  readonly path: string;
  readonly format: Format;
  readonly bytes: number;
  /** Milliseconds since 1970. */
  readonly modified: number;
}

const ENDINGS: Readonly<Record<string, Format>> = {
  jsonl: "jsonl",
  ndjson: "jsonl",
  json: "json",
  csv: "csv",
  tsv: "tsv",
  parquet: "parquet",
  txt: "text",
  text: "text",
  md: "text",
};
const PACKED = /\.(gz|zip|zst|bz2|xz|7z|tar)$/i;

/**
 * The files of a source, sorted by path. Of a folder, or of what matches a pattern (`*`, `**`, `?`, `{a,b}`), files of unknown endings are left
 * out, and text files too where there are any of another format. Throws DataError when there are none.
 * @param format of all files; default: by each one's ending
 */
export async function findFiles(source: string | readonly string[], format: Format | null = null): Promise<DataFile[]> {
  const sources = typeof source === "string" ? [source] : source;
  if (sources.length === 0) throw new DataError("no data: the list of files is empty");
  const found = new Map<string, DataFile>();
  for (const each of sources) for (const file of await filesOf(each, format)) found.set(resolve(file.path), file);
  return [...found.values()].sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0));
}

async function filesOf(source: string, format: Format | null): Promise<DataFile[]> {
  const info = await stat(source).catch(() => null);
  if (info?.isFile()) return [describe(source, info, format ?? formatOf(source) ?? unknown(source))];
  const paths = await list(source, info !== null);
  const files: DataFile[] = [];
  for (const path of paths) {
    const known = format ?? formatOf(path);
    const each = known && (await stat(path).catch(() => null));
    if (known && each?.isFile()) files.push(describe(path, each, known));
  }
  const data = files.filter((file) => file.format !== "text");
  const chosen = data.length > 0 ? data : files;
  if (chosen.length > 0) return chosen;
  if (info !== null) throw new DataError(`${source}: the folder has no file that ends in ${endings()}`);
  throw new DataError(
    /[*?{[]/.test(source)
      ? `${source}: no file that ends in ${endings()} matches the pattern`
      : `${source}: there is no such file or folder`,
  );
}

async function list(source: string, isFolder: boolean): Promise<string[]> {
  const { escapePath, glob } = await import("tinyglobby");
  const pattern = isFolder ? `${escapePath(source.replace(/[\\/]+$/, ""))}/**` : source;
  return glob(pattern, { expandDirectories: false, onlyFiles: true, dot: false });
}

function describe(path: string, info: { readonly size: number; readonly mtimeMs: number }, format: Format): DataFile {
  return { path, format, bytes: info.size, modified: info.mtimeMs };
}

function formatOf(path: string): Format | null {
  return ENDINGS[/\.(\w+)$/.exec(path)?.[1].toLowerCase() ?? ""] ?? null;
}

function unknown(path: string): never {
  const what = PACKED.test(path)
    ? "the file is packed: unpack it"
    : `its format cannot be told from its ending (${endings()}): give format`;
  throw new DataError(`${path}: ${what}`);
}

function endings(): string {
  return Object.keys(ENDINGS)
    .map((ending) => `.${ending}`)
    .join(", ");
}
