/**
 * Reads the safetensors format: an 8-byte length, a JSON header, then the tensors' bytes without gaps.
 * As strict as the official parser, except that 33.0 is accepted for 33. Sizes claimed by a file are checked against its real size
 * before anything is allocated. Knows no model and no index of shards.
 */
import { resolve } from "node:path";
import { CheckpointError, errorText } from "./error.ts";
import { readExactly, withFile } from "./file.ts";

/** Bits of one element of each dtype of the format. */
export const STORED_BITS = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
} as const satisfies Record<string, number>;

/** A dtype as spelled in safetensors files. */
export type StoredDtype = keyof typeof STORED_BITS;

/** A run of bytes in a file. */
export interface Slice {
  /** Absolute path. */
  readonly file: string;
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** One tensor of a file: its type, shape and position. */
export interface TensorEntry extends Slice {
  readonly name: string;
  readonly dtype: StoredDtype;
  readonly shape: readonly number[];
}

export interface SafetensorsHeader {
  /** The file's `__metadata__`; empty if there is none. Has no prototype, so any key is safe. */
  readonly metadata: Readonly<Record<string, string>>;
  /** By name, in the order of their bytes in the file. */
  readonly tensors: Map<string, TensorEntry>;
}

/** Longest header that is read, in bytes: the official parser's limit. */
export const MAX_HEADER_BYTES = 100_000_000;
/** Bytes before the JSON header: its length, unsigned, little-endian. */
export const PREFIX_BYTES = 8;

/**
 * Reads and checks the header of a safetensors file.
 * @throws CheckpointError for a file that can't be read, is truncated, or is not strictly of the format
 */
export async function readHeader(path: string): Promise<SafetensorsHeader> {
  const file = resolve(path);
  return withFile(file, async (handle) => {
    const stat = await handle.stat();
    if (!stat.isFile()) throw new CheckpointError(file, "not a file");
    if (stat.size < PREFIX_BYTES) {
      throw new CheckpointError(file, `truncated: ${stat.size} bytes, a safetensors file has at least ${PREFIX_BYTES}; fetch it again`);
    }
    const claimed = (await readExactly(handle, file, 0, PREFIX_BYTES)).readBigUInt64LE();
    if (claimed > BigInt(MAX_HEADER_BYTES)) {
      throw new CheckpointError(file, `bad header length: ${claimed} bytes, the limit is ${MAX_HEADER_BYTES}; not a safetensors file`);
    }
    const headerBytes = Number(claimed);
    if (headerBytes > stat.size - PREFIX_BYTES) {
      throw new CheckpointError(file, `bad header length: ${headerBytes} bytes, the file has ${stat.size}; truncated or not safetensors`);
    }
    const bytes = await readExactly(handle, file, PREFIX_BYTES, headerBytes);
    return parseHeader(bytes, file, stat.size);
  });
}

/**
 * Parses the JSON header of a safetensors file.
 * @param bytes the header alone, without the 8 bytes before it
 * @param file absolute path, for entries and errors
 * @param fileBytes size of the whole file
 * @throws CheckpointError for anything that is not strictly of the format
 */
export function parseHeader(bytes: Uint8Array, file: string, fileBytes: number): SafetensorsHeader {
  const header = parseJson(bytes, file);
  const dataStart = PREFIX_BYTES + bytes.byteLength;
  const dataBytes = fileBytes - dataStart;
  const entries: TensorEntry[] = [];
  let metadata: Record<string, string> = Object.create(null);
  for (const [name, value] of Object.entries(header)) {
    if (name === "__metadata__") metadata = parseMetadata(value, file);
    else entries.push(parseEntry(name, value, file, dataStart, dataBytes));
  }
  entries.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  let end = dataStart;
  for (const entry of entries) {
    if (entry.offset !== end) {
      const fault = entry.offset < end ? "overlaps the tensor before it" : `leaves ${entry.offset - end} bytes before it unused`;
      throw new CheckpointError(file, `bad header: tensor ${quote(entry.name)} ${fault}`);
    }
    end += entry.bytes;
  }
  if (end !== fileBytes) {
    throw new CheckpointError(file, `${fileBytes - end} bytes after the last tensor; not a whole safetensors file, fetch it again`);
  }
  return { metadata, tensors: new Map(entries.map((entry) => [entry.name, entry])) };
}

/**
 * Reads the bytes of a tensor or any slice into memory.
 * @throws CheckpointError if the file can't be read or has become shorter than the slice
 */
export async function readTensor(entry: Slice): Promise<Buffer> {
  return withFile(entry.file, async (handle) => {
    const { size } = await handle.stat();
    if (entry.offset + entry.bytes > size) {
      throw new CheckpointError(
        entry.file,
        `truncated: bytes ${entry.offset} to ${entry.offset + entry.bytes} asked for, the file has ${size}`,
      );
    }
    return readExactly(handle, entry.file, entry.offset, entry.bytes);
  });
}

/**
 * Bytes of a tensor of this dtype and shape.
 * @returns `undefined` if the count overflows 2^53 or is not a whole number of bytes
 */
export function storedBytes(dtype: StoredDtype, shape: readonly number[]): number | undefined {
  let elements = 1;
  for (const size of shape) {
    elements *= size;
    if (!Number.isSafeInteger(elements)) return undefined;
  }
  const bits = elements * STORED_BITS[dtype];
  return Number.isSafeInteger(bits) && bits % 8 === 0 ? bits / 8 : undefined;
}

function parseJson(bytes: Uint8Array, file: string): Record<string, unknown> {
  if (bytes[0] !== 0x7b) throw new CheckpointError(file, "bad header: it does not start with {; not a safetensors file");
  let text: string;
  let value: unknown;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    value = JSON.parse(text);
  } catch (cause) {
    throw new CheckpointError(file, `bad header: not UTF-8 JSON (${errorText(cause)})`, { cause });
  }
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) throw new CheckpointError(file, `bad header: the key ${quote(duplicate)} occurs twice`);
  return value as Record<string, unknown>; // it starts with {, so it is an object
}

