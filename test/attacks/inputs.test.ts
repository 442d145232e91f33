/** What callers and caches hand over: ids of other types, options of other libraries, caches that can't be written, files under other names. */
import { execFile } from "node:child_process";
import { chmodSync, copyFileSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { exportGguf } from "../../src/api/export.ts";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";
import { pipeline } from "../../src/api/pipeline.ts";
import { AutoTokenizer, openTokenizer } from "../../src/api/tokenizer.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { resolveModel } from "../../src/checkpoint/hub.ts";
import { readConfig } from "../../src/model/config.ts";
import type { TokenRows } from "../../src/tokenizer/ids.ts";
import { words } from "../api/folders.ts";
import { COMMIT, FakeHub } from "../checkpoint/fakehub.ts";
import { temporary } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";

describe("ids as other libraries hold them", () => {
  let model: CausalLM;
  beforeAll(async () => {
    model = await AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, { threads: 1, kv_cache_tokens: 512 });
  });
  afterAll(() => model.dispose());

  const one: [string, TokenRows][] = [
    ["numbers", [5, 6, 7]],
    ["bigints", [5n, 6n, 7n]],
    ["BigInt64Array", BigInt64Array.of(5n, 6n, 7n)],
    ["Int32Array", Int32Array.of(5, 6, 7)],
    ["a tensor [3]", { dims: [3], data: BigInt64Array.of(5n, 6n, 7n) }],
    ["a tensor [1, 3]", { dims: [1, 3], data: BigInt64Array.of(5n, 6n, 7n) }],
  ];
  test.each(one)("%s", async (_name, ids) => {
    const tokenizer = await words();
    expect(tokenizer.decode(ids as bigint[])).toBe("w5.w6.w7.");
    expect(tokenizer.batch_decode(ids)).toEqual(["w5.w6.w7."]);
    expect(tokenizer.convert_ids_to_tokens(ids as bigint[])).toEqual(["w5.", "w6.", "w7."]);
    const [expected, forward] = [
      await model.generate({ input_ids: [[5, 6, 7]], max_new_tokens: 3 }),
      await model.forward({ input_ids: [[5, 6, 7]] }),
    ];
    expect(await model.generate({ input_ids: ids, max_new_tokens: 3 })).toEqual(expected);
    expect(await model.forward({ input_ids: ids, attention_mask: { dims: [1, 3], data: BigInt64Array.of(1n, 1n, 1n) } })).toEqual(forward);
  });

  test.each<[string, TokenRows]>([
    [
      "rows of bigints",
      [
        [5n, 6n],
        [0n, 7n],
      ],
    ],
    ["rows of typed arrays", [BigInt64Array.of(5n, 6n), Int32Array.of(0, 7)]],
    ["a tensor [2, 2]", { dims: [2, 2], data: BigInt64Array.of(5n, 6n, 0n, 7n) }],
    [
      "a list of tensors",
      [
        { dims: [2], data: BigInt64Array.of(5n, 6n) },
        { dims: [1, 2], data: [0, 7] },
      ],
    ],
  ])("%s, padded", async (_name, ids) => {
    const tokenizer = await words();
    expect(tokenizer.batch_decode(ids, { skip_special_tokens: true })).toEqual(["w5.w6.", "w7."]);
    const attention_mask: TokenRows = { dims: [2, 2], data: BigInt64Array.of(1n, 1n, 0n, 1n) };
    const [a, b] = await model.generate({ input_ids: ids, attention_mask, max_new_tokens: 3 });
    expect([a.slice(0, 2), b.slice(0, 2)]).toEqual([
      [5, 6],
      [0, 7],
    ]);
    expect(b.slice(2)).toEqual((await model.generate({ input_ids: [[7]], max_new_tokens: 3 }))[0].slice(1));
  });

  test("single ids, end tokens, and what is no id", async () => {
    const tokenizer = await words();
    expect(tokenizer.convert_ids_to_tokens(5n)).toBe("w5.");
    expect(tokenizer.detokenizer().push(5n)).toBe("w5.");
    const first = (await model.generate({ input_ids: [5n, 6n], max_new_tokens: 3 }))[0];
    expect(await model.generate({ input_ids: [5n, 6n], max_new_tokens: 3, eos_token_id: [BigInt(first[2])] })).toEqual([first.slice(0, 3)]);
    for (const bad of [[99999n], [-1n], [2n ** 64n]]) {
      expect(() => tokenizer.decode(bad)).toThrow(/is not in the vocabulary of/);
      await expect(model.generate({ input_ids: bad })).rejects.toThrow(/is outside the vocabulary of 512/);
    }
    for (const bad of ["abc", {}, null, { dims: [2, 2, 2], data: new Int32Array(8) }, { dims: [2, 3], data: [1] }] as never[]) {
      await expect(model.generate({ input_ids: bad })).rejects.toThrow(/^input_ids must be rows of token ids/);
      expect(() => tokenizer.batch_decode(bad)).toThrow(/^the batch must be rows of token ids/);
      expect(() => tokenizer.decode(bad)).toThrow(/^ids must be one sequence of token ids/);
    }
  });
});

