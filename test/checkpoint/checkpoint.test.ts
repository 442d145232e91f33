import { copyFileSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeEach, describe, expect, test } from "vitest";
import { blockMetadata } from "../../src/checkpoint/blocks.ts";
import { openCheckpoint, totalsByDtype } from "../../src/checkpoint/checkpoint.ts";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { writeSafetensors } from "../../src/checkpoint/writer.ts";
import { blockBytes } from "../../src/tensor/quantized.ts";
import { GOLDENS, get, scratch, writeTensors } from "./craft.ts";

const root = scratch();
let folder: string;
let count = 0;
const put = (name: string, value: unknown) => writeFileSync(join(folder, name), typeof value === "string" ? value : JSON.stringify(value));
const index = (weight_map: unknown) => put("model.safetensors.index.json", { metadata: { total_size: 1 }, weight_map });
const f32 = (...shape: number[]) => ({ dtype: "F32", shape });

beforeEach(() => {
  folder = join(root, String(count++));
  mkdirSync(folder);
  put("config.json", { model_type: "ernie4_5_moe" });
});

async function faultOf(path = folder): Promise<string> {
  const error: unknown = await openCheckpoint(path).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect((error as Error).message).not.toMatch(/[\r\n]/);
  return (error as Error).message.replaceAll(path, "F");
}

describe("openCheckpoint", () => {
  test("reads a folder of transformers", async () => {
    const checkpoint = await openCheckpoint(join(GOLDENS, "moe-tiny"));
    expect(checkpoint.config["architectures"]).toEqual(["Ernie4_5_MoeForCausalLM"]);
    expect(checkpoint.generationConfig).toMatchObject({ eos_token_id: 2 });
    expect(checkpoint.tensors.size).toBe(116);
    expect(get(checkpoint.tensors, "model.norm.weight").file).toBe(join(GOLDENS, "moe-tiny/model.safetensors"));
    expect(Object.fromEntries(totalsByDtype(checkpoint))).toEqual({ F32: { tensors: 116, elements: 299096, bytes: 1196384 } });
  });

  test("reads shards through their index", async () => {
    writeTensors(join(folder, "model-00001-of-00002.safetensors"), { a: f32(2), b: f32(3) }, { format: "pt" });
    writeTensors(join(folder, "model-00002-of-00002.safetensors"), { c: { dtype: "BF16", shape: [8] } }, { format: "pt", more: "x" });
    index({ a: "model-00001-of-00002.safetensors", b: "model-00001-of-00002.safetensors", c: "model-00002-of-00002.safetensors" });
    const checkpoint = await openCheckpoint(folder);
    expect([...checkpoint.tensors.keys()]).toEqual(["a", "b", "c"]);
    expect(get(checkpoint.tensors, "c").file).toBe(join(folder, "model-00002-of-00002.safetensors"));
    expect({ ...checkpoint.metadata }).toEqual({ format: "pt", more: "x" });
    expect(checkpoint.generationConfig).toBeNull();
    expect([...totalsByDtype(checkpoint)]).toEqual([
      ["F32", { tensors: 2, elements: 5, bytes: 20 }],
      ["BF16", { tensors: 1, elements: 8, bytes: 16 }],
    ]);
  });

  test("prefers one whole file to an index, as transformers does", async () => {
    writeTensors(join(folder, "model.safetensors"), { a: f32(2) });
    index({ z: "absent.safetensors" });
    expect([...(await openCheckpoint(folder)).tensors.keys()]).toEqual(["a"]);
  });

  test("reads the shapes of int8 matrices", async () => {
    const bytes = blockBytes("int8", 20, 70);
    await writeSafetensors(
      join(folder, "model.safetensors"),
      [
        { name: "q", dtype: "U8", shape: [bytes], data: new Uint8Array(bytes) },
        { name: "n", dtype: "F32", shape: [4], data: new Uint8Array(16) },
      ],
      { metadata: blockMetadata(new Map([["q", { dtype: "int8" as const, shape: [20, 70] as const }]])) },
    );
    const checkpoint = await openCheckpoint(folder);
    expect([...checkpoint.blocks]).toEqual([["q", { dtype: "int8", shape: [20, 70] }]]);
    expect(get(totalsByDtype(checkpoint), "int8")).toEqual({ tensors: 1, elements: 1400, bytes });
  });

  test.each([
    ["another format", { "mixtape.format": "2", "mixtape.int8": "{}" }, /mixtape.format is 2, this version reads 1/],
    ["no format", { "mixtape.int8": "{}" }, /mixtape.format is missing/],
    ["no JSON", { "mixtape.format": "1", "mixtape.int8": "{" }, /not JSON/],
    ["a list", { "mixtape.format": "1", "mixtape.int8": "[]" }, /not a JSON object/],
    ["a bad shape", { "mixtape.format": "1", "mixtape.int8": '{"q":[16]}' }, /q has the bad shape \[16\]/],
    ["a negative shape", { "mixtape.format": "1", "mixtape.int8": '{"q":[-16,-64]}' }, /bad shape/],
    ["an absent tensor", { "mixtape.format": "1", "mixtape.int8": '{"p":[16,64]}' }, /names the tensor p, which the file lacks/],
    [
      "another size",
      { "mixtape.format": "1", "mixtape.int8": '{"q":[17,64]}' },
      /q is stored as U8 \[1056\], \[17, 64\] takes U8 \[2112\]/,
    ],
    ["another dtype", { "mixtape.format": "1", "mixtape.int8": '{"f":[16,64]}' }, /f is stored as F32 \[264\]/],
  ])("refuses int8 metadata with %s", async (_, metadata, fault) => {
    writeTensors(join(folder, "model.safetensors"), { q: { dtype: "U8", shape: [1056] }, f: f32(264) }, metadata as never);
    expect(await faultOf()).toMatch(fault);
  });
});

