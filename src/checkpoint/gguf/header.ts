/**
 * Reads the header of a GGUF file (versions 2 and 3, little-endian): typed key-values, then the position of each tensor. As
 * strict as llama.cpp: tensors follow each other with no gaps except alignment. Sizes claimed by the file are checked against
 * its real size before anything is allocated. Knows no model.
 */
import { PACK, PACK_BYTES } from "../../tensor/stored.ts";
import { CheckpointError } from "../error.ts";
import { readExactly, withFile } from "../file.ts";
import { Cursor, MORE, quote, VALUE_BYTES } from "./cursor.ts";

/** Numbers, strings, booleans, and lists of one type of them. */
export type GgufValue = number | string | boolean | GgufList;
export type GgufList = Float32Array | readonly number[] | readonly string[] | readonly boolean[];

/** Formats of GGUF tensors that are read and written. */
export type GgufFormat = "f32" | "f16" | "bf16" | "q8_0" | "q4_0";

/** File codes of the formats, and elements and bytes of a block. */
export const GGUF_FORMATS: Readonly<Record<GgufFormat, { readonly code: number; readonly numbers: number; readonly bytes: number }>> = {
  f32: { code: 0, numbers: 1, bytes: 4 },
  f16: { code: 1, numbers: 1, bytes: 2 },
  bf16: { code: 30, numbers: 1, bytes: 2 },
  q8_0: { code: 8, numbers: PACK, bytes: PACK_BYTES.q8_0 },
  q4_0: { code: 2, numbers: PACK, bytes: PACK_BYTES.q4_0 },
};