describe("options that a call does not have", () => {
  const call = async (options: object) => (await words())("w5.", options);
  test.each<[string, (options: object) => Promise<unknown>, object, RegExp]>([
    ["tokenizer", call, { text_pair: "w6." }, /^the tokenizer has no option 'text_pair': pairs of texts are not supported/],
    ["tokenizer", call, { return_tensors: "pt" }, /no option 'return_tensors': ids are always returned as plain lists; leave it out/],
    ["tokenizer", call, { maxlength: 3 }, /no option 'maxlength'; did you mean 'max_length'\?/],
    ["encode", async (o) => (await words()).encode("w5.", o), { add_special_token: false }, /did you mean 'add_special_tokens'\?/],
    ["decode", async (o) => (await words()).decode([5], o), { skipSpecialTokens: true }, /did you mean 'skip_special_tokens'\?/],
    ["template", async (o) => (await words()).apply_chat_template([], { ...o }), { return_tensors: "np" }, /no option 'return_tensors'/],
    [
      "model",
      (o) => AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, o),
      { torch_dtype: "int8" },
      /no option 'torch_dtype': give dtype/,
    ],
    ["model", (o) => AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, o), { dtpye: "int8" }, /did you mean 'dtype'\?/],
    ["tokenizer", (o) => AutoTokenizer.from_pretrained("default", o), { trust_remote_code: true }, /code of a repository is never run/],
    ["pipeline", (o) => pipeline("text-generation", "default", o), { quantised: true }, /from_pretrained has no option 'quantised'/],
  ])("%s: %o", async (_what, run, options, message) => {
    await expect(run(options)).rejects.toThrow(message);
  });

  test("an option of another library that asks for nothing is allowed", async () => {
    const nothing = { return_tensors: null, return_tensor: false, text_pair: undefined, return_token_type_ids: false };
    expect(await call(nothing)).toEqual(await call({}));
  });
});

describe("files under other names", () => {
  test("a GGUF file is known by its first bytes: in a cache, behind a link, with capitals", async () => {
    const [folder, alone] = [temporary(), temporary()];
    const file = join(folder, "model.gguf");
    await exportGguf("models/small-moe", file, { type: "q8_0" });
    const blob = join(folder, "9f86d081884c7d659a2feaa0c55ad015");
    const link = join(folder, "link");
    copyFileSync(file, blob);
    symlinkSync(blob, link);
    copyFileSync(file, join(alone, "Model.GGUF"));
    const { config } = await openCheckpoint(file);
    for (const path of [blob, link, alone, join(alone, "Model.GGUF")]) {
      expect(await resolveModel(path)).toBe(path);
      expect((await openCheckpoint(path)).config).toEqual(config);
      expect((await openTokenizer(path)).vocab_size).toBeGreaterThan(1000);
    }
  });

  test.each<[string, Buffer, RegExp]>([
    ["empty", Buffer.alloc(0), /an empty file; give the folder/],
    ["text", Buffer.from("hello, this is a text"), /a file that is not GGUF; give the folder/],
    [
      "safetensors",
      readFileSync(`${GOLDENS}moe-tiny/model.safetensors`),
      /a safetensors file; give the folder that holds config\.json and the weights/,
    ],
    ["the magic alone", Buffer.from("GGUF"), /truncated: 4 bytes/],
    ["another version", Buffer.concat([Buffer.from("GGUF"), Buffer.from([9, 0, 0, 0]), Buffer.alloc(40)]), /GGUF version 9/],
  ])("a file that is no model: %s", async (_name, bytes, message) => {
    const file = join(temporary(), "model");
    writeFileSync(file, bytes);
    await expect(resolveModel(file).then(openCheckpoint)).rejects.toThrow(message);
    await expect(resolveModel(file).then(openCheckpoint)).rejects.not.toThrow(/\n/);
  });

  test.each([
    ["Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"],
    ["Ernie4_5ForCausalLM", "Ernie4_5ForCausalLM"],
    ["Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeForCausalLM"],
    ["Ernie4_5_MoEForCausalLM", "Ernie4_5_MoeForCausalLM"],
  ] as const)("the architecture %s", (name, architecture) => {
    const raw = JSON.parse(readFileSync(`${GOLDENS}moe-tiny/config.json`, "utf8"));
    expect(readConfig({ ...raw, architectures: [name] }).architecture).toBe(architecture);
  });
});

