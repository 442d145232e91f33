/** What steers a run: evaluation, the best checkpoint, early stopping, moving averages, order, callbacks, and packed rows. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { AutoModelForCausalLM, type CausalExample, type CausalLM, PeftModel, Trainer, type TrainingArguments } from "../../src/index.ts";
import { CAUSAL } from "../../src/train/loss.ts";
import { ordered, rowsOf } from "../../src/train/source.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS, relativeError } from "../goldens.ts";

const folder = scratch();
let base: CausalLM;
let count = 0;
beforeAll(async () => {
  base = await AutoModelForCausalLM.from_pretrained(join(GOLDENS, "dense-tiny"), { dtype: "fp32", device: "cpu", threads: 1 });
});
afterAll(() => base.dispose());

const row = (r: number, length = 8): CausalExample => {
  const ids = Array.from({ length }, (_, i) => 3 + ((r * 37 + i * 11) % 500));
  return { input_ids: ids, labels: ids };
};
const ROWS = Array.from({ length: 6 }, (_, r) => row(r));
const QUERY = "model.layers.0.self_attn.q_proj.lora_B.weight";

async function open(
  args: Partial<TrainingArguments>,
  more: { evaluation?: readonly CausalExample[]; rows?: readonly CausalExample[] } = {},
) {
  const model = await PeftModel.create(base, { r: 2, target_modules: ["q_proj", "down_proj"] });
  const output_dir = join(folder, String(count++));
  const all = { per_device_train_batch_size: 2, learning_rate: 1e-2, logging_steps: 1, save_strategy: "no", ...args, output_dir } as const;
  return { model, output_dir, trainer: new Trainer({ model, args: all, train_dataset: more.rows ?? ROWS, eval_dataset: more.evaluation }) };
}
const query = (model: PeftModel) => model.trainee().states.get(QUERY)?.read() as Float32Array;

test("epochs, steps and the place in them are counted as in transformers", async () => {
  const { trainer } = await open({ num_train_epochs: 2, per_device_train_batch_size: 4, logging_steps: 2, logging_first_step: true });
  expect(trainer.steps()).toEqual({ total: 4, perEpoch: 2 });
  const { global_step, metrics } = await trainer.train();
  expect(global_step).toBe(4);
  const log = trainer.state.log_history.filter((e) => e.loss !== undefined);
  expect(log.map((e) => [e.step, e.epoch])).toEqual([
    [1, 0.5],
    [2, 1],
    [4, 2],
  ]);
  expect(trainer.state.num_input_tokens_seen).toBe(2 * 6 * 8);
  expect(metrics.train_loss).toBeCloseTo(trainer.state.total_loss / 4, 12);
  expect((await open({ max_steps: 9 })).trainer.steps().total).toBe(9);
  expect((await open({ num_train_epochs: 1.5, gradient_accumulation_steps: 2 })).trainer.steps()).toEqual({ total: 3, perEpoch: 2 });
  expect((await open({ num_train_epochs: 1, per_device_train_batch_size: 4, dataloader_drop_last: true })).trainer.steps().total).toBe(1);
});

test("every epoch has another order, the same for the same seed; every row comes once", () => {
  const rows = rowsOf(ROWS, "rows", CAUSAL.length);
  const order = async (epoch: number, seed: number, shuffle = true) => {
    const e = ordered(rows, epoch, { seed, shuffle, rowsPerStep: 2, grouped: false });
    return Promise.all(Array.from({ length: e.length }, async (_, i) => ROWS.indexOf(await e.row(i))));
  };
  return Promise.all([order(0, 1), order(0, 1), order(1, 1), order(0, 2), order(3, 3, false)]).then(([a, b, c, d, plain]) => {
    expect(a).toEqual(b);
    expect(c).not.toEqual(a);
    expect(d).not.toEqual(a);
    expect([...a].sort()).toEqual([0, 1, 2, 3, 4, 5]);
    expect(plain).toEqual([0, 1, 2, 3, 4, 5]);
  });
});

test("with group_by_length, batches hold rows of similar lengths, the longest first", async () => {
  const lengths = Array.from({ length: 60 }, (_, i) => 2 + ((i * 7) % 30));
  const rows = rowsOf(
    lengths.map((n, r) => row(r, n)),
    "rows",
    CAUSAL.length,
  );
  const epoch = ordered(rows, 0, { seed: 1, shuffle: true, rowsPerStep: 4, grouped: true });
  const found = Array.from({ length: epoch.length }, (_, i) => epoch.tokens(i));
  expect([...found].sort((a, b) => a - b)).toEqual([...lengths].sort((a, b) => a - b));
  expect(found[0]).toBe(Math.max(...lengths));
  const spread = (list: number[]) =>
    list.reduce((sum, _, i) => (i % 4 ? sum : sum + Math.max(...list.slice(i, i + 4)) - Math.min(...list.slice(i, i + 4))), 0);
  expect(spread(found)).toBeLessThan(0.6 * spread(lengths));
});

test("a run that gets worse stops early, and its best checkpoint is loaded and kept", async () => {
  const args = {
    eval_strategy: "steps",
    eval_steps: 1,
    save_strategy: "steps",
    save_steps: 1,
    save_total_limit: 2,
    max_steps: 30,
  } as const;
  const { trainer, model, output_dir } = await open(
    { ...args, load_best_model_at_end: true, early_stopping_patience: 3, learning_rate: 0.3 },
    { evaluation: [row(90), row(91)] },
  );
  const kept: Record<number, Float32Array> = {};
  trainer.add_callback({ on_step_end: ({ state }) => void (kept[state.global_step] = query(model)) });
  await trainer.train();
  const evals = trainer.state.log_history.filter((e) => e.eval_loss !== undefined);
  const best = evals.reduce((a, b) => ((b.eval_loss as number) < (a.eval_loss as number) ? b : a));
  expect(trainer.state.global_step).toBe(best.step + 3);
  expect(trainer.state.best_metric).toBe(best.eval_loss);
  expect(trainer.state.best_model_checkpoint).toBe(join(output_dir, `checkpoint-${best.step}`));
  expect(query(model)).toEqual(kept[best.step]);
  expect(readdirSync(output_dir).sort()).toEqual([`checkpoint-${best.step}`, `checkpoint-${best.step + 3}`].sort());
  expect((await trainer.evaluate()).eval_loss).toBe(best.eval_loss);
});

test("the evaluation's loss is the mean over tokens, however rows are batched", async () => {
  const evaluation = [row(1, 5), row(2, 20), row(3, 9)];
  const at = async (size: number) =>
    (await (await open({ per_device_eval_batch_size: size }, { evaluation })).trainer.evaluate()).eval_loss as number;
  const [one, all] = [await at(1), await at(8)];
  expect(one).toBeCloseTo(all, 5);
  const { logits } = await base.forward({ input_ids: [[...evaluation[1].input_ids]] });
  expect(logits.dims[1]).toBe(20);
});

test("packed rows train as the rows apart: no attention and no label across documents", async () => {
  const documents = [row(1, 5), row(2, 7)];
  const ids = documents.flatMap((d) => [...d.input_ids]);
  const packed = {
    input_ids: ids,
    labels: ids,
    segments: [
      [0, 5],
      [5, 7],
    ],
  } as const;
  const run = async (rows: readonly CausalExample[]) => {
    const { trainer, model } = await open({ max_steps: 3, shuffle: false }, { rows });
    await trainer.train();
    return { losses: trainer.state.log_history.flatMap((e) => e.loss ?? []), numbers: query(model) };
  };
  expect(await run([packed])).toEqual(await run(documents));
});

test("a moving average is evaluated and kept in place of the parameters", async () => {
  const plain = await open({ max_steps: 4 });
  const states: Float32Array[] = [query(plain.model)];
  plain.trainer.add_callback({ on_step_end: () => void states.push(query(plain.model)) });
  await plain.trainer.train();
  const averaged = await open({ max_steps: 4, ema_decay: 0.5 });
  await averaged.trainer.train();
  let expected = states[0];
  for (const now of states.slice(1)) expected = expected.map((x, i) => 0.5 * x + 0.5 * now[i]);
  expect(query(averaged.model)).toEqual(expected);
  expect(query(averaged.model)).not.toEqual(query(plain.model));
});

test("callbacks stop, save and evaluate; generate follows the training", async () => {
  const { trainer, model, output_dir } = await open(
    { max_steps: 20, save_strategy: "steps", save_steps: 100, learning_rate: 0.2 },
    { evaluation: ROWS.slice(0, 1) },
  );
  const said: string[] = [];
  const events: string[] = [];
  trainer.add_callback({
    async on_step_end({ state, control }) {
      const [answer] = await model.generate({ input_ids: [[...ROWS[0].input_ids]], max_new_tokens: 4, do_sample: false });
      said.push(answer.join());
      if (state.global_step === 2) Object.assign(control, { should_save: true, should_evaluate: true });
      if (state.global_step === 4) control.should_training_stop = true;
    },
    on_evaluate: ({ metrics }) => void events.push(`evaluated ${metrics.step}`),
    on_save: ({ checkpoint }) => void events.push(checkpoint.slice(output_dir.length + 1)),
    on_train_end: () => void events.push("end"),
  });
  expect((await trainer.train()).global_step).toBe(4);
  expect(events).toEqual(["evaluated 2", "checkpoint-2", "end"]);
  expect(new Set(said).size).toBeGreaterThan(1);
});

test("a run that is aborted stops after the step, saves, and goes on from there", async () => {
  const args = { max_steps: 6, save_strategy: "steps", save_steps: 100 } as const;
  const whole = await open({ ...args, save_strategy: "no" });
  await whole.trainer.train();
  const first = await open(args);
  const abort = new AbortController();
  first.trainer.add_callback({ on_step_end: ({ state }) => void (state.global_step === 3 && abort.abort()) });
  await first.trainer.train({ signal: abort.signal });
  expect(readdirSync(first.output_dir)).toEqual(["checkpoint-3"]);
  const model = await PeftModel.create(base, { r: 2, target_modules: ["q_proj", "down_proj"] });
  const second = new Trainer({ model, args: { ...first.trainer.args }, train_dataset: ROWS });
  await second.train({ resume_from_checkpoint: join(first.output_dir, "checkpoint-3") });
  const losses = (t: Pick<Trainer, "state">) => t.state.log_history.flatMap((e) => e.loss ?? []);
  expect(losses(second)).toEqual(losses(whole.trainer));
  expect(query(model)).toEqual(query(whole.model));
});

test("with 8-bit moments a run learns as with float32 ones, in less memory, and goes on exactly", async () => {
  const run = async (optim: "adamw_torch" | "adamw_8bit" | "adamw_bnb_8bit", more: Partial<TrainingArguments> = {}, resume?: string) => {
    const model = await PeftModel.create(base, { r: 64, target_modules: ["q_proj", "down_proj"] });
    const output_dir = join(folder, String(count++));
    const steps = {
      per_device_train_batch_size: 6,
      max_steps: 40,
      learning_rate: 3e-3,
      lr_scheduler_type: "constant",
      logging_steps: 1,
    } as const;
    const trainer = new Trainer({ model, args: { ...steps, save_strategy: "no", optim, ...more, output_dir }, train_dataset: ROWS });
    const { moments, parameters } = await trainer.memory();
    await trainer.train(resume === undefined ? {} : { resume_from_checkpoint: resume });
    return {
      losses: trainer.state.log_history.flatMap((e) => e.loss ?? []),
      numbers: query(model),
      share: moments / parameters,
      output_dir,
    };
  };
  const [plain, rounded] = [await run("adamw_torch"), await run("adamw_8bit")];
  expect(plain.share).toBe(3);
  expect(rounded.share).toBeLessThan(1.6); // gradients 1, codes 1/2, scales 1/128; matrices of fewer than 4,096 numbers as before
  expect(rounded.share).toBeGreaterThan(1.5);
  const end = ({ losses }: { losses: readonly number[] }) => losses.slice(-5).reduce((a, b) => a + b) / 5;
  expect(end(plain)).toBeLessThan(0.5 * plain.losses[0]);
  expect(Math.abs(end(rounded) - end(plain))).toBeLessThan(0.1 * end(plain));
  expect(rounded.numbers).not.toEqual(plain.numbers);

  const first = await run("adamw_8bit", { save_strategy: "steps", save_steps: 20 });
  const second = await run("adamw_bnb_8bit", {}, join(first.output_dir, "checkpoint-20"));
  expect(second.losses).toEqual(rounded.losses);
  expect(second.numbers).toEqual(rounded.numbers);
  await expect(run("adamw_torch", {}, join(first.output_dir, "checkpoint-20"))).rejects.toThrow(
    /has no 'm\..*', which this run trains: the run was configured otherwise/,
  );
});

test("a run on the model's own numbers goes on exactly, and its checkpoints are models", async () => {
  const run = async (output_dir: string, stop: number, resume: boolean) => {
    const model = await AutoModelForCausalLM.from_pretrained(join(GOLDENS, "..", "bf16", "moe"), { device: "cpu", threads: 1 });
    await model.trainable({ layers: "1-3", modules: ["mlp.experts", "self_attn"] });
    const args = { output_dir, max_steps: 4, save_steps: 2, logging_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-3 };
    const trainer = new Trainer({ model, args, train_dataset: ROWS });
    trainer.add_callback({ on_step_end: ({ state, control }) => void (control.should_training_stop = state.global_step === stop) });
    await trainer.train({ resume_from_checkpoint: resume });
    const { logits } = await model.forward({ input_ids: [[...ROWS[0].input_ids]] });
    await model.dispose();
    return { losses: trainer.state.log_history.flatMap((e) => e.loss ?? []), logits: logits.data };
  };
  const whole = await run(join(folder, "whole"), 0, false);
  await run(join(folder, "parts"), 3, false); // behind its checkpoint
  const parts = await run(join(folder, "parts"), 0, true);
  expect(parts).toEqual(whole);
  expect(new Set(whole.losses).size).toBe(4);
  // The masters are float32, the model in the checkpoint has the format of its source: it is near, and loads by itself.
  const saved = await AutoModelForCausalLM.from_pretrained(join(folder, "whole", "checkpoint-4"), { device: "cpu", threads: 1 });
  const { logits } = await saved.forward({ input_ids: [[...ROWS[0].input_ids]] });
  await saved.dispose();
  expect(relativeError(logits.data, whole.logits)).toBeLessThan(2e-2);
});