/** The first key that occurs twice in one object of a valid JSON text: `JSON.parse` would silently keep the last. */
function duplicateKey(text: string): string | undefined {
  const open: Set<string>[] = [];
  let last = "";
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"|[{}:]/g)) {
    if (token === "{") open.push(new Set());
    else if (token === "}") open.pop();
    else if (token === ":") {
      const key: string = last.includes("\\") ? JSON.parse(last) : last.slice(1, -1);
      const keys = open.at(-1);
      if (keys?.has(key)) return key;
      keys?.add(key);
    } else last = token;
  }
  return undefined;
}

function parseMetadata(value: unknown, file: string): Record<string, string> {
  if (!isObject(value)) throw new CheckpointError(file, "bad header: __metadata__ is not an object");
  const metadata: Record<string, string> = Object.create(null);
  for (const [key, text] of Object.entries(value)) {
    if (typeof text !== "string") throw new CheckpointError(file, `bad header: __metadata__ ${quote(key)} is not a string`);
    metadata[key] = text;
  }
  return metadata;
}

function parseEntry(name: string, value: unknown, file: string, dataStart: number, dataBytes: number): TensorEntry {
  const fail = (what: string) => new CheckpointError(file, `bad header: tensor ${quote(name)} ${what}`);
  if (!isObject(value)) throw fail("is not described by an object");
  const { dtype, shape, data_offsets: offsets } = value;
  if (typeof dtype !== "string" || !isStoredDtype(dtype)) throw fail(`has the unknown dtype ${quote(dtype)}`);
  if (!isCounts(shape)) throw fail(`has the bad shape ${quote(shape)}`);
  if (!isCounts(offsets) || offsets.length !== 2) throw fail(`has bad data_offsets ${quote(offsets)}`);
  const [begin, end] = offsets as readonly [number, number];
  if (begin > end) throw fail(`ends before it begins: data_offsets ${quote(offsets)}`);
  if (end > dataBytes) {
    throw fail(`claims bytes up to ${end}, the file has ${dataBytes} bytes of tensors: truncated or damaged, fetch it again`);
  }
  const bytes = storedBytes(dtype, shape);
  if (bytes !== end - begin) {
    throw fail(`has ${end - begin} bytes, ${dtype} ${quote(shape)} takes ${bytes ?? "no whole count that fits"}`);
  }
  return { name, dtype, shape, file, offset: dataStart + begin, bytes };
}

function isStoredDtype(dtype: string): dtype is StoredDtype {
  return Object.hasOwn(STORED_BITS, dtype);
}

function isCounts(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0 && !Object.is(n, -0));
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A value from a file for a one-line error: JSON, cut at 100 characters. */
function quote(value: unknown): string {
  const text = JSON.stringify(value) ?? "undefined";
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}