describe("a cache that can't be written", () => {
  const hub = new FakeHub();
  beforeAll(() => hub.start());
  afterAll(() => hub.stop());

  /** Resolves `org/model` as a user who may only read the cache. */
  async function asReader(cache: string, env: Record<string, string> = {}): Promise<{ folder: string; warnings: string[] }> {
    const root = fileURLToPath(new URL("../..", import.meta.url));
    const script = `
      import { resolveModel } from ${JSON.stringify(join(root, "src/checkpoint/hub.ts"))};
      if (process.getuid() === 0) { process.setgid(65534); process.setuid(65534); }
      const warnings = [];
      const folder = await resolveModel("org/model", { retryDelayMs: 1, onWarning: (text) => warnings.push(text) }).catch((error) => "error: " + error.message);
      console.log(JSON.stringify({ folder, warnings }));`;
    const file = join(temporary(), "read.mts");
    writeFileSync(file, script);
    const { stdout } = await promisify(execFile)(process.execPath, ["--import", "tsx", file], {
      cwd: root,
      env: { ...process.env, HF_HUB_CACHE: cache, HF_HOME: cache, HF_ENDPOINT: hub.endpoint, HF_HUB_OFFLINE: "", ...env },
    });
    return JSON.parse(stdout);
  }

  /** A complete cache without write permission; `ref`: what its revision points at. */
  async function cached(ref = COMMIT): Promise<{ cache: string; snapshot: string }> {
    hub.reset();
    for (const name of ["config.json", "model.safetensors"]) hub.files.set(name, readFileSync(`${GOLDENS}dense-tiny/${name}`));
    const cache = join(temporary(), "cache");
    vi.stubEnv("HF_ENDPOINT", hub.endpoint);
    const snapshot = await resolveModel("org/model", { cache_dir: cache, local_files_only: false });
    vi.unstubAllEnvs();
    writeFileSync(join(cache, "models--org--model/refs/main"), ref);
    chmodSync(join(cache, ".."), 0o755);
    for (const folder of ["", "models--org--model", "models--org--model/refs", "models--org--model/blobs", "models--org--model/snapshots"])
      chmodSync(join(cache, folder), 0o555);
    chmodSync(snapshot, 0o555);
    return { cache, snapshot };
  }

  test("everything cached, the hub reachable: used without a write", async () => {
    const { cache, snapshot } = await cached();
    expect(await asReader(cache)).toEqual({ folder: snapshot, warnings: [] });
    expect(await asReader(cache, { HF_HUB_OFFLINE: "1" })).toEqual({ folder: snapshot, warnings: [] });
    expect(await asReader(cache, { HF_ENDPOINT: "http://127.0.0.1:9" })).toMatchObject({
      folder: snapshot,
      warnings: [expect.stringMatching(/using the cached/)],
    });
  });

  test("the revision has moved to a commit that is cached too: its ref need not be written", async () => {
    const { cache, snapshot } = await cached("b".repeat(40));
    expect(await asReader(cache)).toEqual({ folder: snapshot, warnings: [] });
  });

  test("a commit that is not cached: the complete one is used, with a warning; without one, the error says why", async () => {
    const { cache, snapshot } = await cached();
    const old = join(cache, "models--org--model/snapshots", "c".repeat(40));
    chmodSync(join(cache, "models--org--model/snapshots"), 0o755);
    mkdirSync(old);
    for (const name of ["config.json", "model.safetensors"]) copyFileSync(join(snapshot, name), join(old, name));
    chmodSync(join(cache, "models--org--model/snapshots"), 0o555);
    writeFileSync(join(cache, "models--org--model/refs/main"), "c".repeat(40));
    hub.files.set("tokenizer.json", Buffer.from("{}")); // the newer commit has one more file
    const { folder, warnings } = await asReader(cache);
    expect(folder).toBe(old);
    expect(warnings).toEqual([expect.stringMatching(/can't be written \(EACCES.*; using the cached/)]);
    writeFileSync(join(cache, "models--org--model/refs/main"), "d".repeat(40));
    expect((await asReader(cache)).folder).toMatch(/^error: .*can't be written \(EACCES/);
  });
});
