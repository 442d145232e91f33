/** The library's Trainer and PeftModel against recorded runs of transformers and PEFT, through the public API alone. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { mergeAdapter } from "../../src/api/merge.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { AutoModelForCausalLM, type CausalLM, get_peft_model, LoraConfig, PeftModel, Trainer } from "../../src/index.ts";
import { scratch } from "../checkpoint/craft.ts";
import { type Goldens, openGoldens, RECORDED_ARGS, relativeError } from "../goldens.ts";

const folder = scratch();
const LENGTH = 24;
/** The recorded optimiser. */
const ARGS = {
  ...RECORDED_ARGS,
  per_device_train_batch_size: 2,
  logging_steps: 1,
} as const;

const bases: CausalLM[] = [];
afterAll(() => Promise.all(bases.map((base) => base.dispose())));
async function open(goldens: Goldens, dtype = "fp32", device = "reference"): Promise<CausalLM> {
  const base = await AutoModelForCausalLM.from_pretrained(goldens.folder, { dtype, device, threads: 1 });
  bases.push(base);
  return base;
}

async function rows(goldens: Goldens) {
  const [ids, labels] = [(await goldens.tensor("train.input_ids")).data, (await goldens.tensor("train.labels")).data];
  const row = (data: ArrayLike<number>, r: number) => [...Array.prototype.slice.call(data, r * LENGTH, (r + 1) * LENGTH)] as number[];
  return [0, 1].map((r) => ({ input_ids: row(ids, r), labels: row(labels, r) }));
}

const losses = (trainer: Pick<Trainer, "state">) => trainer.state.log_history.flatMap(({ loss }) => (loss === undefined ? [] : [loss]));
const logits = async (model: Pick<CausalLM, "forward">, goldens: Goldens) =>
  (await model.forward({ input_ids: (await rows(goldens)).map((r) => r.input_ids) })).logits.data;
const meta = (goldens: Goldens) => JSON.parse(readFileSync(join(goldens.folder, "goldens.json"), "utf8"));
const recorded = async (goldens: Goldens, name: string) => (await goldens.tensor(name)).data;

describe.each([
  ["moe-tiny", "reference"],
  ["moe-tiny", "cpu"],
  ["dense-tiny", "reference"],
  ["dense-tiny", "cpu"],
])("%s on %s", (variant, device) => {
  test("LoRA: ten losses, the adapter that is written, its logits, and those of the merged model", async () => {
    const goldens = await openGoldens(variant);
    const base = await open(goldens, "fp32", device);
    const before = await logits(base, goldens);
    const model = await PeftModel.from_pretrained(base, join(goldens.folder, "lora-init"), { is_trainable: true });
    const out = join(folder, `${variant}-${device}-lora`);
    const trainer = new Trainer({ model, args: { ...ARGS, output_dir: out }, train_dataset: await rows(goldens) });
    await trainer.train();
    const found = losses(trainer);
    expect(found).toHaveLength(10);
    meta(goldens).lora.losses.forEach((loss: number, i: number) => {
      expect(Math.abs(found[i] - loss), `loss ${i}`).toBeLessThan(1e-4);
    });
    await model.save_pretrained(join(out, "adapter"));
    const file = (at: string) => readHeader(join(at, "adapter_model.safetensors"));
    const [mine, theirs] = [await file(join(out, "adapter")), await file(join(goldens.folder, "lora-final"))];
    expect([...mine.tensors.keys()].sort()).toEqual([...theirs.tensors.keys()].sort());
    for (const [name, entry] of theirs.tensors) {
      const floats = async (e: typeof entry) => new Float32Array(Uint8Array.from(await readTensor(e)).buffer);
      const [a, b] = [await floats(mine.tensors.get(name) as typeof entry), await floats(entry)];
      expect(Math.max(...a.map((x, i) => Math.abs(x - b[i]))), name).toBeLessThan(1e-4);
    }
    expect(relativeError(await logits(model, goldens), await recorded(goldens, "lora.final_logits"))).toBeLessThan(1e-3);
    const merged = await model.merge_and_unload();
    expect(relativeError(await logits(merged, goldens), await recorded(goldens, "lora.merged_logits"))).toBeLessThan(1e-3);
    expect(relativeError(await logits(merged, goldens), await logits(model, goldens))).toBeLessThan(1e-5);
    expect(await logits(base, goldens)).toEqual(before);
    await merged.save_pretrained(join(out, "merged"));
    const again = await AutoModelForCausalLM.from_pretrained(join(out, "merged"), { device, threads: 1 });
    bases.push(again);
    expect(await logits(again, goldens)).toEqual(await logits(merged, goldens));
    const prompt = (await goldens.ids(33)).slice(0, 8);
    const options = { input_ids: [prompt], max_new_tokens: 6, do_sample: false } as const;
    expect(await model.generate(options)).toEqual(await again.generate(options));
    // The last checkpoint is the same adapter.
    const saved = await readHeader(join(out, "checkpoint-10", "adapter_model.safetensors"));
    for (const [name, entry] of saved.tensors)
      expect(await readTensor(entry)).toEqual(await readTensor(mine.tensors.get(name) as typeof entry));
  }, 60_000);

  test("every parameter: ten losses and the resulting model, which saves and loads", async () => {
    const goldens = await openGoldens(variant);
    const model = await open(goldens, "fp32", device);
    const out = join(folder, `${variant}-${device}-full`);
    const trainer = new Trainer({ model, args: { ...ARGS, output_dir: out, save_strategy: "no" }, train_dataset: await rows(goldens) });
    await trainer.train();
    const found = losses(trainer);
    meta(goldens).full_finetune.losses.forEach((loss: number, i: number) => {
      expect(Math.abs(found[i] - loss), `loss ${i}`).toBeLessThan(1e-4);
    });
    expect(relativeError(await logits(model, goldens), await recorded(goldens, "full_finetune.final_logits"))).toBeLessThan(1e-3);
    await trainer.save_model();
    const again = await AutoModelForCausalLM.from_pretrained(out, { device, threads: 1 });
    bases.push(again);
    expect(await logits(again, goldens)).toEqual(await logits(model, goldens));
  }, 60_000);
});

