/** Weights files that go away or change while they are mapped, and weights that are not numbers: the error names them, and everything else goes on. */
import { execFile } from "node:child_process";
import { closeSync, cpSync, openSync, readFileSync, renameSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { exportGguf } from "../../src/api/export.ts";
import { type LoadOptions, loadModel } from "../../src/api/load.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { quantize, verify } from "../../src/api/quantize.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import { readModel, type StoredTensor, writeModel } from "../api/folders.ts";
import { temporary, tinyModel } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";
import { post, startHere } from "../server/start.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));

/** A copy of a model that may be damaged. */
function copied(model: string): string {
  const folder = temporary();
  cpSync(model, folder, { recursive: true });
  return folder;
}

describe("a file of weights in use", () => {
  interface Said {
    readonly tokens: number;
    readonly during: string | null;
    readonly after: string | null;
    readonly lost: readonly boolean[];
    readonly served: boolean;
    readonly again: string;
  }
  async function happens(what: string, folder = copied(`${GOLDENS}moe-tiny`)): Promise<Said> {
    const script = fileURLToPath(new URL("./weights.child.ts", import.meta.url));
    const { stdout } = await promisify(execFile)(
      process.execPath,
      ["--import", "tsx", script, what, folder, copied(`${GOLDENS}dense-tiny`)],
      {
        cwd: root,
      },
    );
    return JSON.parse(stdout) as Said;
  }

  test.each([
    ["truncate", /model\.safetensors: .*rename it into place$/, /truncated or damaged/],
    ["empty", /model\.safetensors: .*rename it into place$/, /truncated: 0 bytes/],
    ["copy over", /model\.safetensors: .*rename it into place$/, /./],
    ["touch", /model\.safetensors: was changed while the model was in use/, /^served$/],
  ])("%s: its requests fail with the file's name, the process lives, another model goes on", async (what, message, again) => {
    const said = await happens(what);
    expect(said.tokens).toBeGreaterThanOrEqual(8);
    expect(said.tokens).toBeLessThan(60);
    expect(said.during).toMatch(message);
    expect(said.after).toBe(said.during);
    expect({ lost: said.lost, served: said.served }).toEqual({ lost: [true, false], served: true });
    expect(said.again).toMatch(again);
  });

  test("truncated in the middle of a step", async () => {
    const said = await happens("truncate within a step", copied(join(root, "models/small-moe")));
    expect(said.during).toMatch(/model\.safetensors: cannot be read any more: it was truncated or its disk failed .*rename it into place$/);
    expect(said).toMatchObject({ tokens: 0, after: said.during, lost: [true, false], served: true });
  });

  test("renamed into place: the loaded model goes on with what it was loaded from", async () => {
    expect(await happens("rename")).toMatchObject({ tokens: 60, during: null, after: null, lost: [false, false], served: true });
  });
});

test("a server: the model whose file goes away fails, the other answers, and a file renamed into place is loaded", async () => {
  const [broken, sound] = [tinyModel(), tinyModel()];
  const model = (name: string, path: string) => ({ name, path, kvCacheTokens: 2048, threads: 1 });
  const { url } = await startHere({ models: [model("broken", broken), model("sound", sound)] });
  const ask = async (name: string) => {
    const response = await post(url, "/v1/completions", { model: name, prompt: "ab", max_tokens: 4 });
    const body = (await response.json()) as { error?: { message: string } };
    return [response.status, body.error?.message ?? ""] as const;
  };
  const ready = async () => (await fetch(`${url}/ready`)).status;
  expect([await ask("broken"), await ask("sound"), await ready()]).toEqual([[200, ""], [200, ""], 200]);
  const file = join(broken, "model.safetensors");
  const bytes = readFileSync(file);
  truncateSync(file, 100_000);
  const [status, message] = await ask("broken");
  expect(status).toBeGreaterThanOrEqual(500);
  expect(message).not.toContain(broken); // paths of the server are for its log
  expect([await ask("sound"), await ready()]).toEqual([[200, ""], 503]);
  expect((await ask("broken"))[0]).toBe(503); // it is loaded again, which fails too
  writeFileSync(`${file}.new`, bytes);
  renameSync(`${file}.new`, file);
  expect([await ask("broken"), await ask("sound"), await ready()]).toEqual([[200, ""], [200, ""], 200]);
});

/** Overwrites bytes of a tensor in a model's file. */
async function overwrite(folder: string, name: string, at: number, bytes: Uint8Array): Promise<void> {
  const { tensors } = await openCheckpoint(folder);
  const entry = tensors.get(name);
  if (!entry) throw new Error(`no tensor ${name}`);
  const file = openSync(entry.file, "r+");
  writeSync(file, bytes, 0, bytes.byteLength, entry.offset + (at < 0 ? entry.bytes + at : at));
  closeSync(file);
}

const f32 = (value: number) => new Uint8Array(Float32Array.of(value).buffer);
const NAN = f32(Number.NaN);
/** A NaN whose payload has other bits, and a negative sign. */
const ODD_NAN = new Uint8Array(Uint32Array.of(0xffc12345).buffer);

describe("weights that are not finite", () => {
  const EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight";

  /** moe-tiny with `bytes` at number 70 of an expert's matrix: row 1, column 6. */
  async function damaged(bytes: Uint8Array): Promise<string> {
    const folder = copied(`${GOLDENS}moe-tiny`);
    await overwrite(folder, EXPERT, 70 * 4, bytes);
    return folder;
  }
  const PLACE =
    /model\.safetensors: tensor model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight holds (NaN|infinity) at row 1, column 6: the file is damaged/;

  test.each(["int8", "int4", "fp8", "bf16", "fp16", "fp32"] as const)("quantize to %s names tensor and place", async (dtype) => {
    for (const bytes of [NAN, ODD_NAN, f32(Number.POSITIVE_INFINITY), f32(Number.NEGATIVE_INFINITY)])
      await expect(quantize(await damaged(bytes), join(temporary(), "out"), { dtype })).rejects.toThrow(PLACE);
  });

  test.each([
    ["int8", 1e7],
    ["int4", 5e5],
    ["fp8", 3e7],
    ["fp16", -7e4],
    ["bf16", 3.4e38],
  ] as const)("a number that %s can't hold: %f", async (dtype, value) => {
    await expect(quantize(await damaged(f32(value)), join(temporary(), "out"), { dtype })).rejects.toThrow(
      /experts\.3\.up_proj\.weight holds .* at row 1, column 6; the largest number that this format can hold is/,
    );
  });

  test.each(["int8", "int4", "bf16", "fp16"])("loading as %s names tensor and expert", async (dtype) => {
    await expect(loadModel(await damaged(NAN), { dtype, threads: 1, kv_cache_tokens: 64 })).rejects.toThrow(
      /tensor model\.layers\.2\.mlp\.experts\.up_proj\.weight of expert 3 holds NaN at row 1, column 6/,
    );
    await expect(loadModel(await damaged(NAN), { dtype, device: "reference", kv_cache_tokens: 64 })).rejects.toThrow(
      /experts\.up_proj\.weight holds NaN/,
    );
  });

  test("export and verify name it, whatever the format", async () => {
    await expect(exportGguf(await damaged(NAN), join(temporary(), "x.gguf"), { type: "q8_0", withoutTokenizer: true })).rejects.toThrow(
      /experts\.up_proj\.weight of expert 3 holds NaN/,
    );
    await expect(verify(await damaged(NAN))).rejects.toThrow(PLACE);
    await expect(verify(`${GOLDENS}moe-tiny`)).rejects.toThrow(/all numbers are finite, but there are no checksums/);
    const blocks = join(temporary(), "int8");
    await quantize(`${GOLDENS}moe-tiny`, blocks, { dtype: "int8" });
    expect(await verify(blocks)).toEqual([]);
    await overwrite(blocks, EXPERT, -2, Uint8Array.of(0, 0x7c)); // a scale of its last block: an infinite half
    expect(await verify(blocks)).toEqual([EXPERT]); // the checksum tells first
    await expect(quantize(blocks, join(temporary(), "out"), { dtype: "int4" })).rejects.toThrow(
      /experts\.3\.up_proj\.weight holds (NaN|infinity)/,
    );
  });

  /** Generates, runs a forward pass, embeds; what each says. */
  async function uses(folder: string, options: LoadOptions): Promise<(string | null)[]> {
    const model = await AutoModelForCausalLM.from_pretrained(folder, { threads: 2, kv_cache_tokens: 512, ...options });
    const said = async (run: () => Promise<unknown>) =>
      run().then(
        () => null,
        (error: Error) => error.message,
      );
    const results = [
      await said(() => model.generate({ input_ids: [[5, 6, 7, 8]], max_new_tokens: 4 })),
      await said(() => model.generate({ input_ids: [[5, 6, 7, 8]], max_new_tokens: 4, do_sample: true, top_k: 5, seed: 1 })),
      await said(() => model.forward({ input_ids: [[5, 6, 7, 8]] })),
    ];
    expect(model.engine.cache.free).toBe(model.engine.cache.count);
    await model.dispose();
    return results;
  }
  const FAULT = "the model computed numbers that are not finite: its weights are damaged; 'mixtape verify' names the tensor";

  const STEPS = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.3.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.2.mlp.gate.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.3.post_attention_layernorm.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
  ];
  test.each(STEPS)("a step with NaN or infinity in %s fails its requests", async (name) => {
    for (const bytes of [NAN, ODD_NAN, f32(Number.POSITIVE_INFINITY)]) {
      const folder = copied(`${GOLDENS}moe-tiny`);
      await overwrite(folder, name, 0, bytes);
      for (const kv_cache_dtype of ["fp32", "int8"] as const) expect(await uses(folder, { kv_cache_dtype })).toEqual([FAULT, FAULT, FAULT]);
    }
  });

  test.each(STEPS.filter((name) => name.includes("_proj") || name.includes("embed")))("the same in int8 blocks: %s", async (name) => {
    const folder = join(temporary(), "int8");
    await quantize(`${GOLDENS}moe-tiny`, folder, { dtype: "int8" });
    for (const half of [0x7c00, 0x7e00, 0xfc00]) {
      await overwrite(folder, name, 1024, Uint8Array.of(half & 255, half >> 8)); // the scale of row 0, columns 0 to 63
      expect(await uses(folder, {})).toEqual([FAULT, FAULT, FAULT]);
    }
  });

  test("only the requests whose tokens meet the fault fail", async () => {
    const folder = copied(`${GOLDENS}dense-tiny`);
    const { tensors, config } = await openCheckpoint(folder);
    if (config["tie_word_embeddings"] !== false) {
      // Untie, so that the embedding of one token is read by that token alone.
      const model = await readModel("dense-tiny");
      const table = model.tensors.find((t) => t.name === "model.embed_tokens.weight") as StoredTensor;
      const path = await writeModel(temporary(), "untied", {
        ...model,
        config: { ...model.config, tie_word_embeddings: false },
        tensors: [...model.tensors, { ...table, name: "lm_head.weight" }],
      });
      cpSync(path, folder, { recursive: true });
    }
    const [, hidden] = tensors.get("model.embed_tokens.weight")?.shape ?? [];
    await overwrite(folder, "model.embed_tokens.weight", 9 * hidden * 4, NAN);
    const { engine } = await loadModel(folder, { threads: 2, kv_cache_tokens: 1024 });
    const read = async (tokens: number[]) => {
      const ids: number[] = [];
      for await (const { id } of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 5 })) ids.push(id);
      return ids.length;
    };
    const results = await Promise.allSettled([read([5, 6]), read([5, 9]), read([7, 8])]);
    expect(results.map((r) => (r.status === "fulfilled" ? r.value : r.reason.message))).toEqual([5, FAULT, 5]);
    // The blocks of the failed request may be used again: what they hold reaches nobody.
    for (let i = 0; i < 40; i++) expect(await read(Array.from({ length: 20 + i }, (_, j) => 10 + ((i * 7 + j) % 300)))).toBe(5);
    await engine.dispose();
  });
});

