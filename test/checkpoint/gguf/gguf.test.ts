/** Headers of GGUF files: valid, invalid, and randomly damaged. */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, expect, test } from "vitest";
import { openCheckpoint } from "../../../src/checkpoint/checkpoint.ts";
import { CheckpointError } from "../../../src/checkpoint/error.ts";
import { parseGguf, readGguf } from "../../../src/checkpoint/gguf/header.ts";
import { ggufName, hubName } from "../../../src/checkpoint/gguf/layout.ts";
import { ggufFile } from "../../../src/checkpoint/gguf/locate.ts";
import type { GgufEntry } from "../../../src/checkpoint/gguf/metadata.ts";
import { type GgufTensorData, writeGguf } from "../../../src/checkpoint/gguf/packer.ts";
import { get, scratch } from "../craft.ts";

const folder = scratch();
const ENTRIES: readonly GgufEntry[] = [
  ["general.architecture", "string", "ernie4_5"],
  ["a.number", "u32", 7],
  ["a.share", "f32", 0.5],
  ["a.flag", "bool", true],
  ["some.texts", "strings", ["", "▁the", "😀"]],
  ["some.scores", "f32s", [0, -1.5, -3]],
  ["some.types", "i32s", [1, -2, 3]],
];
const bytes = (length: number, first: number) => async () => new Uint8Array(length).fill(first);
const TENSORS: readonly GgufTensorData[] = [
  { name: "plain", format: "f32", shape: [3], parts: [bytes(12, 1)] },
  { name: "stacked", format: "q8_0", shape: [2, 3, 64], parts: [bytes(3 * 68, 2), bytes(3 * 68, 3)] },
  { name: "half", format: "bf16", shape: [5, 3], parts: [bytes(30, 4)] },
];
let file: string;
let whole: Buffer;

beforeAll(async () => {
  file = join(folder, "whole.gguf");
  await writeGguf(file, ENTRIES, TENSORS, { concurrency: 3 });
  whole = readFileSync(file);
});

test("reads what is written: values with their types, tensors outermost first", async () => {
  const { version, values, tensors } = await readGguf(file);
  expect(version).toBe(3);
  expect([...values.keys()]).toEqual(ENTRIES.map(([key]) => key));
  expect(values.get("some.texts")).toEqual(["", "▁the", "😀"]);
  expect(values.get("some.scores")).toEqual(new Float32Array([0, -1.5, -3]));
  expect(values.get("some.types")).toEqual([1, -2, 3]);
  expect([values.get("a.number"), values.get("a.share"), values.get("a.flag")]).toEqual([7, 0.5, true]);
  for (const { name, format, shape } of TENSORS) expect(get(tensors, name)).toMatchObject({ name, format, shape });
  const stacked = get(tensors, "stacked");
  expect(stacked.offset % 32).toBe(0);
  expect([whole[stacked.offset], whole[stacked.offset + 3 * 68], whole[stacked.offset + stacked.bytes - 1]]).toEqual([2, 3, 3]);
});

test("asks for more if the header is incomplete, and throws if the file is truncated", () => {
  const start = Math.min(...[...(parseGguf(whole, "f", whole.byteLength)?.tensors.values() ?? [])].map((t) => t.offset));
  for (let length = 24; length < start - 32; length += 7) {
    expect(parseGguf(whole.subarray(0, length), "f", whole.byteLength)).toBeUndefined();
    expect(() => parseGguf(whole.subarray(0, length), "f", length)).toThrow(CheckpointError);
  }
  expect(() => parseGguf(whole, "f", whole.byteLength - 32)).toThrow(/truncated/);
  expect(() => parseGguf(whole, "f", whole.byteLength + 1)).toThrow(/1 bytes after the last tensor/);
});