test.each([
  ["int8", "reference"],
  ["int8", "cpu"],
  ["int4", "cpu"],
  ["bf16", "cpu"],
])(
  "new adapters begin as the base model, and learn over one in %s on %s",
  async (dtype, device) => {
    const goldens = await openGoldens("moe-tiny");
    const base = await open(goldens, dtype, device);
    const model = await get_peft_model(base, new LoraConfig({ r: 4, lora_alpha: 8, use_rslora: true, target_modules: "all-linear" }));
    expect(await logits(model, goldens)).toEqual(await logits(base, goldens));
    const lines: string[] = [];
    model.print_trainable_parameters({ table: true, print: (text) => lines.push(text) });
    expect(lines[0]).toMatch(/mlp\.experts\.gate_proj +1-3 +9,216/); // 3 layers x 8 experts x 4 x (64 + 32)
    expect(lines[0]).toMatch(/trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}/);
    const args = { ...ARGS, output_dir: join(folder, `${dtype}-${device}`), save_strategy: "no" } as const;
    const trainer = new Trainer({ model, args, train_dataset: await rows(goldens) });
    await trainer.train();
    const found = losses(trainer);
    expect(found[9]).toBeLessThan(found[0] - 0.5);
  },
  60_000,
);

test("what cannot be trained is refused, with what there is", async () => {
  const goldens = await openGoldens("moe-tiny");
  const base = await open(goldens);
  await expect(PeftModel.create(base, { target_modules: ["query"] })).rejects.toThrow(
    /target_modules \["query"\] match no module of the model; it has embed_tokens, self_attn\.q_proj, .*mlp\.gate, mlp\.experts\.gate_proj, .*lm_head/,
  );
  await expect(base.trainable({ modules: ["lstm"] })).rejects.toThrow(
    /matches no parameter; layers are 0-3, modules embed_tokens, input_layernorm/,
  );
  await expect(base.trainable({ layers: "2-9" })).rejects.toThrow(/layers: '2-9' is outside of 0-3/);
  await expect(base.trainable({ experts: { "0": [1] } })).rejects.toThrow(/experts: layer 0 has no routed experts; layers 1-3 have/);
  await expect(base.trainable({ experts: { "1": [8] } })).rejects.toThrow(/experts: layer 1 has no expert 8; they are 0-7/);
  const frozen = await PeftModel.from_pretrained(base, join(goldens.folder, "lora-init"));
  const trainer = new Trainer({ model: frozen, args: { output_dir: join(folder, "frozen") }, train_dataset: await rows(goldens) });
  await expect(trainer.train()).rejects.toThrow(/no parameter of the model is selected for training/);
  expect(() => new LoraConfig({ rank: 8 } as object)).toThrow(/LoraConfig has no option 'rank'/);
});