describe("tensors that the model does not use", () => {
  const extra = (name: string, shape: number[]): StoredTensor => ({
    name,
    dtype: "F32",
    shape,
    data: new Uint8Array(4 * shape.reduce((a, b) => a * b)),
  });
  const at = (name: string) =>
    new RegExp(`tensor ${name.replaceAll(".", "\\.")} .*is stored, but the model that config.json describes has no such part`);

  async function withTensor(...tensors: StoredTensor[]): Promise<string> {
    const model = await readModel("moe-tiny");
    return writeModel(temporary(), "model", { ...model, tensors: [...model.tensors, ...tensors] });
  }
  const loads = (folder: string, warn: (text: string) => void = () => {}) =>
    loadModel(folder, { threads: 1, kv_cache_tokens: 64, warning_callback: warn });

  test.each<[string, number[], string]>([
    ["model.layers.0.self_attn.q_proj.bias", [64], "use_bias"],
    ["model.layers.0.self_attn.q_norm.weight", [16], "whether config.json belongs"],
    ["model.layers.1.mlp.experts.1.down_proj.bias", [64], "use_bias"],
    ["model.layers.1.mlp.shared_experts.gate_proj.bias", [64], "use_bias"],
    ["model.layers.0.mlp.moe_statics.e_score_correction_bias", [1, 8], "moe_layer"],
    ["model.layers.0.mlp.gate.weight", [8, 64], "moe_layer"],
    ["model.layers.1.mlp.down_proj.weight", [64, 64], "moe_layer"],
    ["model.norm.bias", [64], "use_bias"],
    ["model.embed_tokens.weight_scale", [1], "whether config.json belongs"],
    ["lm_head.bias", [512], "use_bias"],
  ])("%s is refused, by load, quantize and export", async (name, shape, hint) => {
    const folder = await withTensor(extra(name, shape));
    const uses = [
      () => loads(folder),
      () => quantize(folder, join(temporary(), "out"), { dtype: "int8" }),
      () => exportGguf(folder, join(temporary(), "x.gguf"), { type: "f32", withoutTokenizer: true }),
    ];
    for (const use of uses) await expect(use()).rejects.toThrow(at(name));
    await expect(loads(folder)).rejects.toThrow(hint);
  });

  test.each([
    ["a layer too many", "model.layers.4.input_layernorm.weight", [64], /num_hidden_layers is 4, but the weights hold 5 layers/],
    ["an expert too many", "model.layers.1.mlp.experts.8.up_proj.weight", [32, 64], /moe_num_experts is 8, but the weights hold 9 experts/],
    [
      "another head than the embedding",
      "lm_head.weight",
      [512, 64],
      /lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json says tie_word_embeddings/,
    ],
  ])("%s", async (_name, name, shape, message) => {
    await expect(loads(await withTensor(extra(name, shape)))).rejects.toThrow(message);
  });

  test("others are a warning, and what is known to be superfluous is none", async () => {
    const warnings: string[] = [];
    const known = [extra("model.mtp_block.0.norm.weight", [64]), extra("model.layers.0.self_attn.rotary_emb.inv_freq", [8])];
    const { engine } = await loads(await withTensor(...known), (text) => warnings.push(text));
    await engine.dispose();
    expect(warnings).toEqual([]);
    const strange = ["vision.a", "vision.b", "vision.c", "vision.d", "vision.e"].map((name) => extra(name, [2]));
    const folder = await withTensor(...strange);
    await (await loads(folder, (text) => warnings.push(text))).engine.dispose();
    await quantize(folder, join(temporary(), "out"), { dtype: "int8", onWarning: (text) => warnings.push(text) });
    const line = `${folder}: the model does not use the tensors vision.a, vision.b, vision.c and 2 more`;
    expect(warnings).toEqual([line, line]);
  });
});

