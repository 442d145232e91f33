/** What training methods do beside their recorded numbers: biases of routers, dropout under DoRA, new heads, what is selected, and what is refused. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { referenceBackend } from "../../src/backend/reference/reference.ts";
import { Graph } from "../../src/graph/graph.ts";
import {
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  type CausalLM,
  DPOTrainer,
  PeftModel,
  Trainer,
} from "../../src/index.ts";
import { expertLinear, expertSlots, linear } from "../../src/model/linear.ts";
import { classification } from "../../src/train/classification.ts";
import { moved } from "../../src/train/router.ts";
import { select } from "../../src/train/selection.ts";
import { noise } from "../backend/builder.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS, relativeError } from "../goldens.ts";

const BASE = join(GOLDENS, "moe-tiny");
const out = scratch();
const ARGS = {
  learning_rate: 5e-3,
  max_grad_norm: 0,
  lr_scheduler_type: "constant",
  logging_steps: 1,
  shuffle: false,
  save_strategy: "no",
} as const;
const ROWS = [3, 90, 41].map((first) => {
  const input_ids = Array.from({ length: 12 }, (_, i) => 3 + ((first * (i + 1) * 7) % 500));
  return { input_ids, labels: input_ids };
});

const open: { dispose(): Promise<void> | void }[] = [];
afterAll(async () => {
  for (const each of open.reverse()) await each.dispose();
});
const kept = <T extends { dispose(): Promise<void> | void }>(each: T): T => {
  open.push(each);
  return each;
};
const causal = async (device = "cpu") => kept(await AutoModelForCausalLM.from_pretrained(BASE, { dtype: "fp32", device, threads: 1 }));
const classifier = async (options: object = { num_labels: 3 }) =>
  kept(await AutoModelForSequenceClassification.from_pretrained(BASE, { dtype: "fp32", threads: 1, ...options }));
const bias = (model: CausalLM, layer: number) =>
  model.loaded.states.get(`model.layers.${layer}.mlp.moe_statics.e_score_correction_bias`)?.read() as Float32Array;

test("the routers' biases move towards an even load, a step at a time, and a resumed run goes on with them", async () => {
  const run = async (name: string, more: object, resume = false) => {
    const model = await causal();
    await model.trainable({ layers: "3", modules: ["self_attn"], router_bias: true });
    const before = [1, 2, 3].map((layer) => bias(model, layer));
    const args = { ...ARGS, router_bias_update_rate: 0.01, per_device_train_batch_size: 2, output_dir: join(out, name), ...more };
    const trainer = kept(new Trainer({ model, args, train_dataset: ROWS }));
    await trainer.train({ resume_from_checkpoint: resume });
    return { model, before, trainer, after: [1, 2, 3].map((layer) => bias(model, layer)) };
  };
  const first = await run("one", { max_steps: 1 });
  const plain = await causal();
  const loads = new Map([1, 2, 3].map((layer) => [layer, new Float64Array(8)]));
  for (const { input_ids } of ROWS.slice(0, 2)) {
    const { routing } = await plain.engine.inspect(input_ids, { logits: false, routing: true });
    for (const { layer, experts } of routing) for (const e of experts) (loads.get(layer) as Float64Array)[e]++;
  }
  for (const [i, layer] of [1, 2, 3].entries()) {
    const load = loads.get(layer) as Float64Array;
    const mean = load.reduce((a, b) => a + b) / 8;
    expect(first.after[i]).toEqual(moved(first.before[i], load, mean, 0.01));
    expect(first.after[i]).not.toEqual(first.before[i]);
    load.forEach((n, e) => {
      expect(Math.sign(first.after[i][e] - first.before[i][e])).toBe(Math.sign(mean - n));
    });
  }
  const busiest = [...loads.values()].reduce((sum, load) => sum + Math.max(...load) / (load.reduce((a, b) => a + b) / 8) / 3, 0);
  expect(first.trainer.state.log_history[0].expert_load_max).toBeCloseTo(busiest, 6);

  const whole = await run("whole", { max_steps: 4 });
  await run("parts", { max_steps: 2, save_strategy: "steps", save_steps: 2 });
  const rest = await run("parts", { max_steps: 4, save_strategy: "steps", save_steps: 2 }, true);
  expect(rest.after).toEqual(whole.after);
  const losses = (trainer: Pick<Trainer, "state">) => trainer.state.log_history.flatMap(({ loss }) => loss ?? []);
  expect(losses(rest.trainer)).toEqual(losses(whole.trainer));
  await whole.model.save_pretrained(join(out, "saved"));
  const again = kept(await AutoModelForCausalLM.from_pretrained(join(out, "saved"), { threads: 1 }));
  await again.trainable({ modules: ["o_proj"], router_bias: true });
  expect([1, 2, 3].map((layer) => bias(again, layer))).toEqual(whole.after);

  const adapters = kept(await PeftModel.create(await causal(), { r: 2 }));
  const refused = new Trainer({ model: adapters, args: { ...ARGS, router_bias_update_rate: 0.01, output_dir: out }, train_dataset: ROWS });
  await expect(refused.train()).rejects.toThrow(/router_bias_update_rate: the routers' biases belong to the base model/);
}, 60_000);

test("DoRA with dropout: what is left of x goes through W' - W, and x through W; experts alike", async () => {
  const [rows, into, wide, rank, experts, chosen] = [5, 6, 4, 2, 3, 2];
  const [scale, dropout] = [0.8, 0.4];
  const g = new Graph();
  const values = new Map<string, Float32Array>();
  const state = (name: string, shape: number[]) => {
    values.set(
      name,
      noise(
        shape.reduce((a, b) => a * b),
        values.size + 1,
      ),
    );
    return g.state(name, shape, "f32");
  };
  const x = g.input("x", [rows, into], "f32");
  const seed = g.input("seed", [2], "i32");
  const adapter = (prefix: string, stack: number[]) => ({
    a: state(`${prefix}a`, [...stack, rank, into]),
    b: state(`${prefix}b`, [...stack, wide, rank]),
    magnitude: state(`${prefix}m`, [...stack, wide]),
    ...{ scale, dropout, stream: 3 },
  });
  const one = { weight: state("w", [wide, into]), bias: state("bias", [wide]), adapter: adapter("", []) };
  const many = { weight: state("ws", [experts, wide, into]), adapter: adapter("s", [experts]) };
  const slots = expertSlots(g, g.input("chosen", [rows, chosen], "i32"), experts, {});
  g.output("y", linear(g, x, one, { seed }));
  g.output("z", expertLinear(g, x, many, slots, chosen, { seed }));
  g.output("dropped", g.dropout(x, seed, dropout, 3));
  const backend = referenceBackend();
  const states = new Map(
    g.values.filter((t) => t.kind === "state").map((t) => [t.name as string, backend.state("f32", t.shape.map(Number))]),
  );
  for (const [name, numbers] of values) states.get(name)?.write(numbers);
  const program = backend.prepare(g, {}, await backend.load([]), states);
  const xs = noise(rows * into, 40);
  const picks = Int32Array.of(0, 1, 2, 0, 1, 2, 0, 2, 1, 0);
  const [y, z, left] = [new Float32Array(rows * wide), new Float32Array(rows * chosen * wide), new Float32Array(rows * into)];
  await program.run({}, { x: xs, seed: Int32Array.of(5, 6), chosen: picks }, { y, z, dropped: left });
  expect(left.filter((v) => v === 0).length).toBeGreaterThan(3);
  const expected = (r: number, prefix: string, e: number, i: number, shift: number): number => {
    const at = (name: string, index: number) => (values.get(name) as Float32Array)[index];
    const w = Array.from({ length: into }, (_, j) => at(prefix ? "ws" : "w", (e * wide + i) * into + j));
    const moved_ = w.map((v, j) => {
      let sum = v;
      for (let q = 0; q < rank; q++)
        sum += scale * at(`${prefix}b`, (e * wide + i) * rank + q) * at(`${prefix}a`, (e * rank + q) * into + j);
      return sum;
    });
    const by = at(`${prefix}m`, e * wide + i) / Math.hypot(...moved_);
    return w.reduce((sum, v, j) => sum + v * xs[r * into + j] + (by * moved_[j] - v) * left[r * into + j], shift);
  };
  const [wantY, wantZ] = [y.slice(), z.slice()];
  for (let r = 0; r < rows; r++)
    for (let i = 0; i < wide; i++) {
      wantY[r * wide + i] = expected(r, "", 0, i, (values.get("bias") as Float32Array)[i]);
      for (let s = 0; s < chosen; s++) wantZ[(r * chosen + s) * wide + i] = expected(r, "s", picks[r * chosen + s], i, 0);
    }
  expect(relativeError(y, wantY)).toBeLessThan(1e-5);
  expect(relativeError(z, wantZ)).toBeLessThan(1e-5);
});

test("frozen layers and modules stay out of a selection, and a head is always in it", async () => {
  const { model } = (await classifier()).loaded;
  const names = (selection: Parameters<typeof select>[1]) => [...select(model, selection).trained];
  const top = names({ freeze_layers: "0-2", freeze_modules: ["mlp.experts"] });
  expect(top.filter((name) => /layers\.[0-2]\.|embed_tokens|\.experts\.|correction_bias/.test(name))).toEqual([]);
  expect(top).toEqual(expect.arrayContaining(["model.layers.3.self_attn.q_proj.weight", "model.norm.weight", "score.weight"]));
  expect(names({ freeze_layers: [1] })).toContain("model.embed_tokens.weight");
  expect(names({ layers: "3", always: ["score"] })).toContain("score.weight");
  expect(names({ layers: "3" })).not.toContain("score.weight");
  expect(() => select(model, { modules: ["lstm"], always: ["score"] })).toThrow(/matches no parameter/);
});

test("a new head learns by itself or beside adapters, and its folders load", async () => {
  const rows = ROWS.map(({ input_ids }, i) => ({ input_ids, labels: i }));
  const head = await classifier({ id2label: { 0: "bad", 1: "so", 2: "good" } });
  await head.trainable({ modules: ["score"] });
  const before = head.loaded.states.get("score.weight")?.read() as Float32Array;
  const deviation = Math.sqrt(before.reduce((sum, v) => sum + v * v, 0) / before.length);
  expect(deviation).toBeGreaterThan(0.015);
  expect(deviation).toBeLessThan(0.025);
  expect([...(await head.trainee()).trained]).toEqual(["score.weight"]);
  const train = async (model: object, name: string) => {
    const args = { ...ARGS, learning_rate: 0.05, max_steps: 8, output_dir: join(out, name) };
    const trainer = kept(new Trainer({ model: model as typeof head, args, train_dataset: rows, eval_dataset: rows }));
    await trainer.train();
    return trainer.evaluate();
  };
  expect(await train(head, "head")).toMatchObject({ eval_accuracy: 1, eval_f1: 1 });

  const base = await classifier({ id2label: { 0: "bad", 1: "so", 2: "good" } });
  const model = kept(await PeftModel.create(base, { r: 2, target_modules: ["q_proj", "gate_proj"], use_dora: true }));
  expect([...model.trainee().trained]).toContain("score.weight");
  expect(await train(model, "adapters")).toMatchObject({ eval_accuracy: 1, eval_f1: 1 });
  const folder = join(out, "adapters-saved");
  await model.save_pretrained(folder);
  const config = JSON.parse(readFileSync(join(folder, "adapter_config.json"), "utf8"));
  expect(config).toMatchObject({
    task_type: "SEQ_CLS",
    modules_to_save: ["classifier", "score"],
    use_dora: true,
    base_model_name_or_path: BASE,
  });
  expect(() => model.generate({ input_ids: [[5]] })).toThrow(/is a classifier/);
  const again = kept(await PeftModel.from_pretrained(await classifier(), folder));
  const input_ids = rows.map((row) => row.input_ids);
  expect((await again.forward({ input_ids })).logits.data).toEqual((await model.forward({ input_ids })).logits.data);
  await expect(PeftModel.from_pretrained(await causal(), folder)).rejects.toThrow(/score\.weight.* has no place in the base model/);
  await expect(classifier({ num_labels: 0 })).rejects.toThrow(/num_labels/);
  await expect(classifier({ num_labels: 2, id2label: { 0: "a" } })).rejects.toThrow(/id2label names 1 classes, and num_labels is 2/);
}, 60_000);

test("accuracy and F1 are scikit-learn's", () => {
  const example = (labels: number | number[]) => ({ input_ids: [5], labels });
  const single = classification({ problem: "single_label_classification", classes: 3 });
  const meter = single.meter?.();
  // Predicted 0 0 1 1, actual 0 1 1 0: F1 of class 0 and class 1 is 0.5 each, and class 2 does not occur.
  meter?.add([0, 1, 1, 0].map(example), { logits: Float32Array.of(2, 1, 0, 2, 1, 0, 0, 3, 1, 0, 3, 1) });
  expect(meter?.values()).toEqual({ accuracy: 0.5, f1: 0.5 });
  const several = classification({ problem: "multi_label_classification", classes: 2 }).meter?.();
  // Decisions: right yes, right no; wrong yes, right yes: 2 * 2 / (3 + 2).
  several?.add([example([1, 0]), example([0, 1])], { logits: Float32Array.of(1, -1, 1, 1) });
  expect(several?.values()).toEqual({ accuracy: 0.5, f1: 0.8 });
  const numbers = classification({ problem: "regression", classes: 1 }).meter?.();
  numbers?.add([example(1), example(-1)], { logits: Float32Array.of(2, 1) });
  expect(numbers?.values()).toEqual({ mse: 2.5, mae: 1.5 });
});

test("rows and arguments that cannot be used are refused, with what there is", async () => {
  const limits = { name: "rows", vocabSize: 512, longest: 4 };
  const single = classification({ problem: "single_label_classification", classes: 3 });
  const several = classification({ problem: "multi_label_classification", classes: 2 });
  expect(() => single.check({ input_ids: [5], labels: 3 }, 7, limits)).toThrow("rows, row 7: labels is 3; expected one class, from 0 to 2");
  expect(() => single.check({ input_ids: [], labels: 0 }, 0, limits)).toThrow(/has no tokens/);
  expect(() => single.check({ input_ids: [512], labels: 0 }, 0, limits)).toThrow(/outside the vocabulary of 512/);
  expect(() => single.check({ input_ids: [1, 2, 3, 4, 5], labels: 0 }, 0, limits)).toThrow(/has 5 tokens, the limit is 4/);
  expect(() => several.check({ input_ids: [5], labels: [1] }, 0, limits)).toThrow(/labels is \[1\]; expected 2 numbers/);
  expect(() => several.check({ input_ids: [5], labels: [1, 2] }, 0, limits)).toThrow(/labels holds 2; expected 0 or 1/);
  const model = await causal();
  const row = { prompt_ids: [5, 6], chosen_ids: [7], rejected_ids: [8] };
  const args = { ...ARGS, output_dir: join(out, "refused") };
  const alone = kept(new DPOTrainer({ model, args, train_dataset: [row] }));
  await expect(alone.train()).rejects.toThrow(/row 0: has no ref_chosen_logps and ref_rejected_logps, and there is no reference model/);
  const empty = kept(new DPOTrainer({ model, ref_model: await causal(), args, train_dataset: [{ ...row, rejected_ids: [] }] }));
  await expect(empty.train()).rejects.toThrow(/row 0: rejected_ids has no tokens/);
  expect(() => new DPOTrainer({ model, args: { ...args, beta: 0 } })).toThrow(/beta is 0; expected a number above 0/);
  expect(() => new DPOTrainer({ model, args: { ...args, label_smoothing: 0.5 } })).toThrow(/label_smoothing is 0.5/);
  await expect(PeftModel.create(model, { use_dora: true, target_parameters: ["mlp.gate.weight"] })).rejects.toThrow(
    /use_dora does not work with target_parameters/,
  );
  await expect(PeftModel.create(model, { use_dora: true, target_modules: ["mlp.experts.0.gate_proj"] })).rejects.toThrow(
    /has magnitudes for all of its experts or for none/,
  );
});

test("DPO changes a whole model against another one", async () => {
  const model = await causal();
  const rows = [
    { prompt_ids: [5, 6, 7], chosen_ids: [8, 9], rejected_ids: [10, 11, 12] },
    { prompt_ids: [15, 16], chosen_ids: [18, 19, 20], rejected_ids: [21] },
  ];
  await model.trainable({ layers: "2-3" });
  const args = { ...ARGS, learning_rate: 1e-3, max_steps: 4, output_dir: join(out, "whole-dpo"), beta: 0.5 };
  const trainer = kept(new DPOTrainer({ model, ref_model: await causal(), args, train_dataset: rows, eval_dataset: rows }));
  await trainer.train();
  const [first] = trainer.state.log_history;
  expect(first.loss).toBeCloseTo(Math.log(2), 5); // nothing differs from the reference yet
  expect(first["rewards/margins"]).toBeCloseTo(0, 5);
  expect(await trainer.evaluate()).toMatchObject({ "eval_rewards/accuracies": 1 });
}, 60_000);
