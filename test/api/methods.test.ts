/** Training methods against recorded runs of PyTorch, transformers and PEFT (test/fixtures/methods/record.py), on both backends. */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, describe, expect, test } from "vitest";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { gradientName } from "../../src/graph/backward.ts";
import {
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  type CausalLM,
  DPOTrainer,
  LoraConfig,
  mergeAdapter,
  PeftModel,
  type PreferenceRow,
  type SequenceClassifier,
  Trainer,
} from "../../src/index.ts";
import { CAUSAL, type Objective } from "../../src/train/loss.ts";
import { preference, Reference } from "../../src/train/preference.ts";
import { type RouterOptions, Routers } from "../../src/train/router.ts";
import { accumulatingStep } from "../../src/train/step.ts";
import type { Trainable } from "../../src/train/trainee.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS, RECORDED_ARGS, relativeError } from "../goldens.ts";

const FOLDER = fileURLToPath(new URL("../fixtures/methods/", import.meta.url));
const BASE = join(GOLDENS, "moe-tiny");
const out = scratch();
const ARGS = {
  ...RECORDED_ARGS,
  per_device_train_batch_size: 8,
  logging_steps: 1,
  shuffle: false,
  save_strategy: "no",
} as const;
const BETA = 0.3;

const open: { dispose(): Promise<void> | void }[] = [];
afterAll(async () => {
  for (const each of open.reverse()) await each.dispose();
});
const kept = <T extends { dispose(): Promise<void> | void }>(each: T): T => {
  open.push(each);
  return each;
};

const file = await readHeader(join(FOLDER, "recorded.safetensors"));
async function recorded(name: string): Promise<number[]> {
  const entry = file.tensors.get(name);
  if (!entry) throw new Error(`no recorded tensor ${name}`);
  const bytes = Uint8Array.from(await readTensor(entry)).buffer;
  return [...(entry.dtype === "I32" ? new Int32Array(bytes) : new Float32Array(bytes))];
}

async function base(device: string, folder = BASE, dtype = "fp32"): Promise<CausalLM> {
  return kept(await AutoModelForCausalLM.from_pretrained(folder, { dtype, device, threads: 1 }));
}

async function causalRows() {
  const [ids, labels] = [await recorded("causal.ids"), await recorded("causal.labels")];
  return [0, 1].map((r) => ({ input_ids: ids.slice(r * 20, (r + 1) * 20), labels: labels.slice(r * 20, (r + 1) * 20) }));
}

/** The logits of each row's last token. */
async function lastLogits(model: Pick<CausalLM, "forward">, vocab = 512): Promise<number[]> {
  const rows = await causalRows();
  const { data } = (await model.forward({ input_ids: rows.map((r) => r.input_ids.map((id) => id % vocab)) })).logits;
  return rows.flatMap((_, r) => [...data.slice((r * 20 + 19) * vocab, (r + 1) * 20 * vocab)]);
}

/** The gradients of a first step over all rows as one batch, by PEFT's names with one tensor for each expert. */
async function firstGradients<R>(model: Trainable, objective: Objective<R>, rows: readonly R[], router?: RouterOptions) {
  const trainee = await model.trainee();
  const { gradients } = accumulatingStep(trainee.model, {
    trains: (p) => trainee.trained.has(p.name),
    holds: (p) => trainee.states.has(p.name),
    dtypeOf: trainee.dtypeOf,
    objective,
    router,
  });
  const { backend, weights } = trainee;
  const trained = trainee.model.parameters.filter((p) => trainee.trained.has(p.name));
  const sums = new Map(trained.map((p) => [gradientName(p.name), backend.state("f32", p.shape)]));
  await objective.prepare?.(rows);
  const batch = objective.collate(
    rows,
    rows.reduce((n, row) => n + objective.count(row), 0),
  );
  const sizes = { rows: batch.rows, sequences: batch.sequences };
  const program = backend.prepare(gradients, sizes, weights, new Map([...trainee.states, ...sums]));
  const inputs = { ...batch.inputs, ...(router ? new Routers(trainee, router).inputs(1) : {}), seed: Int32Array.of(1, 1) };
  await program.run(sizes, inputs, { loss: new Float32Array(1) });
  program.dispose();
  const found = new Map<string, Float32Array>();
  for (const p of trained) {
    const values = (sums.get(gradientName(p.name)) as { read(): Float32Array }).read();
    const each = values.length / (p.experts ?? 1);
    for (let e = 0; e < (p.experts ?? 1); e++)
      found.set(p.experts ? p.name.replace(".experts.", `.experts.${e}.`) : p.name, values.slice(e * each, (e + 1) * each));
  }
  for (const state of sums.values()) state.dispose();
  return found;
}