describe("GGUF files", () => {
  async function archive(): Promise<{ file: string; bytes: Buffer }> {
    const file = join(temporary(), "model.gguf");
    await exportGguf(`${GOLDENS}moe-tiny`, file, { type: "q8_0", withoutTokenizer: true });
    return { file, bytes: readFileSync(file) };
  }

  test.each<[string, number, RegExp]>([
    ["block_count", 2_000_000, /num_hidden_layers is 2000000; at most 4096/],
    ["block_count", 3, /num_hidden_layers is 3, but the weights hold 4 layers/],
    ["block_count", 0, /num_hidden_layers is 0, not a whole number of at least 1/],
    ["expert_count", 4_000_000_000, /moe_num_experts is 4000000000; at most 4096/],
    ["expert_count", 7, /moe_num_experts is 7, but the weights hold 8 experts/],
    ["embedding_length", 2 ** 31, /hidden_size is 2147483648; at most/],
    ["feed_forward_length", 2 ** 31, /intermediate_size is 2147483648; at most/],
    ["context_length", 2 ** 31, /max_position_embeddings is 2147483648; at most/],
    ["attention.head_count", 0, /num_attention_heads is 0, not a whole number/],
  ])("%s of %d", async (key, value, message) => {
    const { file, bytes } = await archive();
    const name = `ernie4_5-moe.${key}`;
    bytes.writeUInt32LE(value, bytes.indexOf(name) + name.length + 4); // behind the type
    writeFileSync(file, bytes);
    await expect(loadModel(file, { threads: 1, kv_cache_tokens: 64 })).rejects.toThrow(message);
  });

  test("a scale that is not finite is named at load, and a tensor under another name is missing", async () => {
    const { file, bytes } = await archive();
    await overwrite(file, "model.embed_tokens.weight", 0, Uint8Array.of(0, 0x7e));
    await expect(loadModel(file, { threads: 1, kv_cache_tokens: 64 })).rejects.toThrow(
      /tensor model\.embed_tokens\.weight holds NaN at row 0, column 0/,
    );
    const at = bytes.indexOf("blk.3.ffn_norm.weight");
    bytes.write("blk.3.ffn_nerm.weight", at, "latin1");
    writeFileSync(file, bytes);
    await expect(loadModel(file, { threads: 1, kv_cache_tokens: 64 })).rejects.toThrow(/post_attention_layernorm\.weight is missing/);
  });
});
