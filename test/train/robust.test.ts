/** What a run survives and what stops it: kill -9, a full disk, numbers that are not finite, data and arguments that make no sense. */
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, expect, onTestFinished, test } from "vitest";
import { AutoModelForCausalLM, type CausalLM, PeftModel, Trainer, type TrainingArguments } from "../../src/index.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS } from "../goldens.ts";

const folder = scratch();
const MODEL = join(GOLDENS, "dense-tiny");
const ids = Array.from({ length: 10 }, (_, i) => 5 + i * 7);
const ROWS = [
  { input_ids: ids, labels: ids },
  { input_ids: ids.slice(2), labels: ids.slice(2) },
];
let base: CausalLM;
let count = 0;
beforeAll(async () => {
  base = await AutoModelForCausalLM.from_pretrained(MODEL, { dtype: "fp32", device: "reference" });
});
afterAll(() => base.dispose());

async function trainer(args: Partial<TrainingArguments> = {}, rows: readonly object[] = ROWS) {
  const model = await PeftModel.create(base, { r: 2, target_modules: ["q_proj"] });
  const output_dir = args.output_dir ?? join(folder, `${count++}`);
  return {
    output_dir,
    model,
    trainer: new Trainer({
      model,
      args: { max_steps: 4, per_device_train_batch_size: 2, ...args, output_dir },
      train_dataset: rows as typeof ROWS,
    }),
  };
}

function child(out: string) {
  const script = fileURLToPath(new URL("./resume.child.ts", import.meta.url));
  const process_ = spawn(process.execPath, ["--import", "tsx", script, MODEL, out], { stdio: ["ignore", "pipe", "pipe"] });
  let [text, errors] = ["", ""];
  let ready: () => void = () => {};
  const begun = new Promise<void>((resolve) => {
    ready = resolve;
  });
  process_.stdout.on("data", (part) => {
    text += part;
    if (text.includes("ready")) ready();
  });
  process_.stderr.on("data", (part) => {
    errors += part;
  });
  const ended = new Promise<{ signal: string | null; code: number | null; text: string; errors: string }>((resolve) => {
    process_.on("close", (code, signal) => {
      ready();
      resolve({ signal, code, text, errors });
    });
  });
  return { begun, ended, kill: () => process_.kill("SIGKILL") };
}

test("killed at 20 random instants, a run ends with the same losses and adapter, to the last bit", async () => {
  const plain = join(folder, "plain");
  const whole = await child(plain).ended;
  expect(whole.code, whole.errors).toBe(0);
  const losses = (text: string) => text.slice(text.indexOf("[["));
  expect(JSON.parse(losses(whole.text))).toHaveLength(40 + 20);
  const state = (at: string) => JSON.parse(readFileSync(join(at, "checkpoint-40", "trainer_state.json"), "utf8"));
  /** Kills runs until it has killed `wanted`, and lets the last one end. */
  const lane = async (name: string, wanted: number) => {
    let [kills, finished] = [0, 0];
    while (kills < wanted || finished === 0) {
      const out = join(folder, `${name}-${finished}`);
      const run = child(out);
      await run.begun;
      if (kills < wanted) {
        await new Promise((resolve) => setTimeout(resolve, Math.random() * 120));
        run.kill();
      }
      const ended = await run.ended;
      if (ended.signal === "SIGKILL") {
        kills++;
        continue;
      }
      expect(ended.code, ended.errors).toBe(0);
      finished++;
      expect(losses(ended.text)).toBe(losses(whole.text));
      for (const file of ["adapter_model.safetensors", "adapter_config.json"])
        expect(readFileSync(join(out, file))).toEqual(readFileSync(join(plain, file)));
      expect(state(out).best_metric).toBe(state(plain).best_metric);
      expect(readdirSync(out).filter((file) => /^checkpoint-/.test(file))).toHaveLength(2);
    }
    return kills;
  };
  const lanes = await Promise.all([lane("one", 10), lane("two", 10)]);
  expect(lanes).toEqual([10, 10]);
}, 240_000);

test.skipIf(process.getuid?.() !== 0)(
  "a disk that fills up (needs root, to mount a small one): the last checkpoint stays, and the error says so",
  async () => {
    const disk = mkdtempSync(join(tmpdir(), "mixtape-disk-"));
    expect(spawnSync("mount", ["-t", "tmpfs", "-o", "size=96k", "tmpfs", disk]).status).toBe(0);
    onTestFinished(() => void spawnSync("umount", [disk]));
    const run = await trainer({ output_dir: disk, save_steps: 1, max_steps: 8 });
    await expect(run.trainer.train()).rejects.toThrow(/the disk is full: \d+ bytes are needed in .*; free some and run again/);
    const left = readdirSync(disk).filter((name) => name.startsWith("checkpoint-"));
    expect(left.length).toBeGreaterThan(0);
    expect(readdirSync(disk).filter((name) => name.startsWith("."))).toEqual([]);
    spawnSync("mount", ["-o", "remount,size=4m", disk]);
    const again = await trainer({ output_dir: disk, save_steps: 1, max_steps: 8 });
    await again.trainer.train({ resume_from_checkpoint: true });
    expect(existsSync(join(disk, "checkpoint-8"))).toBe(true);
  },
);

test("a loss that is not finite stops the run, names the layer and the last checkpoint, which is sound", async () => {
  const run = await trainer({ save_steps: 1, max_steps: 5, logging_steps: 1 });
  run.trainer.add_callback({
    on_save({ state }) {
      if (state.global_step !== 2) return;
      const found = run.model.trainee().states.get("model.layers.1.self_attn.q_proj.lora_B.weight");
      found?.write(new Float32Array(found.bytes / 4).fill(Number.NaN));
    },
  });
  const error = await run.trainer.train().catch((e) => e);
  expect(error).toMatchObject({ name: "DivergenceError", step: 3 });
  expect(error.message).toMatch(/step 3: the loss is NaN; .*came from layer 1\. .*the last checkpoint is .*checkpoint-2/);
});