/** Largest difference of a gradient as a share of its largest number, over all that were recorded. */
async function gradientError(name: string, found: ReadonlyMap<string, Float32Array>): Promise<number> {
  let [worst, count] = [0, 0];
  for (const key of file.tensors.keys()) {
    if (!key.startsWith(`${name}.gradient.`)) continue;
    const expected = await recorded(key);
    const own = found.get(key.slice(`${name}.gradient.`.length).replace(/magnitude_vector\.weight$/, "magnitude_vector"));
    if (!own) throw new Error(`${key} is not trained`);
    if (expected.every((x) => x === 0))
      expect(
        own.every((x) => x === 0),
        key,
      ).toBe(true);
    else worst = Math.max(worst, relativeError(own, expected));
    count++;
  }
  expect(count).toBeGreaterThan(3);
  return worst;
}

async function compareLosses(trainer: Pick<Trainer, "state">, name: string): Promise<void> {
  const found = trainer.state.log_history.flatMap(({ loss }) => (loss === undefined ? [] : [loss]));
  const expected = await recorded(`${name}.losses`);
  expect(found).toHaveLength(10);
  expected.forEach((loss, i) => {
    expect(Math.abs(found[i] - loss), `loss ${i}: ${found[i]}, recorded ${loss}`).toBeLessThan(1e-4);
  });
}

const logged = (trainer: Pick<Trainer, "state">, name: string) =>
  trainer.state.log_history.flatMap((entry) => (entry[name] === undefined || entry.loss === undefined ? [] : [entry[name]]));

