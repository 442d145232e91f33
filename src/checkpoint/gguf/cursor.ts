/** A position in the header of a GGUF file, and reading values from it. Knows no keys and no tensors. */
import { CheckpointError } from "../error.ts";

/** Codes of value types, in the file's order. */
export const GGUF_TYPES = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"] as const;
export type GgufType = (typeof GGUF_TYPES)[number];

/** Minimum size of a value in bytes. */
export const VALUE_BYTES: Readonly<Record<GgufType, number>> = {
  u8: 1,
  i8: 1,
  u16: 2,
  i16: 2,
  u32: 4,
  i32: 4,
  f32: 4,
  bool: 1,
  string: 8, // at least: its length
  array: 12, // at least: type and count
  u64: 8,
  i64: 8,
  f64: 8,
};
/** Maximum number of elements in a list: a hundred times the largest vocabularies. */
const MAX_COUNT = 2 ** 25;

/** Thrown to ask for more of the file: the header is incomplete. */
export const MORE = Symbol("more");
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** A position in the header; every read is checked against the file's size, then against the bytes read so far. */
export class Cursor {
  offset = 0;
  readonly fileBytes: number;
  private readonly bytes: Buffer;
  private readonly file: string;

  constructor(bytes: Buffer, file: string, fileBytes: number) {
    this.bytes = bytes;
    this.file = file;
    this.fileBytes = fileBytes;
  }

  u32(what: string): number {
    return this.bytes.readUInt32LE(this.take(4, what));
  }

  u64(what: string): number {
    const value = this.bytes.readBigUInt64LE(this.take(8, what));
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw this.fail(`${what}: ${value} is beyond 2^53`);
    return Number(value);
  }

  /** The count of the items that follow, each at least `bytes` long. */
  count(what: string, bytes: number): number {
    const count = this.u64(`the number of ${what}`);
    if (count > (this.fileBytes - this.offset) / bytes) throw this.fail(`${count} ${what} can't be in a file of ${this.fileBytes} bytes`);
    if (count > MAX_COUNT) throw this.fail(`${count} ${what}; the limit is ${MAX_COUNT}`);
    if (count * bytes > this.bytes.byteLength - this.offset) throw MORE;
    return count;
  }

  string(what: string): string {
    const length = this.u64(`the length of ${what}`);
    const start = this.take(length, what);
    try {
      return UTF8.decode(this.bytes.subarray(start, start + length));
    } catch (cause) {
      throw new CheckpointError(this.file, `bad header: ${quote(what)} at byte ${start} is not UTF-8`, { cause });
    }
  }

  type(key: string): GgufType {
    const code = this.u32(`the type of ${key}`);
    const type = GGUF_TYPES[code];
    if (type === undefined) throw this.fail(`${quote(key)} has the unknown type ${code}`);
    return type;
  }

  scalar(type: Exclude<GgufType, "array">, key: string): number | string | boolean {
    if (type === "string") return this.string(key);
    const start = this.take(VALUE_BYTES[type], key);
    switch (type) {
      case "u8":
        return this.bytes.readUInt8(start);
      case "i8":
        return this.bytes.readInt8(start);
      case "u16":
        return this.bytes.readUInt16LE(start);
      case "i16":
        return this.bytes.readInt16LE(start);
      case "u32":
        return this.bytes.readUInt32LE(start);
      case "i32":
        return this.bytes.readInt32LE(start);
      case "f32":
        return this.bytes.readFloatLE(start);
      case "f64":
        return this.bytes.readDoubleLE(start);
      case "u64":
        return Number(this.bytes.readBigUInt64LE(start)); // hashes and seeds may exceed 2^53; sizes are checked where used
      case "i64":
        return Number(this.bytes.readBigInt64LE(start));
      case "bool": {
        const value = this.bytes.readUInt8(start);
        if (value > 1) throw this.fail(`${quote(key)} is neither true nor false: ${value}`);
        return value === 1;
      }
      default:
        return type satisfies never;
    }
  }

  fail(what: string): CheckpointError {
    return new CheckpointError(this.file, `bad header: ${what.length > 300 ? `${what.slice(0, 300)}…` : what}`);
  }

  /** The start of the next `count` bytes. */
  private take(count: number, what: string): number {
    const start = this.offset;
    if (count > this.fileBytes - start)
      throw this.fail(`${quote(what)} reaches beyond the end of the file: truncated or damaged, fetch it again`);
    if (count > this.bytes.byteLength - start) throw MORE;
    this.offset += count;
    return start;
  }
}

/** A value from a file for a one-line error: JSON, cut at 100 characters. */
export function quote(value: unknown): string {
  const text = JSON.stringify(value) ?? "undefined";
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}