test("a poisoned parameter never reaches a checkpoint", async () => {
  const run = await trainer({ save_steps: 1, max_steps: 5, learning_rate: 1e38 });
  await expect(run.trainer.train()).rejects.toThrow(/step \d: .*not finite/);
  for (const name of readdirSync(run.output_dir)) {
    const bytes = readFileSync(join(run.output_dir, name, "adapter_model.safetensors"));
    const floats = new Float32Array(
      bytes.buffer.slice(bytes.byteOffset + 8 + Number(bytes.readBigUInt64LE(0)), bytes.byteOffset + bytes.byteLength),
    );
    expect(floats.every(Number.isFinite), name).toBe(true);
  }
});

test.each<[Partial<TrainingArguments> & Record<string, unknown>, RegExp]>([
  [{ learning_rat: 1 }, /args has no option 'learning_rat'; did you mean 'learning_rate'\?/],
  [{ fp16: true }, /args has no option 'fp16': give bf16/],
  [{ learning_rate: -1 }, /learning_rate is -1; expected a number of at least 0/],
  [{ lr_scheduler_type: "polynomial" as never }, /lr_scheduler_type is "polynomial"; expected constant,/],
  [{ eval_strategy: "steps" }, /eval_strategy is 'steps', but there is no eval_dataset/],
  [{ load_best_model_at_end: true }, /load_best_model_at_end needs an eval_strategy/],
  [{ early_stopping_patience: 2 }, /early_stopping_patience needs an eval_strategy/],
  [{ warmup_steps: 3, warmup_ratio: 0.1 }, /warmup_steps and warmup_ratio say the same thing/],
  [{ group_by_length: true, shuffle: false }, /group_by_length orders the rows/],
])("arguments %j are refused", async (args, message) => {
  await expect(trainer(args)).rejects.toThrow(message);
});

test.each<[readonly object[], RegExp]>([
  [[], /train_dataset is empty/],
  [[{ input_ids: [3, 4, 5] }], /train_dataset, row 0: expected an object with two lists/],
  [[{ input_ids: [3, 4], labels: [3] }], /row 0: has 2 input_ids but 1 labels/],
  [[ROWS[0], { input_ids: [3, 512], labels: [3, 4] }], /row 1: input_ids\[1\] is 512, outside the vocabulary of 512/],
  [[{ input_ids: [3, 4], labels: [3, 900] }], /row 0: labels\[1\] is 900; expected -100 or a token of the vocabulary of 512/],
  [[{ input_ids: [3, 4], labels: [3, -1] }], /row 0: labels\[1\] is -1/],
  [[{ input_ids: ids, labels: ids.map(() => -100) }], /no token of any row has a label/],
  [[{ input_ids: [...ids, ...ids], labels: [...ids, ...ids] }], /row 0: has 20 tokens, the limit is 16/],
  [[{ input_ids: ids, labels: ids, segments: [[0, 4]] }], /segments cover 4 of 10 tokens/],
])("data %# is refused before anything is computed", async (rows, message) => {
  await expect((async () => (await trainer({ max_length: 16 }, rows)).trainer.train())()).rejects.toThrow(message);
});

test("another run's folder, other data and another batch size are refused", async () => {
  const args = { save_steps: 2 };
  const first = await trainer(args);
  await first.trainer.train();
  const same = { ...args, output_dir: first.output_dir };
  await expect((await trainer(same)).trainer.train()).rejects.toThrow(
    /holds 2 checkpoints of another run; go on with it by resume_from_checkpoint/,
  );
  const other = await trainer({ ...same, max_steps: 6 }, [ROWS[1], ROWS[0]]);
  await expect(other.trainer.train({ resume_from_checkpoint: true })).rejects.toThrow(/was trained on other data/);
  const batch = await trainer({ ...same, per_device_train_batch_size: 1 });
  await expect(batch.trainer.train({ resume_from_checkpoint: true })).rejects.toThrow(/per_device_train_batch_size 2, this run has 1/);
  const nothing = await trainer();
  await expect(nothing.trainer.train({ resume_from_checkpoint: true })).rejects.toThrow(/holds no checkpoint/);
  writeFileSync(join(first.output_dir, "checkpoint-4", "trainer_state.json"), "{");
  await expect((await trainer(same)).trainer.train({ resume_from_checkpoint: true })).rejects.toThrow(/trainer_state\.json: can't be read/);
  const anew = await trainer({ ...same, overwrite_output_dir: true });
  expect((await anew.trainer.train()).global_step).toBe(4);
});

test("a run that does not fit into memory is refused with figures", async () => {
  const model = await PeftModel.create(base, { r: 2, target_modules: ["q_proj"] });
  const trainee = model.trainee();
  const tight = { ...trainee, backend: { ...trainee.backend, memory: () => ({ total: 2 ** 20, free: 2 ** 16 }) } };
  const subject = { trainee: () => tight, save_pretrained: (path: string) => model.save_pretrained(path) };
  const run = new Trainer({ model: subject, args: { output_dir: join(folder, "tight"), max_steps: 1 }, train_dataset: ROWS });
  await expect(run.train()).rejects.toThrow(
    /not enough memory: weights [\d.]+ MiB, trained parameters .*workspace [\d.]+ MiB, of which .* are free/,
  );
});