export interface GgufTensor {
  readonly name: string;
  readonly format: GgufFormat;
  /** Outermost first, as everywhere in mixtape; the file has the innermost first. */
  readonly shape: readonly number[];
  /** Bytes from the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

export interface GgufHead {
  readonly version: number;
  readonly values: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

export const GGUF_MAGIC = 0x46554747; // "GGUF"
export const GGUF_ALIGNMENT = 32;

/** Names of unsupported formats, for errors. */
const OTHERS =
  "3 Q4_1,6 Q5_0,7 Q5_1,9 Q8_1,10 Q2_K,11 Q3_K,12 Q4_K,13 Q5_K,14 Q6_K,15 Q8_K,16 IQ2_XXS,17 IQ2_XS,18 IQ3_XXS,19 IQ1_S,\
20 IQ4_NL,21 IQ3_S,22 IQ2_S,23 IQ4_XS,24 I8,25 I16,26 I32,27 I64,28 F64,29 IQ1_M,34 TQ1_0,35 TQ2_0,39 MXFP4";
const NAMES = new Map(OTHERS.split(",").map((each) => each.split(" ") as [string, string]));
const FIRST_READ_BYTES = 2 ** 20;
/** Longest header that is read: ten times the vocabulary of the largest models. */
const MAX_HEAD_BYTES = 2 ** 28;
const MAX_ALIGNMENT = 2 ** 20;

/**
 * Reads and checks the header of a GGUF file.
 * @param file absolute path
 * @throws CheckpointError for a file that can't be read, is truncated, or is not strictly of the format
 */
export function readGguf(file: string): Promise<GgufHead> {
  return withFile(file, async (handle) => {
    const stat = await handle.stat();
    if (!stat.isFile()) throw new CheckpointError(file, "not a file");
    const limit = Math.min(stat.size, MAX_HEAD_BYTES);
    for (let size = Math.min(FIRST_READ_BYTES, limit); ; size = Math.min(size * 4, limit)) {
      const head = parseGguf(await readExactly(handle, file, 0, size), file, stat.size);
      if (head) return head;
      if (size === limit) throw new CheckpointError(file, `its header is longer than ${limit} bytes: damaged, fetch it again`);
    }
  });
}

/**
 * Parses the header of a GGUF file.
 * @param bytes the beginning of the file
 * @param file absolute path, for errors
 * @param fileBytes size of the whole file
 * @returns undefined when the header is longer than `bytes`
 * @throws CheckpointError for anything that is not strictly of the format
 */
export function parseGguf(bytes: Buffer, file: string, fileBytes: number): GgufHead | undefined {
  try {
    return parse(new Cursor(bytes, file, fileBytes));
  } catch (error) {
    if (error === MORE) return undefined;
    throw error;
  }
}

function parse(at: Cursor): GgufHead {
  if (at.fileBytes < 24) throw at.fail(`truncated: ${at.fileBytes} bytes, a GGUF file has at least 24; fetch it again`);
  if (at.u32("magic") !== GGUF_MAGIC) throw at.fail("it does not start with GGUF; not a GGUF file");
  const version = at.u32("version");
  if (version !== 0 && (version & 0xffff) === 0) throw at.fail("a big-endian GGUF file; only little-endian ones are read");
  if (version !== 2 && version !== 3) throw at.fail(`GGUF version ${version}; versions 2 and 3 are read`);
  const tensorCount = at.count("tensors", 8 + 4 + 8 + 4 + 8);
  const valueCount = at.count("key-values", 8 + 4 + 1);

  const values = new Map<string, GgufValue>();
  for (let i = 0; i < valueCount; i++) {
    const key = at.string("a key");
    if (key === "" || values.has(key)) throw at.fail(`the key ${quote(key)} ${key === "" ? "is empty" : "occurs twice"}`);
    values.set(key, readValue(at, key));
  }
  const alignment = values.get("general.alignment") ?? GGUF_ALIGNMENT;
  if (typeof alignment !== "number" || alignment < 1 || alignment > MAX_ALIGNMENT || !Number.isInteger(Math.log2(alignment)))
    throw at.fail(`general.alignment is ${quote(alignment)}: not a power of two up to ${MAX_ALIGNMENT}`);

  const found: GgufTensor[] = [];
  for (let i = 0; i < tensorCount; i++) found.push(readTensor(at));
  const start = Math.ceil(at.offset / alignment) * alignment;
  const tensors = new Map<string, GgufTensor>();
  let end = 0; // of the tensors so far, from `start`
  for (const tensor of found) {
    const { name, offset, bytes } = tensor;
    if (tensors.has(name)) throw at.fail(`tensor ${quote(name)} occurs twice`);
    if (offset !== end) throw at.fail(`tensor ${quote(name)} starts at ${offset} of the data, not at ${end} where the one before it ends`);
    if (start + offset + bytes > at.fileBytes) {
      throw at.fail(
        `tensor ${quote(name)} reaches to byte ${start + offset + bytes}, the file has ${at.fileBytes}: truncated, fetch it again`,
      );
    }
    end = Math.ceil((offset + bytes) / alignment) * alignment;
    tensors.set(name, { ...tensor, offset: start + offset });
  }
  if (start + end < at.fileBytes)
    throw at.fail(`${at.fileBytes - start - end} bytes after the last tensor; not a whole GGUF file, fetch it again`);
  return { version, values, tensors };
}

function readTensor(at: Cursor): GgufTensor {
  const name = at.string("a tensor's name");
  const rank = at.u32(`the rank of ${name}`);
  if (rank < 1 || rank > 4) throw at.fail(`tensor ${quote(name)} has ${rank} dimensions; 1 to 4 are possible`);
  const shape = Array.from({ length: rank }, () => at.u64(`the shape of ${name}`)).reverse();
  const code = at.u32(`the format of ${name}`);
  const offset = at.u64(`the offset of ${name}`);
  const format = (Object.keys(GGUF_FORMATS) as GgufFormat[]).find((each) => GGUF_FORMATS[each].code === code);
  if (!format) {
    throw at.fail(
      `tensor ${quote(name)} is stored as ${NAMES.get(String(code)) ?? `format ${code}`}; F32, F16, BF16, Q8_0 and Q4_0 are read`,
    );
  }
  const { numbers, bytes } = GGUF_FORMATS[format];
  const elements = shape.reduce((product, n) => product * n, 1);
  const size = (elements / numbers) * bytes;
  if (shape.some((n) => n < 1) || !Number.isSafeInteger(elements) || !Number.isSafeInteger(size) || (shape.at(-1) ?? 0) % numbers !== 0)
    throw at.fail(`tensor ${quote(name)} has the shape [${shape.join(", ")}], which ${format} can't have`);
  return { name, format, shape, offset, bytes: size };
}

function readValue(at: Cursor, key: string): GgufValue {
  const type = at.type(key);
  if (type !== "array") return at.scalar(type, key);
  const element = at.type(key);
  if (element === "array") throw at.fail(`${quote(key)} is a list of lists, which is not supported`);
  const count = at.count(`elements of ${key}`, VALUE_BYTES[element]);
  if (element === "f32") {
    const list = new Float32Array(count);
    for (let i = 0; i < count; i++) list[i] = at.scalar("f32", key) as number;
    return list;
  }
  const list: (number | string | boolean)[] = [];
  for (let i = 0; i < count; i++) list.push(at.scalar(element, key));
  return list as number[] | string[] | boolean[];
}
