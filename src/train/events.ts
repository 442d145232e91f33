/** TensorBoard's event files: records of protocol buffers, each with its length and checksums. */
import { closeSync, mkdirSync, openSync, writeSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { crc32c } from "./crc.ts";

/** Writes one event file; every event is in it once `add` has returned. */
export class EventFile {
  readonly path: string;
  readonly #file: number;

  /** @param purge steps from this one on that earlier files of the folder hold are to be forgotten */
  constructor(folder: string, purge: number) {
    mkdirSync(folder, { recursive: true });
    const now = Date.now() / 1000;
    this.path = join(folder, `events.out.tfevents.${Math.floor(now)}.${hostname()}.${process.pid}.${counter++}`);
    this.#file = openSync(this.path, "wx");
    this.#write([double(1, now), bytes(3, Buffer.from("brain.Event:2"))]);
    this.#write([double(1, now), varint(2, purge), bytes(7, varint(1, 1))]); // SessionLog.START
  }

  /** Numbers by tag at a step. */
  add(step: number, values: Readonly<Record<string, number>>): void {
    const summary = Object.entries(values).map(([tag, value]) => bytes(1, Buffer.concat([bytes(1, Buffer.from(tag)), float(2, value)])));
    this.#write([double(1, Date.now() / 1000), varint(2, step), bytes(5, Buffer.concat(summary))]);
  }

  close(): void {
    closeSync(this.#file);
  }

  #write(fields: readonly Buffer[]): void {
    const data = Buffer.concat(fields);
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(data.byteLength));
    writeSync(this.#file, Buffer.concat([length, masked(length), data, masked(data)]));
  }
}

let counter = 0;

/** The checksum of a TFRecord. */
function masked(data: Buffer): Buffer {
  const crc = crc32c(data);
  const out = Buffer.alloc(4);
  out.writeUInt32LE((((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0);
  return out;
}

/** A field of a protocol buffer: key (field << 3 | wire type), then the value. */
function varint(field: number, value: number): Buffer {
  return Buffer.concat([number(field << 3), number(value)]);
}

function bytes(field: number, value: Buffer): Buffer {
  return Buffer.concat([number((field << 3) | 2), number(value.byteLength), value]);
}

function double(field: number, value: number): Buffer {
  const out = Buffer.alloc(8);
  out.writeDoubleLE(value);
  return Buffer.concat([number((field << 3) | 1), out]);
}

function float(field: number, value: number): Buffer {
  const out = Buffer.alloc(4);
  out.writeFloatLE(value);
  return Buffer.concat([number((field << 3) | 5), out]);
}

/** Seven bits a byte, the lowest first. */
function number(value: number): Buffer {
  const out: number[] = [];
  let rest = value;
  do {
    out.push((rest % 128) | (rest >= 128 ? 128 : 0));
    rest = Math.floor(rest / 128);
  } while (rest > 0);
  return Buffer.from(out);
}
