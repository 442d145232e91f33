/** One model in every checkpoint layout, and broken in every way. */
import { truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, test } from "vitest";
import type { LoadOptions } from "../../src/api/load.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { quantize } from "../../src/api/quantize.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS, openGoldens, relativeError } from "../goldens.ts";
import { type ModelFolder, readModel, type StoredTensor, writeModel } from "./folders.ts";

const temporary = scratch();
let tiny: ModelFolder;
let prompt: number[];
let expected: Float32Array;

async function logits(folder: string, options: LoadOptions = {}): Promise<Float32Array> {
  const model = await AutoModelForCausalLM.from_pretrained(folder, {
    threads: 1,
    kv_cache_tokens: 256,
    kv_cache_dtype: "fp32",
    ...options,
  });
  const out = await model.forward({ input_ids: [prompt] });
  await model.dispose();
  return out.logits.data;
}

beforeAll(async () => {
  tiny = await readModel("moe-tiny");
  prompt = await (await openGoldens("moe-tiny")).ids(33);
  expected = await logits(`${GOLDENS}moe-tiny`);
});

/** As transformers 5 saves it: all experts of a layer in two tensors, the correction bias beneath the gate. */
function fused(model: ModelFolder): ModelFolder {
  const tensors: StoredTensor[] = [];
  const experts = new Map<string, StoredTensor>();
  for (const t of model.tensors) {
    if (/\.experts\.\d+\./.test(t.name)) experts.set(t.name, t);
    else tensors.push({ ...t, name: t.name.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics.") });
  }
  const stack = (layer: number, which: readonly string[], name: string) => {
    const parts = Array.from({ length: 8 }, (_, e) =>
      which.map((w) => experts.get(`model.layers.${layer}.mlp.experts.${e}.${w}_proj.weight`) as StoredTensor),
    ).flat();
    const [n, k] = parts[0].shape;
    tensors.push({
      name: `model.layers.${layer}.mlp.experts.${name}`,
      dtype: "F32",
      shape: [8, n * which.length, k],
      data: Buffer.concat(parts.map((p) => p.data)),
    });
  };
  for (const layer of [1, 2, 3]) {
    stack(layer, ["gate", "up"], "gate_up_proj");
    stack(layer, ["down"], "down_proj");
  }
  return { ...model, tensors };
}

describe("layouts give the same logits, bit for bit", () => {
  const extra = (name: string, shape: number[]): StoredTensor => ({
    name,
    dtype: "F32",
    shape,
    data: new Uint8Array(4 * shape.reduce((a, b) => a * b)).fill(63),
  });

  test.each<[string, (m: ModelFolder) => ModelFolder, number]>([
    ["rewritten", (m) => m, 1],
    ["transformers 5, experts fused", fused, 1],
    ["in three shards", (m) => m, 3],
    ["fused, in two shards", fused, 2],
    ["tensors in another order", (m) => ({ ...m, tensors: [...m.tensors].reverse() }), 1],
    [
      "with multi-token prediction and a head that is tied anyway",
      (m) => ({
        ...m,
        tensors: [
          ...m.tensors,
          extra("model.mtp_block.0.self_attn.q_proj.weight", [64, 64]),
          extra("model.mtp_emb_norm.0.weight", [64]),
          extra("model.mtp_linear_proj.0.weight", [64, 128]),
          { ...(m.tensors.find((t) => t.name === "model.embed_tokens.weight") as StoredTensor), name: "lm_head.weight" },
        ],
      }),
      1,
    ],
    [
      "the correction bias as transformers 5 names it",
      (m) => ({
        ...m,
        tensors: m.tensors.map((t) => ({ ...t, name: t.name.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics.") })),
      }),
      1,
    ],
  ])("%s", async (name, change, shards) => {
    expect(await logits(await writeModel(temporary, name.replace(/\W+/g, "-"), change(tiny), shards))).toEqual(expected);
  });

  test("an unaligned file: its mapping can't be used directly", async () => {
    const odd: StoredTensor = { name: "model.mtp_odd", dtype: "U8", shape: [3], data: Uint8Array.of(1, 2, 3) };
    const folder = await writeModel(temporary, "odd", tiny);
    // The writer would align it, so the header is made by hand: three odd bytes first, the others after them.
    const header: Record<string, unknown> = { [odd.name]: { dtype: "U8", shape: [3], data_offsets: [0, 3] } };
    let end = 3;
    for (const t of tiny.tensors) {
      header[t.name] = { dtype: t.dtype, shape: t.shape, data_offsets: [end, end + t.data.byteLength] };
      end += t.data.byteLength;
    }
    const json = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.byteLength));
    writeFileSync(join(folder, "model.safetensors"), Buffer.concat([length, json, odd.data, ...tiny.tensors.map((t) => t.data)]));
    expect(await logits(folder)).toEqual(expected);
  });
});

describe("quantize", () => {
  test("fp32 is identical, fp16 and bf16 are close, int8 is near", async () => {
    const distance = async (dtype: "fp32" | "fp16" | "bf16" | "int8") => {
      const out = join(temporary, `quantized-${dtype}`);
      await quantize(`${GOLDENS}dense-tiny`, out, { dtype });
      const [from, to] = [await logits(`${GOLDENS}dense-tiny`), await logits(out)];
      return relativeError(to, from);
    };
    expect(await distance("fp32")).toBe(0);
    expect(await distance("fp16")).toBeLessThan(2e-3);
    expect(await distance("bf16")).toBeLessThan(2e-2);
    expect(await distance("int8")).toBeLessThan(5e-2);
  });

  test("an int8 file and a file converted to int8 while loading give the same logits, from every layout", async () => {
    const out = join(temporary, "moe-int8");
    const { tensors } = await quantize(`${GOLDENS}moe-tiny`, out, { dtype: "int8" });
    expect(tensors).toBe(tiny.tensors.length);
    const stored = await logits(out);
    expect(stored).toEqual(await logits(`${GOLDENS}moe-tiny`, { dtype: "int8" }));
    const fromFused = join(temporary, "moe-int8-fused");
    await quantize(await writeModel(temporary, "fused-again", fused(tiny), 2), fromFused, { dtype: "int8" });
    expect(await logits(fromFused)).toEqual(stored);
    // Random experts are about equally likely, so some tokens are routed elsewhere: most agree, and none is far off.
    const errors = Array.from({ length: 33 }, (_, p) =>
      relativeError(stored.subarray(p * 512, (p + 1) * 512), expected.subarray(p * 512, (p + 1) * 512)),
    );
    expect(errors.filter((e) => e < 0.1).length).toBeGreaterThan(22);
    expect(Math.max(...errors)).toBeLessThan(1);
  });

  test("an existing result, or one that is the source, is not touched", async () => {
    const out = join(temporary, "twice");
    await quantize(`${GOLDENS}dense-tiny`, out, { dtype: "int8" });
    await expect(quantize(`${GOLDENS}dense-tiny`, out, { dtype: "int8" })).rejects.toThrow("already contains a model");
    await expect(quantize(out, out, { dtype: "int8" })).rejects.toThrow("source and result are the same folder");
  });

  test("aborting leaves no model behind", async () => {
    const out = join(temporary, "aborted");
    const controller = new AbortController();
    let seen = 0;
    const onProgress = () => void (++seen === 10 && controller.abort(new Error("stop")));
    await expect(quantize(`${GOLDENS}dense-tiny`, out, { dtype: "int8", onProgress, signal: controller.signal })).rejects.toThrow("stop");
    await expect(AutoModelForCausalLM.from_pretrained(out)).rejects.toThrow(/no weights: /);
  });
});

describe("errors are one line that names what is wrong", () => {
  let count = 0;
  const without = (pattern: RegExp) => (m: ModelFolder) => ({ ...m, tensors: m.tensors.filter((t) => !pattern.test(t.name)) });
  const config = (change: Record<string, unknown>) => (m: ModelFolder) => ({ ...m, config: { ...m.config, ...change } });
  const tensor = (name: string, change: Partial<StoredTensor>) => (m: ModelFolder) => ({
    ...m,
    tensors: m.tensors.map((t) => (t.name === name ? { ...t, ...change } : t)),
  });

  test.each<[string, (m: ModelFolder) => ModelFolder, RegExp]>([
    [
      "missing correction bias",
      without(/layers\.2\..*e_score_correction_bias/),
      /the correction bias model\.layers\.2\.mlp\.moe_statics\.e_score_correction_bias is missing.*rejected$/,
    ],
    ["missing tensor", without(/layers\.3\.self_attn\.o_proj/), /tensor model\.layers\.3\.self_attn\.o_proj\.weight is missing/],
    [
      "missing expert",
      without(/layers\.1\.mlp\.experts\.5\.up_proj/),
      /tensor model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight is missing/,
    ],
    [
      "wrong shape",
      tensor("model.layers.0.mlp.up_proj.weight", { shape: [64, 160] }),
      /tensor model\.layers\.0\.mlp\.up_proj\.weight has the shape \[64, 160\], but config\.json implies \[160, 64\]/,
    ],
    [
      "a dtype that weights cannot have",
      tensor("model.norm.weight", { dtype: "I32" }),
      /tensor model\.norm\.weight is stored as I32; F32, F16, BF16 and mixtape's int8, int4 and fp8 are read/,
    ],
    ["a config of another model", config({ num_hidden_layers: 6 }), /num_hidden_layers is 6, but the weights hold 4 layers;/],
    ["incomplete files", without(/layers\.2\./), /tensor model\.layers\.2\..* is missing \(and \d+ more/],
    [
      "unknown architecture",
      config({ architectures: ["LlamaForCausalLM"] }),
      /the architecture LlamaForCausalLM is not supported; supported are Ernie4_5_MoeForCausalLM, Ernie4_5ForCausalLM, and classifiers of both \(ForSequenceClassification\)$/,
    ],
    ["more experts chosen than there are", config({ moe_k: 9 }), /moe_k \(9\) is more than moe_num_experts \(8\)/],
    [
      "another RoPE",
      config({ rope_parameters: { rope_type: "yarn", factor: 4, rope_theta: 500000 } }),
      /the RoPE type "yarn" is not supported; ERNIE-4\.5 uses "default"/,
    ],
    ["a size that is none", config({ hidden_size: "64" }), /hidden_size is "64", not a whole number of at least 1/],
  ])("%s", async (_name, change, message) => {
    const folder = await writeModel(temporary, `fault-${count++}`, change(tiny));
    const error = await AutoModelForCausalLM.from_pretrained(folder, { threads: 1 }).catch((e: Error) => e);
    expect((error as Error).message).toMatch(message);
    expect((error as Error).message).not.toMatch(/\n|internal:/);
  });

  test.each([
    ["within the tensors", 100_000, /truncated or damaged, fetch it again/],
    ["within the header", 2000, /bad header length: .*truncated or not safetensors/],
    ["to nothing", 0, /truncated: 0 bytes/],
  ])("truncated %s", async (_name, bytes, message) => {
    const folder = await writeModel(temporary, `fault-${count++}`, tiny);
    truncateSync(join(folder, "model.safetensors"), bytes);
    const error = await AutoModelForCausalLM.from_pretrained(folder).catch((e: Error) => e);
    expect((error as Error).message).toMatch(message);
    expect((error as Error).message).not.toMatch(/\n/);
  });

  test("broken JSON", async () => {
    const folder = await writeModel(temporary, `fault-${count++}`, tiny);
    writeFileSync(join(folder, "config.json"), '{"hidden_size": 64,');
    const error = await AutoModelForCausalLM.from_pretrained(folder).catch((e: Error) => e);
    expect((error as Error).message).toMatch(/config\.json.*JSON/);
    expect((error as Error).message).not.toMatch(/\n/);
  });

  test.each<[LoadOptions, string]>([
    [{ dtype: "fp4" }, "dtype 'fp4' is not known; known are auto, fp32, fp16, bf16, fp8, int8, int4"],
    [{ dtype: "toString" }, "dtype 'toString' is not known"],
    [{ device: "tpu" }, "device 'tpu' is not known; known are auto, cpu, cuda, cuda:0, cuda:1, ..., reference"],
    [{ threads: 0 }, "threads: 0 is not a whole number from 1 to 1024"],
    [{ threads: 1.5 }, "threads: 1.5 is not a whole number"],
    [{ isa: "sse9" }, "sse9"],
    [{ kv_cache_dtype: "int4" as "fp16" }, "kv_cache_dtype 'int4' is not known; known are fp32, fp16, bf16, int8, fp8"],
    [{ kv_cache_tokens: 0 }, "kv_cache_tokens is 0; it must be a whole number of at least 1"],
    [{ kv_cache_tokens: Number.NaN }, "kv_cache_tokens is NaN"],
    [{ chunk_size: 0 }, "chunk_size is 0; it must be a whole number of at least 1"],
  ])("the options %o", async (options, message) => {
    await expect(AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, options)).rejects.toThrow(message);
  });

  test("device_map is an alias of device", async () => {
    const model = await AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, { device_map: "reference", kv_cache_tokens: 64 });
    expect(model.device).toBe("reference, 1 thread");
    await model.dispose();
  });
});
