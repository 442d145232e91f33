/**
 * Adapters of the embedding and the head: PEFT's names and shapes, numbers against a model whose matrices were merged in float64, training,
 * and matrices that the two share.
 */
import { readFileSync } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { mergeAdapter } from "../../src/api/merge.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { type TensorData, writeSafetensors } from "../../src/checkpoint/writer.ts";
import { AutoModelForCausalLM, type CausalLM, DPOTrainer, PeftModel, Trainer } from "../../src/index.ts";
import { noise } from "../backend/builder.ts";
import { scratch } from "../checkpoint/craft.ts";
import { bytesOf } from "../classifierfolder.ts";
import { GOLDENS, relativeError } from "../goldens.ts";

const out = scratch();
const RANK = 3;
const ALPHA = 6;
const SCALE = ALPHA / RANK;
const BOTH = ["embed_tokens", "lm_head"];
const input_ids = [Array.from({ length: 14 }, (_, i) => 3 + ((i * 37) % 120)), Array.from({ length: 9 }, (_, i) => 9 + ((i * 11) % 120))];
const rows = input_ids.map((ids) => ({ input_ids: ids, labels: ids }));
const args = {
  learning_rate: 1e-2,
  lr_scheduler_type: "constant",
  max_grad_norm: 0,
  logging_steps: 1,
  shuffle: false,
  save_strategy: "no",
  per_device_train_batch_size: 2,
} as const;

const open: { dispose(): Promise<void> }[] = [];
afterAll(async () => {
  for (const each of open.reverse()) await each.dispose();
});
const kept = <T extends { dispose(): Promise<void> }>(each: T): T => {
  open.push(each);
  return each;
};
const base = async (variant: string, options: object = {}) =>
  kept(await AutoModelForCausalLM.from_pretrained(join(GOLDENS, variant), { dtype: "fp32", threads: 2, ...options }));
const configOf = (folder: string) => JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
const logits = async (model: Pick<CausalLM, "forward">, more: object = {}) => (await model.forward({ input_ids, ...more })).logits.data;

interface Matrices {
  /** As PEFT stores them. */
  readonly tensors: readonly (TensorData & { readonly values: Float32Array })[];
  readonly vocab: number;
  readonly hidden: number;
}

function matrices(variant: string, modules: readonly string[]): Matrices {
  const { vocab_size: vocab, hidden_size: hidden } = configOf(join(GOLDENS, variant));
  const tensor = (name: string, shape: readonly number[], seed: number) => {
    const values = noise(shape[0] * shape[1], seed).map((x) => x * 0.2);
    return { name: `base_model.model.${name}`, dtype: "F32" as const, shape, data: bytesOf(values), values };
  };
  const embedding = [
    tensor("model.embed_tokens.lora_embedding_A", [RANK, vocab], 1),
    tensor("model.embed_tokens.lora_embedding_B", [hidden, RANK], 2),
  ];
  const head = [tensor("lm_head.lora_A.weight", [RANK, hidden], 3), tensor("lm_head.lora_B.weight", [vocab, RANK], 4)];
  return { vocab, hidden, tensors: [...(modules.includes("embed_tokens") ? embedding : []), ...(modules.includes("lm_head") ? head : [])] };
}

/** A folder as PEFT writes it for these modules; it adds copies of the base's matrices. */
async function adapter(variant: string, modules: readonly string[], name: string, copies: readonly TensorData[] = []): Promise<string> {
  const folder = join(out, name);
  await mkdir(folder);
  const config = { peft_type: "LORA", task_type: "CAUSAL_LM", r: RANK, lora_alpha: ALPHA, target_modules: modules, peft_version: "0.19.1" };
  await writeFile(join(folder, "adapter_config.json"), JSON.stringify(config));
  await writeSafetensors(join(folder, "adapter_model.safetensors"), [...matrices(variant, modules).tensors, ...copies]);
  return folder;
}

