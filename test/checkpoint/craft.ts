/** Builds safetensors files byte by byte, valid or not; independent of the writer under test. */

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll } from "vitest";

export const GOLDENS = fileURLToPath(new URL("../fixtures/goldens/", import.meta.url));

/** An empty folder that is removed after the tests of the file. */
export function scratch(): string {
  const folder = mkdtempSync(join(tmpdir(), "mixtape-checkpoint-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** The bytes of a file with this header text (an object is made JSON) and this much data, of bytes 0, 1, 2, … */
export function craft(header: unknown, dataBytes = 0, claimed?: bigint): Buffer {
  const json = Buffer.isBuffer(header) ? header : Buffer.from(typeof header === "string" ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(claimed ?? BigInt(json.byteLength));
  return Buffer.concat([prefix, json, Buffer.from(Array.from({ length: dataBytes }, (_, i) => i & 255))]);
}

export interface Stored {
  readonly dtype: string;
  readonly shape: readonly number[];
}

const BYTES: Record<string, number> = { F64: 8, I64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, U8: 1, I8: 1 };

/** Writes a valid file that holds these tensors, in this order. */
export function writeTensors(path: string, tensors: Readonly<Record<string, Stored>>, metadata?: Record<string, string>): void {
  const header: Record<string, unknown> = metadata ? { __metadata__: metadata } : {};
  let end = 0;
  for (const [name, { dtype, shape }] of Object.entries(tensors)) {
    const begin = end;
    end += shape.reduce((n, size) => n * size, BYTES[dtype] ?? Number.NaN);
    header[name] = { dtype, shape, data_offsets: [begin, end] };
  }
  writeFileSync(path, craft(header, end));
}

/** The value of a key that must exist. */
export function get<K, V>(map: ReadonlyMap<K, V>, key: K): V {
  const value = map.get(key);
  if (value === undefined) throw new Error(`no ${String(key)} among ${[...map.keys()].join(", ")}`);
  return value;
}
