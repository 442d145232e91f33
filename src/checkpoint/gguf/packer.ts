/**
 * Writes a GGUF file (version 3), part by part: header first, then the bytes, under a temporary name that is renamed at the end,
 * so that readers see the complete file or none. Knows no model and no quantization.
 */
import { resolve } from "node:path";
import { CheckpointError } from "../error.ts";
import { produced, writeAll, writeWhole } from "../stream.ts";
import { GGUF_TYPES, type GgufType } from "./cursor.ts";
import { GGUF_ALIGNMENT, GGUF_FORMATS, GGUF_MAGIC, type GgufFormat } from "./header.ts";
import type { GgufEntry } from "./metadata.ts";

/** One tensor to write. */
export interface GgufTensorData {
  readonly name: string;
  readonly format: GgufFormat;
  /** Outermost first. */
  readonly shape: readonly number[];
  /** Produce the bytes in equal parts, one per stacked expert. Each is called once, when its turn comes. */
  readonly parts: readonly (() => Promise<Uint8Array>)[];
}

export interface GgufWriteOptions {
  /** How many parts are produced, and held in memory, at once. Default 1. */
  readonly concurrency?: number;
  /** Called when a tensor's bytes have been written. */
  readonly onWritten?: (name: string, bytes: number) => void;
}

/**
 * @throws CheckpointError for a tensor that the format can't hold, a part of the wrong size, or a full disk. Nothing is left
 * behind then, and a file already at `path` stays unchanged. Errors of parts pass through.
 */
export async function writeGguf(
  path: string,
  entries: readonly GgufEntry[],
  tensors: readonly GgufTensorData[],
  { concurrency = 1, onWritten }: GgufWriteOptions = {},
): Promise<void> {
  const file = resolve(path);
  const sizes = tensors.map((tensor) => ggufBytes(file, tensor));
  const head = makeHead(file, entries, tensors, sizes);
  const total = sizes.reduce((sum, bytes) => sum + aligned(bytes), head.byteLength);
  const makers = tensors.flatMap((tensor) => tensor.parts);
  await writeWhole(file, total, false, async (target) => {
    await writeAll(target, head, file, total);
    const made = produced(makers, concurrency);
    try {
      for (const [i, { name, parts }] of tensors.entries()) {
        for (const k of parts.keys()) {
          const data: Uint8Array = (await made.next()).value;
          if (data.byteLength * parts.length !== sizes[i])
            throw new CheckpointError(file, `tensor ${name}: part ${k} has ${data.byteLength} bytes, all ${parts.length} take ${sizes[i]}`);
          await writeAll(target, data, file, total);
        }
        await writeAll(target, new Uint8Array(aligned(sizes[i]) - sizes[i]), file, total);
        onWritten?.(name, sizes[i]);
      }
    } finally {
      await made.return(undefined);
    }
  });
}

/** Bytes of a tensor in the file, without padding. */
export function ggufBytes(file: string, { name, format, shape }: Pick<GgufTensorData, "name" | "format" | "shape">): number {
  const { numbers, bytes } = GGUF_FORMATS[format];
  const elements = shape.reduce((product, n) => product * n, 1);
  const fits =
    shape.length >= 1 && shape.length <= 4 && (shape.at(-1) ?? 0) % numbers === 0 && elements > 0 && Number.isSafeInteger(elements);
  if (!fits) throw new CheckpointError(file, `tensor ${name} [${shape.join(", ")}] can't be stored as ${format}`);
  return (elements / numbers) * bytes;
}

function makeHead(file: string, entries: readonly GgufEntry[], tensors: readonly GgufTensorData[], sizes: readonly number[]): Buffer {
  const parts: Buffer[] = [];
  const u32 = (value: number) => number("u32", value, parts);
  const u64 = (value: number) => number("u64", value, parts);
  const string = (text: string) => {
    const bytes = Buffer.from(text, "utf8");
    u64(bytes.byteLength);
    parts.push(bytes);
  };
  u32(GGUF_MAGIC);
  u32(3);
  u64(tensors.length);
  u64(entries.length);
  const seen = new Set<string>();
  const once = (name: string) => {
    if (seen.has(name)) throw new CheckpointError(file, `internal: ${name} would be there twice`);
    seen.add(name);
    string(name);
  };
  for (const [key, type, value] of entries) {
    once(key);
    switch (type) {
      case "u32":
      case "f32":
      case "bool":
        u32(GGUF_TYPES.indexOf(type));
        number(type, Number(value), parts);
        break;
      case "string":
        u32(GGUF_TYPES.indexOf("string"));
        string(value);
        break;
      case "strings":
        list("string", value.length);
        for (const text of value) string(text);
        break;
      case "f32s":
      case "i32s": {
        list(type === "f32s" ? "f32" : "i32", value.length);
        const bytes = Buffer.alloc(value.length * 4);
        for (let i = 0; i < value.length; i++) type === "f32s" ? bytes.writeFloatLE(value[i], i * 4) : bytes.writeInt32LE(value[i], i * 4);
        parts.push(bytes);
        break;
      }
      default:
        return type satisfies never;
    }
  }
  function list(type: GgufType, count: number): void {
    u32(GGUF_TYPES.indexOf("array"));
    u32(GGUF_TYPES.indexOf(type));
    u64(count);
  }
  let offset = 0;
  for (const [i, { name, format, shape }] of tensors.entries()) {
    once(name);
    u32(shape.length);
    for (const n of [...shape].reverse()) u64(n);
    u32(GGUF_FORMATS[format].code);
    u64(offset);
    offset += aligned(sizes[i]);
  }
  const length = parts.reduce((sum, part) => sum + part.byteLength, 0);
  return Buffer.concat(parts, aligned(length)); // the padding is zero
}

function number(type: "u32" | "u64" | "f32" | "bool", value: number, out: Buffer[]): void {
  const bytes = Buffer.alloc(type === "bool" ? 1 : type === "u64" ? 8 : 4);
  if (type === "u32") bytes.writeUInt32LE(value);
  else if (type === "u64") bytes.writeBigUInt64LE(BigInt(value));
  else if (type === "f32") bytes.writeFloatLE(value);
  else bytes.writeUInt8(value);
  out.push(bytes);
}

function aligned(bytes: number): number {
  return Math.ceil(bytes / GGUF_ALIGNMENT) * GGUF_ALIGNMENT;
}