describe("one clear error for", () => {
  test("a missing folder, or a file", async () => {
    expect(await faultOf(join(folder, "absent"))).toBe("F: no such folder");
    expect(await faultOf(join(folder, "config.json"))).toMatch(/^F: a file that is not GGUF; give the folder/);
  });

  test("a missing or broken config, or one that is not an object", async () => {
    put("config.json", '{"hidden_size": 64,\n}');
    expect(await faultOf()).toMatch(/^F\/config.json: broken JSON \(/);
    put("config.json", "[]");
    expect(await faultOf()).toBe("F/config.json: not a JSON object");
    rmSync(join(folder, "config.json"));
    expect(await faultOf()).toMatch(/^F: no config.json in this folder/);
  });

  test("a broken generation config", async () => {
    put("generation_config.json", "");
    expect(await faultOf()).toMatch(/generation_config.json: broken JSON/);
  });

  test("missing weights, with what was found instead", async () => {
    expect(await faultOf()).toBe("F: no weights: looked for model.safetensors and model.safetensors.index.json");
    put("pytorch_model.bin", "x");
    expect(await faultOf()).toMatch(/index.json; found pytorch_model.bin, which is not supported/);
  });

  test("truncated weights", async () => {
    copyFileSync(join(GOLDENS, "dense-tiny/config.json"), join(folder, "model.safetensors"));
    expect(await faultOf()).toMatch(/^F\/model.safetensors: bad header length/);
  });

  test("a missing shard", async () => {
    index({ a: "one.safetensors", b: "two.safetensors" });
    writeTensors(join(folder, "one.safetensors"), { a: f32(2) });
    expect(await faultOf()).toMatch(/^F: the shard two.safetensors is missing \(2 are listed/);
  });

  test("a tensor that is not where the index says", async () => {
    writeTensors(join(folder, "one.safetensors"), { a: f32(2) });
    writeTensors(join(folder, "two.safetensors"), { b: f32(2) });
    index({ a: "one.safetensors", b: "two.safetensors", c: "two.safetensors" });
    expect(await faultOf()).toMatch(/tensor c is listed in two.safetensors, but no shard holds it/);
    index({ a: "two.safetensors", b: "one.safetensors" });
    expect(await faultOf()).toMatch(/tensor a is listed in two.safetensors, but it is in F\/one.safetensors/);
  });

  test("a tensor in two shards", async () => {
    writeTensors(join(folder, "one.safetensors"), { a: f32(2) });
    writeTensors(join(folder, "two.safetensors"), { a: f32(2), b: f32(1) });
    index({ a: "one.safetensors", b: "two.safetensors" });
    expect(await faultOf()).toMatch(/two.safetensors: tensor a is also in F\/one.safetensors/);
  });

  test.each(["../../etc/x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "..", 7, null, "x.bin"])(
    "the shard name %j",
    async (shard) => {
      index({ a: shard });
      expect(await faultOf()).toMatch(/the shard of a is .*: not the name of a .safetensors file in this folder/);
    },
  );

  test.each([[{}], [null], [[]], ["x"]])("the weight map %j", async (map) => {
    index(map);
    expect(await faultOf()).toMatch(/weight_map/);
  });
});