async function stored(folder: string, name: string): Promise<Float32Array> {
  const entry = (await readHeader(join(folder, "model.safetensors"))).tensors.get(name);
  if (!entry) throw new Error(`no ${name}`);
  const bytes = await readTensor(entry);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

/** The base's folder with matrices E + s A^T B^T and W + s B A, computed in float64; the two are apart. */
async function mergedByHand(variant: string, modules: readonly string[], name: string): Promise<string> {
  const from = join(GOLDENS, variant);
  const { tensors, vocab, hidden } = matrices(variant, modules);
  const of = (end: string) => tensors.find((t) => t.name.endsWith(end))?.values;
  const embedding = await stored(from, "model.embed_tokens.weight");
  const head = configOf(from).tie_word_embeddings ? embedding : await stored(from, "lm_head.weight");
  const sum = (matrix: Float32Array, by: (token: number, column: number) => number) =>
    Float32Array.from(matrix, (x, i) => x + by(Math.floor(i / hidden), i % hidden));
  const [ea, eb] = [of("lora_embedding_A"), of("lora_embedding_B")];
  const [ha, hb] = [of("lm_head.lora_A.weight"), of("lm_head.lora_B.weight")];
  const product = (get: (r: number) => number) => SCALE * Array.from({ length: RANK }, (_, r) => get(r)).reduce((a, b) => a + b, 0);
  const parts = new Map([
    ["model.embed_tokens.weight", sum(embedding, (t, c) => (ea && eb ? product((r) => ea[r * vocab + t] * eb[c * RANK + r]) : 0))],
    ["lm_head.weight", sum(head, (t, c) => (ha && hb ? product((r) => hb[t * RANK + r] * ha[r * hidden + c]) : 0))],
  ]);
  const folder = join(out, name);
  await mkdir(folder);
  await writeFile(join(folder, "config.json"), JSON.stringify({ ...configOf(from), tie_word_embeddings: false }));
  const others = [...(await readHeader(join(from, "model.safetensors"))).tensors.values()].filter((t) => !parts.has(t.name));
  await writeSafetensors(join(folder, "model.safetensors"), [
    ...others.map((t): TensorData => ({ name: t.name, dtype: t.dtype, shape: t.shape, data: () => readTensor(t) })),
    ...[...parts].map(([own, values]): TensorData => ({ name: own, dtype: "F32", shape: [vocab, hidden], data: bytesOf(values) })),
  ]);
  return folder;
}

describe.each(
  ["moe-tiny", "dense-bias", "moe-bias"].flatMap((variant) =>
    [BOTH, ["embed_tokens"], ["lm_head"]].map((modules) => [variant, modules] as const),
  ),
)("%s, %j", (variant, modules) => {
  const name = `${variant}-${modules.join("-")}`;

  test("a PEFT folder computes what matrices merged in float64 compute: adapted, at run time, and merged in both ways", async () => {
    const folder = await adapter(variant, modules, name);
    const byHand = kept(
      await AutoModelForCausalLM.from_pretrained(await mergedByHand(variant, modules, `${name}-hand`), { dtype: "fp32", threads: 2 }),
    );
    const expected = await logits(byHand);
    const model = await base(variant);
    const plain = await logits(model);
    expect(relativeError(plain, expected)).toBeGreaterThan(1e-2);

    const adapted = kept(await PeftModel.from_pretrained(model, folder));
    expect(relativeError(await logits(adapted), expected)).toBeLessThan(1e-5);
    const whole = kept(await adapted.merge_and_unload());
    expect(relativeError(await logits(whole), expected)).toBeLessThan(1e-5);
    await whole.save_pretrained(join(out, `${name}-whole`));
    expect(configOf(join(out, `${name}-whole`)).tie_word_embeddings).toBe(false);
    const reloaded = kept(await AutoModelForCausalLM.from_pretrained(join(out, `${name}-whole`), { dtype: "fp32", threads: 2 }));
    expect(await logits(reloaded)).toEqual(await logits(whole));

    await model.load_adapter(folder, { adapter_name: "words" });
    await model.load_adapter(folder, { adapter_name: "half", scale: 0.5 });
    await model.add_weighted_adapter(["half", "half"], [1, 1], { adapter_name: "twice" });
    const mixed = await Promise.all(["words", null, "twice"].map((each) => logits(model, { adapter: each })));
    expect(relativeError(mixed[0], expected)).toBeLessThan(1e-5);
    expect(mixed[1]).toEqual(plain);
    expect(relativeError(mixed[2], expected)).toBeLessThan(1e-5);
    const options = { input_ids, max_new_tokens: 6 };
    expect(await model.generate({ ...options, adapter: "words" })).toEqual(await byHand.generate(options));

    const merged = join(out, `${name}-merged`);
    await mergeAdapter(join(GOLDENS, variant), folder, merged);
    expect(configOf(merged).tie_word_embeddings).toBe(false);
    const again = kept(await AutoModelForCausalLM.from_pretrained(merged, { dtype: "fp32", threads: 2 }));
    expect(relativeError(await logits(again), expected)).toBeLessThan(1e-5);
  });
});

test("new adapters begin as in PEFT, change nothing yet, and learn: on both backends alike, in what is saved and read, and beside others", async () => {
  const losses: number[][] = [];
  for (const device of ["reference", "cpu"]) {
    const model = await base("moe-tiny", { device });
    const before = await logits(model);
    const adapted = kept(await PeftModel.create(model, { r: RANK, target_modules: [...BOTH, "q_proj"], lora_dropout: 0.1 }));
    const { states } = adapted.model.loaded;
    const values = (name: string) => states.get(name)?.read() as Float32Array;
    expect(values("model.embed_tokens.lora_embedding_A").every((x) => x === 0)).toBe(true);
    const b = values("model.embed_tokens.lora_embedding_B");
    expect(Math.sqrt(b.reduce((sum, x) => sum + x * x, 0) / b.length)).toBeGreaterThan(0.8); // normal, of deviation 1
    expect(values("lm_head.lora_B.weight").every((x) => x === 0)).toBe(true);
    expect(await logits(adapted)).toEqual(before);

    const steps = device === "reference" ? 2 : 6;
    const trainer = new Trainer({ model: adapted, args: { ...args, max_steps: steps, output_dir: out }, train_dataset: rows });
    await trainer.train();
    losses.push(trainer.state.log_history.flatMap(({ loss }) => loss ?? []));
    trainer.dispose();
    if (device === "reference") continue;
    const folder = join(out, "trained");
    await adapted.save_pretrained(folder);
    const config = JSON.parse(await readFile(join(folder, "adapter_config.json"), "utf8"));
    expect(config.target_modules).toEqual([...BOTH, "q_proj"]);
    const { tensors } = await readHeader(join(folder, "adapter_model.safetensors"));
    const { vocab_size: vocab, hidden_size: hidden } = configOf(join(GOLDENS, "moe-tiny"));
    const shapes = Object.fromEntries([...tensors].filter(([name]) => !name.includes("q_proj")).map(([name, { shape }]) => [name, shape]));
    expect(shapes).toEqual({
      "base_model.model.model.embed_tokens.lora_embedding_A": [RANK, vocab],
      "base_model.model.model.embed_tokens.lora_embedding_B": [hidden, RANK],
      "base_model.model.lm_head.lora_A.weight": [RANK, hidden],
      "base_model.model.lm_head.lora_B.weight": [vocab, RANK],
    });
    const tuned = await logits(adapted);
    expect(relativeError(tuned, before)).toBeGreaterThan(1e-3);
    expect(await logits(kept(await PeftModel.from_pretrained(model, folder)))).toEqual(tuned);
    await model.load_adapter(folder);
    expect(relativeError(await logits(model, { adapter: "default" }), tuned)).toBeLessThan(1e-5);
  }
  const [reference, native] = losses;
  expect(relativeError(native.slice(0, 2), reference)).toBeLessThan(1e-4);
  expect(native[5]).toBeLessThan(native[0]);
}, 120_000);

test("bfloat16 products, frozen int8 matrices and preferences train them too", async () => {
  for (const [dtype, bf16] of [
    ["bf16", true],
    ["int8", false],
  ] as const) {
    const adapted = kept(await PeftModel.create(await base("moe-tiny", { dtype }), { r: RANK, target_modules: BOTH }));
    const trainer = new Trainer({ model: adapted, args: { ...args, bf16, max_steps: 6, output_dir: out }, train_dataset: rows });
    await trainer.train();
    const losses = trainer.state.log_history.flatMap(({ loss }) => loss ?? []);
    expect(losses[5], dtype).toBeLessThan(losses[0]);
    trainer.dispose();
  }
  const adapted = kept(await PeftModel.create(await base("moe-tiny"), { r: RANK, target_modules: ["lm_head"] }));
  const train_dataset = [{ prompt_ids: [5, 6, 7], chosen_ids: [8, 9, 2], rejected_ids: [30, 31, 2] }];
  const dpo = new DPOTrainer({ model: adapted, args: { ...args, max_steps: 5, output_dir: out }, train_dataset });
  await dpo.train();
  const history = dpo.state.log_history.flatMap(({ loss }) => loss ?? []);
  expect(history[0]).toBeCloseTo(Math.log(2), 5); // the branch is still nothing
  expect(history[4]).toBeLessThan(history[0]);
  dpo.dispose();
}, 60_000);

test("PEFT's copies of the base's matrices are accepted when they fit; what cannot be computed is refused by name", async () => {
  const model = await base("moe-tiny");
  const { vocab_size: vocab, hidden_size: hidden } = configOf(join(GOLDENS, "moe-tiny"));
  const matrix = await stored(join(GOLDENS, "moe-tiny"), "model.embed_tokens.weight"); // which is the head's, too
  const copy = (rowsOf: number, change = (values: Float32Array) => values): TensorData => {
    const values = new Float32Array(rowsOf * hidden);
    values.set(matrix);
    return { name: "base_model.model.lm_head.base_layer.weight", dtype: "F32", shape: [rowsOf, hidden], data: bytesOf(change(values)) };
  };
  const folder = await adapter("moe-tiny", ["lm_head"], "with-copy", [copy(vocab)]);
  const plain = await adapter("moe-tiny", ["lm_head"], "without-copy");
  const each = [];
  for (const path of [folder, plain]) each.push(await logits(kept(await PeftModel.from_pretrained(model, path))));
  expect(each[0]).toEqual(each[1]);
  const resized = await adapter("moe-tiny", ["lm_head"], "resized", [copy(vocab + 8)]);
  await expect(PeftModel.from_pretrained(model, resized)).rejects.toThrow(
    `lm_head.base_layer.weight has the shape [${vocab + 8},${hidden}], but the base model implies [${vocab},${hidden}]`,
  );
  await expect(model.load_adapter(resized)).rejects.toThrow("lm_head.base_layer.weight has the shape");
  const rounded = await adapter("moe-tiny", ["lm_head"], "rounded", [copy(vocab, (values) => values.map((x) => x * (1 + 2 ** -8)))]);
  expect(await logits(kept(await PeftModel.from_pretrained(model, rounded)))).toEqual(each[0]);
  const changed = await adapter("moe-tiny", ["lm_head"], "changed", [
    copy(vocab, (values) => {
      values[values.length - 1] += 0.5;
      return values;
    }),
  ]);
  const other = new RegExp(`is a copy of the base's, and its element ${vocab * hidden - 1} is .*the adapter belongs to another base`);
  await expect(PeftModel.from_pretrained(model, changed)).rejects.toThrow(other);
  await expect(mergeAdapter(join(GOLDENS, "moe-tiny"), changed, join(out, "changed-merged"))).rejects.toThrow(other);

  await expect(PeftModel.create(model, { target_modules: BOTH, use_dora: true })).rejects.toThrow(
    "use_dora: model.embed_tokens has no magnitudes",
  );
  await expect(PeftModel.create(model, { target_modules: ["lm_head"], use_dora: true })).rejects.toThrow(
    "use_dora: lm_head has no magnitudes",
  );
  await expect(PeftModel.create(model, { target_modules: ["lm_head"], modules_to_save: ["embed_tokens"] })).rejects.toThrow(
    "the head shares the matrix of model.embed_tokens.weight and has an adapter; choose one of the two",
  );
  const { target_modules } = (await PeftModel.create(model, { target_modules: "all-linear" })).peft_config;
  expect(target_modules).toBe("all-linear");
  const tying = join(out, "tying");
  await mkdir(tying);
  await writeFile(
    join(tying, "adapter_config.json"),
    JSON.stringify({ peft_type: "LORA", target_modules: BOTH, ensure_weight_tying: true }),
  );
  await writeSafetensors(join(tying, "adapter_model.safetensors"), [...matrices("moe-tiny", BOTH).tensors]);
  await expect(PeftModel.from_pretrained(model, tying)).rejects.toThrow("ensure_weight_tying is true, which is not supported");
});