test.each([
  ["another magic", 0, 0x46554748, /not a GGUF file/],
  ["version 1", 4, 1, /GGUF version 1; versions 2 and 3/],
  ["big-endian", 4, 0x03000000, /big-endian/],
  ["too many tensors", 8, 0xffffffff, /4294967295 tensors can't be in a file/],
  ["too many keys", 16, 0xffffff, /16777215 key-values can't be in a file/],
  ["a key without end", 24, 0x7fffffff, /beyond the end of the file/],
])("refuses %s", (_, at, value, message) => {
  const damaged = Buffer.from(whole);
  damaged.writeUInt32LE(value, at);
  expect(() => parseGguf(damaged, "f", damaged.byteLength)).toThrow(message);
});

test("names an unsupported format", () => {
  const damaged = Buffer.from(whole);
  const at = damaged.indexOf("plain") + 5 + 4 + 8;
  damaged.writeUInt32LE(12, at);
  expect(() => parseGguf(damaged, "f", damaged.byteLength)).toThrow(
    'f: bad header: tensor "plain" is stored as Q4_K; F32, F16, BF16, Q8_0 and Q4_0 are read',
  );
});

test("10,000 damaged headers: each is read or rejected in one line", () => {
  let seed = 1;
  const random = (n: number) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((seed / 2 ** 32) * n);
  };
  let refused = 0;
  for (let i = 0; i < 10_000; i++) {
    let damaged = Buffer.from(whole);
    for (let k = random(4); k >= 0; k--) {
      const at = random(damaged.byteLength);
      if (random(8) === 0)
        damaged = Buffer.concat([damaged.subarray(0, at), damaged.subarray(Math.min(at + random(40), damaged.byteLength))]);
      else if (random(4) === 0) damaged.fill([0, 0xff, 0x80, 0x7f][random(4)], at, Math.min(at + random(9), damaged.byteLength));
      else if (damaged.byteLength > 0) damaged[at] ^= 1 << random(8);
    }
    try {
      const head = parseGguf(damaged, "/f", damaged.byteLength);
      for (const { offset, bytes: size } of head?.tensors.values() ?? []) expect(offset + size).toBeLessThanOrEqual(damaged.byteLength);
    } catch (error) {
      refused++;
      expect(error).toBeInstanceOf(CheckpointError);
      expect(String((error as Error).message)).toMatch(/^\/f: .{1,400}$/);
    }
  }
  expect(refused).toBeGreaterThan(3000);
});

test("a failed write leaves nothing behind", async () => {
  const out = join(folder, "broken.gguf");
  const wrong: GgufTensorData = { name: "x", format: "f32", shape: [4], parts: [bytes(12, 0)] };
  await expect(writeGguf(out, [], [wrong])).rejects.toThrow(/tensor x: part 0 has 12 bytes/);
  await expect(writeGguf(out, [], [{ ...wrong, format: "q8_0" }])).rejects.toThrow(/tensor x \[4\] can't be stored as q8_0/);
  await expect(ggufFile(folder)).resolves.toBe(file); // the only one that is there
});

test("names convert there and back", () => {
  const names = [
    "token_embd.weight",
    "output.weight",
    "output_norm.weight",
    "blk.3.attn_norm.weight",
    "blk.0.attn_q.bias",
    "blk.11.ffn_gate_inp.weight",
  ];
  names.push("blk.2.exp_probs_b.bias", "blk.2.ffn_down_exps.weight", "blk.2.ffn_up_shexp.weight", "blk.0.attn_output.weight");
  for (const name of names) expect(ggufName(hubName(name)?.name.replace(".{e}", "") ?? "")).toBe(name);
  expect(hubName("blk.2.ffn_down_exps.weight")).toEqual({ name: "model.layers.2.mlp.experts.{e}.down_proj.weight", stacked: true });
  expect(hubName("rope_freqs.weight")).toBeUndefined();
});

test("a file of another architecture, and a folder of several files, are rejected", async () => {
  const other = join(folder, "other");
  mkdirSync(other);
  await writeGguf(join(other, "a.gguf"), [["general.architecture", "string", "llama"]], []);
  await expect(openCheckpoint(other)).rejects.toThrow('general.architecture is "llama"; ernie4_5 and ernie4_5-moe are read');
  writeFileSync(join(other, "b.gguf"), "");
  writeFileSync(join(other, "config.json"), "{}");
  await expect(openCheckpoint(other)).rejects.toThrow(/found a.gguf, b.gguf, name one of them/);
});
