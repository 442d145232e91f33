/** Models to GGUF and back: the same numbers if the formats can represent them, close ones otherwise, and always the same tokens. */
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { exportGguf, type GgufExportType } from "../../src/api/export.ts";
import type { LoadOptions } from "../../src/api/load.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { quantize } from "../../src/api/quantize.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { convertStored } from "../../src/backend/native.ts";
import { decode } from "../../src/backend/reference/weights.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { writeSafetensors } from "../../src/checkpoint/writer.ts";
import type { Dtype } from "../../src/tensor/dtype.ts";
import { blockBytes } from "../../src/tensor/quantized.ts";
import { packedBytes } from "../../src/tensor/stored.ts";
import { get, scratch } from "../checkpoint/craft.ts";
import { GOLDENS, openGoldens, relativeError } from "../goldens.ts";

const folder = scratch();
const SMALL = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const VARIANTS = ["dense-tiny", "dense-bias", "moe-tiny", "moe-bias"];

async function logits(path: string, ids: readonly number[], options: LoadOptions = {}): Promise<Float32Array> {
  const settings = { threads: 1, kv_cache_tokens: 256, kv_cache_dtype: "fp32", ...options } as const;
  const model = await AutoModelForCausalLM.from_pretrained(path, settings);
  const out = await model.forward({ input_ids: [ids] });
  await model.dispose();
  return out.logits.data;
}

async function exported(variant: string, type: GgufExportType): Promise<string> {
  const file = join(folder, `${variant}-${type}.gguf`);
  if (!existsSync(file)) await exportGguf(`${GOLDENS}${variant}`, file, { type, withoutTokenizer: true });
  return file;
}