describe.each(["reference", "cpu"])("on %s", (device) => {
  test.each(["lora", "dora"])(
    "%s with routed experts: gradients, ten losses, logits before, after and merged",
    async (name) => {
      const model = kept(await PeftModel.from_pretrained(await base(device), join(FOLDER, name), { is_trainable: true }));
      const rows = await causalRows();
      expect(relativeError(await lastLogits(model), await recorded(`${name}.first_logits`))).toBeLessThan(1e-3);
      expect(await gradientError(name, await firstGradients(model, CAUSAL, rows))).toBeLessThan(1e-3);
      const trainer = kept(new Trainer({ model, args: { ...ARGS, output_dir: join(out, device, name) }, train_dataset: rows }));
      await trainer.train();
      await compareLosses(trainer, name);
      expect(relativeError(await lastLogits(model), await recorded(`${name}.final_logits`))).toBeLessThan(1e-3);
      const merged = kept(await model.merge_and_unload());
      expect(relativeError(await lastLogits(merged), await recorded(`${name}.merged_logits`))).toBeLessThan(1e-3);
      const saved = join(out, device, `${name}-saved`);
      await model.save_pretrained(saved);
      const again = kept(await PeftModel.from_pretrained(await base(device), saved));
      expect(await lastLogits(again)).toEqual(await lastLogits(model));
      const whole = join(out, device, `${name}-merged`);
      await mergeAdapter(BASE, saved, whole);
      expect(relativeError(await lastLogits(await base(device, whole)), await recorded(`${name}.merged_logits`))).toBeLessThan(1e-3);
    },
    60_000,
  );

  test("DoRA beside a bias", async () => {
    const model = kept(await PeftModel.from_pretrained(await base(device, join(GOLDENS, "moe-bias")), join(FOLDER, "dora-bias")));
    const vocab = model.config.vocabSize;
    expect(relativeError(await lastLogits(model, vocab), await recorded("dora-bias.first_logits"))).toBeLessThan(1e-3);
  });

  test.each(["single", "multi", "regression"] as const)(
    "a classifier, %s: gradients and ten losses of the top layer, and of LoRA with the head",
    async (kind) => {
      const model = await classifier(device, kind);
      const rows = await classRows(kind);
      await model.trainable({ layers: "3", freeze_modules: ["mlp.experts", "mlp.gate"] });
      expect(await gradientError(kind, await firstGradients(model, model.objective, rows))).toBeLessThan(1e-3);
      const args = { ...ARGS, output_dir: join(out, device, kind) };
      const trainer = kept(new Trainer({ model, args, train_dataset: rows, eval_dataset: rows }));
      await trainer.train();
      await compareLosses(trainer, kind);
      const evaluated = await trainer.evaluate();
      if (kind === "regression") expect(evaluated.eval_mse).toBeCloseTo(evaluated.eval_loss as number, 5);
      else expect([evaluated.eval_accuracy, evaluated.eval_f1]).toEqual([1, 1]);
      await trainer.save_model(join(out, device, `${kind}-model`));
      const again = kept(
        await AutoModelForSequenceClassification.from_pretrained(join(out, device, `${kind}-model`), { device, threads: 1 }),
      );
      expect(again.classifier).toEqual(model.classifier);
      const input_ids = rows.map((r) => r.input_ids);
      const logits = async (m: Pick<SequenceClassifier, "classify">) => (await m.classify(input_ids)).flatMap((l) => [...l]);
      expect(await logits(again)).toEqual(await logits(model));

      const name = `${kind}-lora`;
      const plain = await classifier(device, kind);
      const peft = kept(await PeftModel.from_pretrained(plain, join(FOLDER, name), { is_trainable: true }));
      expect(await gradientError(name, await firstGradients(peft, plain.objective, rows))).toBeLessThan(1e-3);
      const second = kept(new Trainer({ model: peft, args: { ...ARGS, output_dir: join(out, device, name) }, train_dataset: rows }));
      await second.train();
      await compareLosses(second, name);
      const saved = join(out, device, `${name}-saved`);
      await peft.save_pretrained(saved);
      const [mine, theirs] = [saved, join(FOLDER, `${name}-final`)].map((at) => readHeader(join(at, "adapter_model.safetensors")));
      expect([...(await mine).tensors.keys()].sort()).toEqual([...(await theirs).tensors.keys()].sort());
      for (const [key, entry] of (await theirs).tensors) {
        const floats = async (e: typeof entry) => new Float32Array(Uint8Array.from(await readTensor(e)).buffer);
        const [a, b] = [await floats((await mine).tensors.get(key) as typeof entry), await floats(entry)];
        expect(Math.max(...a.map((x, i) => Math.abs(x - b[i]))), key).toBeLessThan(1e-3);
      }
      // The adapter's folder makes a classifier of the base at run time.
      const served = kept(
        await AutoModelForSequenceClassification.from_pretrained(BASE, { adapter: saved, dtype: "fp32", device, threads: 1 }),
      );
      expect(relativeError(await logits(served), await logits(peft.model))).toBeLessThan(1e-4);
      const merged = kept(await peft.merge_and_unload());
      expect(relativeError(await logits(merged), await logits(peft.model))).toBeLessThan(1e-4);
    },
    60_000,
  );

  test.each([
    ["dpo", 0],
    ["dpo-smooth", 0.1],
  ])(
    "%s: gradients, ten losses and TRL's rewards, against the base and against given log-probabilities",
    async (name, label_smoothing) => {
      const rows = await pairs();
      const make = async () => kept(await PeftModel.from_pretrained(await base(device), join(FOLDER, "dpo"), { is_trainable: true }));
      const model = await make();
      const objective = preference({ beta: BETA, label_smoothing }, kept(new Reference(model.reference())));
      expect(await gradientError(name, await firstGradients(model, objective, rows))).toBeLessThan(1e-3);
      const args = { ...ARGS, learning_rate: 5e-4, beta: BETA, label_smoothing, output_dir: join(out, device, name) };
      const trainer = kept(new DPOTrainer({ model, args, train_dataset: rows }));
      await trainer.train();
      await compareLosses(trainer, name);
      for (const measure of ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"])
        expect(relativeError(logged(trainer, measure), await recorded(`${name}.${measure}`)), measure).toBeLessThan(1e-3);
      const [chosen, rejected] = [await recorded("dpo.ref_chosen"), await recorded("dpo.ref_rejected")];
      const given = rows.map((row, i) => ({ ...row, ref_chosen_logps: chosen[i], ref_rejected_logps: rejected[i] }));
      const again = kept(
        new DPOTrainer({ model: await make(), args: { ...args, output_dir: `${args.output_dir}-given` }, train_dataset: given }),
      );
      await again.train();
      await compareLosses(again, name);
    },
    60_000,
  );

  test("the routers' losses: gradients, ten losses and both parts", async () => {
    const model = await base(device);
    const rows = await causalRows();
    await model.trainable();
    const router = { aux: 0.2, z: 0.05, biasRate: 0 };
    expect(await gradientError("router", await firstGradients(model, CAUSAL, rows, router))).toBeLessThan(1e-3);
    const more = { router_aux_loss_coef: router.aux, router_z_loss_coef: router.z, output_dir: join(out, device, "router") };
    const trainer = kept(new Trainer({ model, args: { ...ARGS, ...more }, train_dataset: rows }));
    await trainer.train();
    await compareLosses(trainer, "router");
    for (const measure of ["aux_loss", "router_z_loss"])
      expect(relativeError(logged(trainer, measure), await recorded(`router.${measure}`)), measure).toBeLessThan(1e-3);
    expect(logged(trainer, "expert_load_max")).toHaveLength(10);
    const added = (entry: Record<string, unknown>, prefix = "") =>
      router.aux * Number(entry[`${prefix}aux_loss`]) + router.z * Number(entry[`${prefix}router_z_loss`]);
    for (const entry of trainer.state.log_history.slice(0, 10))
      expect(Number(entry.task_loss) + added(entry)).toBeCloseTo(Number(entry.loss), 5);

    // An evaluation of the training's batch before a step is that step's loss, in both parts and as a whole.
    const before = await base(device);
    await before.trainable();
    const again = kept(new Trainer({ model: before, args: { ...ARGS, ...more, max_steps: 1 }, train_dataset: rows, eval_dataset: rows }));
    const evaluated = await again.evaluate();
    await again.train();
    const [first] = again.state.log_history.filter((entry) => entry.loss !== undefined);
    for (const name of ["loss", "task_loss", "aux_loss", "router_z_loss"])
      expect(Number(evaluated[`eval_${name}`]), name).toBeCloseTo(Number(first[name]), 5);
    expect(added(evaluated, "eval_")).toBeGreaterThan(0.01);
    const plain = kept(new Trainer({ model: before, args: { ...ARGS, output_dir: out }, eval_dataset: rows }));
    const without = await plain.evaluate();
    expect(Object.keys(without)).not.toContain("eval_aux_loss");
  }, 60_000);
});

async function classifier(device: string, kind: "single" | "multi" | "regression"): Promise<SequenceClassifier> {
  const problem_type = { single: "single_label_classification", multi: "multi_label_classification", regression: "regression" } as const;
  const options = { dtype: "fp32", device, threads: 1, num_labels: kind === "regression" ? 1 : 3, problem_type: problem_type[kind] };
  const model = kept(await AutoModelForSequenceClassification.from_pretrained(BASE, options));
  model.loaded.states.get("score.weight")?.write(Float32Array.from(await recorded(`${kind}.score`)));
  return model;
}

async function classRows(kind: string) {
  const [ids, lengths, targets] = [await recorded("classes.ids"), await recorded("classes.lengths"), await recorded(`${kind}.targets`)];
  const longest = Math.max(...lengths);
  const each = targets.length / lengths.length;
  return lengths.map((n, r) => ({
    input_ids: ids.slice(r * longest, r * longest + n),
    labels: each === 1 ? targets[r] : targets.slice(r * each, (r + 1) * each),
  }));
}

async function pairs(): Promise<PreferenceRow[]> {
  const lengths = await recorded("dpo.lengths");
  const parts = await Promise.all(["prompts", "chosen", "rejected"].map((part) => recorded(`dpo.${part}`)));
  return [0, 1, 2].map((r) => {
    const [prompt_ids, chosen_ids, rejected_ids] = parts.map((part, column) => {
      const start = [...Array(r).keys()].reduce((n, before) => n + lengths[before * 3 + column], 0);
      return part.slice(start, start + lengths[r * 3 + column]);
    });
    return { prompt_ids, chosen_ids, rejected_ids };
  });
}

test.each(["bf16", "int8", "int4"])(
  "DoRA over a frozen base in %s begins as the base and learns",
  async (dtype) => {
    const model0 = await base("cpu", BASE, dtype);
    const config = new LoraConfig({ r: 4, lora_alpha: 8, use_dora: true, lora_dropout: 0.1, target_modules: "all-linear" });
    const model = kept(await PeftModel.create(model0, config));
    expect(relativeError(await lastLogits(model), await lastLogits(model0))).toBeLessThan(2e-2);
    const trainer = kept(
      new Trainer({
        model,
        args: { ...ARGS, bf16: dtype === "bf16", output_dir: join(out, `dora-${dtype}`) },
        train_dataset: await causalRows(),
      }),
    );
    await trainer.train();
    const found = logged(trainer, "loss");
    expect(found[9]).toBeLessThan(found[0] - 0.5);
  },
  60_000,
);