test("batches whose gradients add up are as one batch, and bfloat16 stays near float32", async () => {
  const goldens = await openGoldens("moe-tiny");
  const run = async (more: object, name: string) => {
    const base = await open(goldens, "fp32", "cpu");
    const model = await PeftModel.from_pretrained(base, join(goldens.folder, "lora-init"), { is_trainable: true });
    const args = { ...ARGS, output_dir: join(folder, name), save_strategy: "no", max_grad_norm: 0.5, ...more } as const;
    const trainer = new Trainer({ model, args, train_dataset: await rows(goldens) });
    await trainer.train();
    return losses(trainer);
  };
  const whole = await run({}, "whole");
  const parts = await run({ per_device_train_batch_size: 1, gradient_accumulation_steps: 2 }, "parts");
  expect(relativeError(parts, whole)).toBeLessThan(1e-5);
  const half = await run({ bf16: true }, "half");
  expect(relativeError(half, whole)).toBeLessThan(1e-2);
  expect(half).not.toEqual(whole);
});

test("training some experts of some layers leaves all other numbers as they are", async () => {
  const goldens = await openGoldens("moe-tiny");
  const model = await open(goldens);
  await model.trainable({ layers: "2-3", modules: ["mlp.experts"], experts: { "2": [1, 5], "3": [0] } });
  const { states } = model.loaded;
  const before = new Map([...states].map(([name, state]) => [name, state.read()]));
  expect([...states.keys()].filter((name) => !name.includes("mlp.experts"))).toEqual([]);
  const args = { ...ARGS, output_dir: join(folder, "experts"), save_strategy: "no", max_steps: 2 } as const;
  await new Trainer({ model, args, train_dataset: await rows(goldens) }).train();
  for (const [name, state] of states) {
    const [old, now] = [before.get(name) as Float32Array, state.read()];
    const each = old.length / 8;
    for (let e = 0; e < 8; e++) {
      const same = now.slice(e * each, (e + 1) * each).every((x, i) => x === old[e * each + i]);
      const chosen = name.includes("layers.2.") ? [1, 5] : [0];
      if (!chosen.includes(e)) expect(same, `${name} ${e}`).toBe(true);
    }
    expect(now, name).not.toEqual(old);
  }
});

test.each(["reference", "cpu"])(
  "adapters of the router and of some experts merge, in memory and from folder to folder (%s)",
  async (device) => {
    const goldens = await openGoldens("moe-tiny");
    const base = await open(goldens, "fp32", device);
    const model = await PeftModel.create(base, {
      r: 3,
      lora_alpha: 6,
      init_lora_weights: false,
      target_modules: ".*experts\\.[25]\\.(up|down)_proj|.*self_attn\\.o_proj",
      target_parameters: ["mlp.gate.weight"],
      alpha_pattern: { o_proj: 3 },
    });
    const adapted = await logits(model, goldens);
    expect(relativeError(adapted, await logits(base, goldens))).toBeGreaterThan(1e-2);
    const merged = await model.merge_and_unload();
    expect(relativeError(await logits(merged, goldens), adapted)).toBeLessThan(1e-5);
    const out = join(folder, `router-${device}`);
    await model.save_pretrained(join(out, "adapter"));
    const again = await PeftModel.from_pretrained(base, join(out, "adapter"));
    expect(await logits(again, goldens)).toEqual(adapted);
    const written = await mergeAdapter(goldens.folder, join(out, "adapter"), join(out, "merged"));
    expect(written.merged).toBe(4 + 3 * (2 + 1)); // o_proj of each layer; up, down and the router of each mixture
    const loaded = await AutoModelForCausalLM.from_pretrained(join(out, "merged"), { device, threads: 1 });
    bases.push(loaded);
    expect(relativeError(await logits(loaded, goldens), adapted)).toBeLessThan(1e-5);
  },
  60_000,
);