test.each(VARIANTS)("%s: f32 and back gives the same logits and the original config", async (variant) => {
  const file = await exported(variant, "f32");
  const ids = await (await openGoldens(variant)).ids(33);
  const [seen, expected] = [await logits(file, ids), await logits(`${GOLDENS}${variant}`, ids)];
  expect(Buffer.from(seen.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
  const [back, config] = [(await openCheckpoint(file)).config, (await openCheckpoint(`${GOLDENS}${variant}`)).config];
  for (const key of [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
  ])
    if (config[key] !== undefined) expect([key, back[key]]).toEqual([key, config[key]]);
});

test.each([
  ["f16", 2e-3],
  ["bf16", 2e-2],
  ["q8_0", 3e-2],
  ["q4_0", 0.5],
] as const)("dense-tiny as %s is near, on both backends", async (type, tolerance) => {
  const file = await exported("dense-tiny", type);
  const ids = await (await openGoldens("dense-tiny")).ids(7);
  const expected = await logits(`${GOLDENS}dense-tiny`, ids);
  const plain = await logits(file, ids, { dtype: "fp32" });
  expect(relativeError(plain, expected)).toBeLessThan(tolerance);
  expect(relativeError(await logits(file, ids, { dtype: "fp32", device: "reference" }), plain)).toBeLessThan(1e-4);
  expect(relativeError(await logits(file, ids), expected)).toBeLessThan(2 * tolerance);
});

test.each([
  ["bf16", "bf16"],
  ["f16", "fp16"],
] as const)("moe-tiny as %s has the numbers of a folder in %s", async (type, dtype) => {
  const ids = await (await openGoldens("moe-tiny")).ids(33);
  const other = join(folder, `folder-${type}`);
  await quantize(`${GOLDENS}moe-tiny`, other, { dtype });
  expect(relativeError(await logits(await exported("moe-tiny", type), ids), await logits(other, ids))).toBe(0);
});

/** A matrix of noise in a file of its own, with rows of very different sizes. */
async function noise(n: number, k: number) {
  const values = Float32Array.from({ length: n * k }, (_, i) => Math.sin(i * 12.9898 + 1) * 2 ** ((Math.floor(i / 32) % 7) - 3));
  const path = join(folder, `noise-${n}-${k}.safetensors`);
  await writeSafetensors(path, [{ name: "m", dtype: "F32", shape: [n, k], data: new Uint8Array(values.buffer) }]);
  const { file, offset, bytes } = get((await readHeader(path)).tensors, "m");
  return { values, part: { file, offset, bytes } };
}

/** Puts bytes in a file, so that they can be converted on. */
async function stored(name: string, data: Uint8Array) {
  const path = join(folder, name);
  await writeSafetensors(path, [{ name: "m", dtype: "U8", shape: [data.byteLength], data }]);
  const whole = readFileSync(path);
  return { file: path, offset: whole.byteLength - data.byteLength, bytes: data.byteLength };
}

test.each([
  ["int8", "q8_0", 17, 96],
  ["int8", "q8_0", 16, 128],
  ["int4", "q4_0", 17, 96],
  ["int4", "q4_0", 1, 32],
  ["int4", "q4_0", 33, 320],
] as const)("%s to %s and back is the same, byte for byte ([%i, %i])", async (block, packed, n, k) => {
  const { part } = await noise(n, k);
  const before = new Uint8Array(blockBytes(block, n, k));
  await convertStored(part, "f32", block, n, k, before);
  const there = new Uint8Array(packedBytes(packed, n, k));
  await convertStored(await stored(`${block}-${n}-${k}`, before), block, packed, n, k, there);
  const file = await stored(`${packed}-${n}-${k}`, there);
  const back = new Uint8Array(before.byteLength).fill(0xaa);
  await convertStored(file, packed, block, n, k, back);
  const numbers = async (source: Awaited<ReturnType<typeof stored>>, format: Dtype | "q8_0" | "q4_0") => {
    const out = new Uint8Array(n * k * 4);
    await convertStored(source, format, "f32", n, k, out);
    return Buffer.from(out);
  };
  const expected = await numbers(await stored(`${block}-${n}-${k}-again`, before), block);
  expect((await numbers(file, packed)).equals(expected)).toBe(true);
  expect((await numbers(await stored(`${block}-${n}-${k}-back`, back), block)).equals(expected)).toBe(true);
  if (n % 16 === 0) expect(Buffer.from(back).equals(Buffer.from(before))).toBe(true);
  const plain = new Float32Array(n * k);
  decode(Buffer.from(there), { stored: packed, shape: [n, k] }, plain);
  expect(Buffer.from(plain.buffer).equals(expected)).toBe(true);
});

test("q8_0 with two scales in one int8 group is rounded again, within half a step of the coarser", async () => {
  const [n, k] = [16, 128];
  const { part, values } = await noise(n, k);
  const packed = new Uint8Array(packedBytes("q8_0", n, k));
  await convertStored(part, "f32", "q8_0", n, k, packed);
  const source = await stored("two-scales", packed);
  const block = new Uint8Array(blockBytes("int8", n, k));
  await convertStored(source, "q8_0", "int8", n, k, block);
  const seen = new Float32Array(n * k);
  decode(Buffer.from(block), { stored: "int8", shape: [n, k] }, seen);
  for (let from = 0; from < n * k; from += 64) {
    const top = Math.max(...values.subarray(from, from + 64).map(Math.abs));
    for (let i = from; i < from + 64; i++) expect(Math.abs(seen[i] - values[i])).toBeLessThanOrEqual((top / 127) * 1.01);
  }
});

test("the bundled model: tokens, template, ends and logits survive q8_0 exactly", async () => {
  const file = join(folder, "small.gguf");
  const written: number[] = [];
  await exportGguf(SMALL, file, { type: "q8_0", onProgress: ({ doneBytes }) => written.push(doneBytes) });
  expect(written).toEqual([...written].sort((a, b) => a - b));
  const [ours, theirs] = [await AutoTokenizer.from_pretrained(SMALL), await AutoTokenizer.from_pretrained(file)];
  const messages = [{ role: "user", content: "What is 17 + 25? 你好，世界 😀\n\n  <|end_of_sentence|>" }];
  const ids = ours.apply_chat_template(messages, { add_generation_prompt: true });
  expect(theirs.apply_chat_template(messages, { add_generation_prompt: true })).toEqual(ids);
  expect(theirs.decode(ids)).toBe(ours.decode(ids));
  expect(theirs.special_tokens_map).toEqual(ours.special_tokens_map);
  expect(theirs.all_special_ids).toEqual(ours.all_special_ids);
  expect(theirs.size).toBe(ours.size);
  for (const text of [readFileSync(join(SMALL, "README.md"), "utf8"), "   a  b\t\n\n", "ﬁ½①", ""])
    expect(theirs.encode(text)).toEqual(ours.encode(text));
  const [back, before] = [await openCheckpoint(file), await openCheckpoint(SMALL)];
  expect(back.generationConfig).toEqual(before.generationConfig);
  expect(relativeError(await logits(file, ids), await logits(SMALL, ids))).toBe(0);

  const again = join(folder, "again");
  await quantize(file, again, { dtype: "int8" });
  const copy = await AutoTokenizer.from_pretrained(again);
  expect(copy.apply_chat_template(messages)).toEqual(ours.apply_chat_template(messages));
  expect(copy.decode(ids, { skip_special_tokens: true })).toBe(ours.decode(ids, { skip_special_tokens: true }));
  const name = "model.layers.1.mlp.experts.3.down_proj.weight";
  const tensor = async (path: string) => readTensor(get((await openCheckpoint(path)).tensors, name));
  expect((await tensor(again)).equals(await tensor(SMALL))).toBe(true);
});

test("a folder whose only weights are a GGUF file is a model", async () => {
  const parent = join(folder, "alone");
  mkdirSync(parent);
  await exportGguf(`${GOLDENS}moe-tiny`, join(parent, "m.gguf"), { type: "bf16", withoutTokenizer: true });
  expect((await openCheckpoint(parent)).folder).toBe(parent);
  const tokenizer = await AutoTokenizer.from_pretrained(parent);
  expect(tokenizer.decode(tokenizer.encode("hé"))).toBe("hé"); // the placeholder: bytes
});

test("rejects an existing file, a model without a tokenizer, and an unknown type; leaves nothing behind when aborted", async () => {
  const source = `${GOLDENS}moe-tiny`;
  await expect(exportGguf(source, await exported("moe-tiny", "f32"), { type: "f32" })).rejects.toThrow(/already exists/);
  const out = join(folder, "never.gguf");
  await expect(exportGguf(source, out, { type: "f32" })).rejects.toThrow(/no tokenizer/);
  await expect(exportGguf(source, out, { type: "q5_0" as "q4_0" })).rejects.toThrow(/type 'q5_0' is not known/);
  await expect(
    exportGguf(source, out, { type: "f32", withoutTokenizer: true, signal: AbortSignal.abort(new Error("enough")) }),
  ).rejects.toThrow("enough");
  expect(existsSync(out)).toBe(false);
});
