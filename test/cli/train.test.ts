// `mixtape train` and `mixtape merge` as users run them: dry run, a run, going on, what is written, and errors.
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { run, temporary } from "./run.ts";

const CONFIG = `
model: default
method: lora
target_modules: [q_proj, v_proj]
lora: {r: 4, lora_alpha: 8}
train: {layers: 4-7}
validation_fraction: 0.2
learning_rate: 1.0e-3
max_steps: 4
per_device_train_batch_size: 2
logging_steps: 1
eval_strategy: steps
eval_steps: 2
save_steps: 2
threads: 1
`;

function recipe(): { config: string; out: string } {
  const folder = temporary();
  const rows = Array.from({ length: 20 }, (_, i) => ({
    messages: [
      { role: "user", content: `Count to ${i}.` },
      { role: "assistant", content: `${i} it is.` },
    ],
  }));
  writeFileSync(join(folder, "rows.jsonl"), rows.map((row) => JSON.stringify(row)).join("\n"));
  const out = join(folder, "run");
  writeFileSync(join(folder, "c.yaml"), `${CONFIG}dataset: ${join(folder, "rows.jsonl")}\noutput_dir: ${out}\n`);
  return { config: join(folder, "c.yaml"), out };
}

test("a dry run prints what would be trained, memory, steps and the first batch, and writes nothing", async () => {
  const { config, out } = recipe();
  const { code, out: text, err } = await run(["train", config, "--dry-run"]);
  expect(code, err).toBe(0);
  expect(text).toMatch(/self_attn\.q_proj +4-7 +10,240 +819,200\n/); // 4 layers x 4 x (320 + 320)
  expect(text).toMatch(/self_attn\.k_proj +frozen/);
  expect(text).toMatch(
    /steps: 4, \d+ an epoch\nmemory: weights .* are free\nfirst batch \(in brackets: not learnt\)\nrow 0, \d+ tokens: "\[.*User: Count to \d+\./,
  );
  expect(text).toMatch(/\]\d+ it is\.<\|end_of_sentence\|>"/);
  expect(existsSync(out)).toBe(false);
});

test("a run writes config, environment, logs, curves, checkpoints and the adapter; it goes on, and merges", async () => {
  const { config, out } = recipe();
  const first = await run(["train", config, "--seed", "7", "--lora.r=2"]);
  expect(first.code, first.err).toBe(0);
  expect(first.err).toMatch(/step 1 of 4 {2}loss \d+\.\d{4} .* tokens\/s {2}\d+ s left\n/);
  expect(first.err).toMatch(/step 2 {2}eval_loss \d/);
  for (const name of ["config.yaml", "environment.json", "log.jsonl", "curves.svg", "runs", "checkpoint-2", "checkpoint-4", "final"])
    expect(readdirSync(out)).toContain(name);
  const json = (...path: string[]) => JSON.parse(readFileSync(join(out, ...path), "utf8"));
  expect(json("environment.json")).toMatchObject({ seed: 7, node: process.version });
  expect(parse(readFileSync(join(out, "config.yaml"), "utf8"))).toMatchObject({ seed: 7, lora: { r: 2 }, max_steps: 4 });
  expect(json("final", "adapter_config.json")).toMatchObject({ r: 2, lora_alpha: 8, peft_type: "LORA" });
  const log = () =>
    readFileSync(join(out, "log.jsonl"), "utf8")
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line));
  expect(
    log()
      .filter((e) => e.loss !== undefined)
      .map((e) => e.step),
  ).toEqual([1, 2, 3, 4]);
  expect(readFileSync(join(out, "curves.svg"), "utf8")).toContain("evaluation loss");

  const begun = json("environment.json");
  const twice = await run(["train", config, "--seed", "7", "--lora.r=2"]);
  expect(twice).toMatchObject({ code: 1 });
  expect(twice.err).toMatch(/holds 2 checkpoints of another run; go on with it by --resume/);
  expect(json("environment.json")).toEqual(begun); // the run that was refused wrote nothing
  // What a run wrote as its configuration is a configuration; more steps go on from the last checkpoint.
  const on = await run(["train", join(out, "config.yaml"), "--resume", "--max_steps", "6"]);
  expect(on.code, on.err).toBe(0);
  expect(
    log()
      .filter((e) => e.loss !== undefined)
      .map((e) => e.step),
  ).toEqual([1, 2, 3, 4, 5, 6]);

  const merged = join(out, "merged");
  const done = await run(["merge", "default", join(out, "final"), merged]);
  expect(done.code, done.err).toBe(0);
  expect(done.out).toMatch(/8 matrices merged/);
  const said = await run(["generate", "-m", merged, "Count", "--greedy", "--max-new-tokens", "4", "--threads", "1"]);
  expect(said.code, said.err).toBe(0);
  const again = await run(["merge", "default", join(out, "final"), merged]);
  expect(again.err).toMatch(/already contains a model/);
}, 120_000);

const SHORT = "model: default\nmax_steps: 3\nper_device_train_batch_size: 4\nlogging_steps: 1\nlearning_rate: 1.0e-3\nthreads: 1\n";

/** A configuration beside its rows. */
function beside(rows: readonly object[], text: string): { config: string; out: string } {
  const folder = temporary();
  writeFileSync(join(folder, "rows.jsonl"), rows.map((row) => JSON.stringify(row)).join("\n"));
  const out = join(folder, "run");
  writeFileSync(join(folder, "c.yaml"), `${SHORT}${text}\ndataset: ${join(folder, "rows.jsonl")}\noutput_dir: ${out}\n`);
  return { config: join(folder, "c.yaml"), out };
}

const logOf = (out: string) =>
  readFileSync(join(out, "log.jsonl"), "utf8")
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));

test("a classifier: adapters with a head, or the top of the model, by names that the data has", async () => {
  const rows = Array.from({ length: 16 }, (_, i) => ({
    text: i % 2 ? `Great, number ${i}!` : `Awful, number ${i}.`,
    label: i % 2 ? "good" : "bad",
  }));
  const text = "method: classification\nvalidation_fraction: 0.25\neval_strategy: steps\neval_steps: 3\n";
  const { config, out } = beside(rows, text);
  const dry = await run(["train", config, "--dry-run"]);
  expect(dry.code, dry.err).toBe(0);
  expect(dry.out).toMatch(/score +- +\d/);
  expect(dry.out).toMatch(/row 0, \d+ tokens, [01]: ".*number \d+/);
  const done = await run(["train", config, "--lora.use_dora", "true"]);
  expect(done.code, done.err).toBe(0);
  expect(done.err).toMatch(/step 3 {2}eval_loss \d\.\d{4} {2}eval_accuracy [01]\.\d{4} {2}eval_f1 [01]\.\d{4}\n/);
  expect(logOf(out).find((e) => e.eval_loss !== undefined)).toMatchObject({
    eval_accuracy: expect.any(Number),
    eval_f1: expect.any(Number),
  });
  expect(JSON.parse(readFileSync(join(out, "final", "adapter_config.json"), "utf8"))).toMatchObject({
    task_type: "SEQ_CLS",
    use_dora: true,
  });
  const top = `${out}-top`;
  const flags = ["--tuning", "full", "--train.freeze_layers", "0-5", "--train.freeze_modules", "[mlp.experts]", "--output_dir", top];
  const whole = await run(["train", config, ...flags]);
  expect(whole.code, whole.err).toBe(0);
  expect(whole.out).toMatch(/self_attn\.q_proj +6-7 /);
  expect(whole.out).toMatch(/mlp\.experts\.gate_proj +frozen/);
  expect(JSON.parse(readFileSync(join(top, "final", "config.json"), "utf8"))).toMatchObject({
    architectures: ["Ernie4_5_MoeForSequenceClassification"],
    id2label: { "0": "bad", "1": "good" },
    problem_type: "single_label_classification",
  });
}, 120_000);

test("preferences: TRL's rewards in the log, and what routers do", async () => {
  const rows = Array.from({ length: 8 }, (_, i) => ({ prompt: `Say ${i}.`, chosen: `${i}, of course.`, rejected: "No." }));
  const { config, out } = beside(rows, "method: dpo\nbeta: 0.2\ntarget_modules: [q_proj]\nrouter_aux_loss_coef: 0.01\nlora: {r: 2}\n");
  const dry = await run(["train", config, "--dry-run"]);
  expect(dry.out).toMatch(/row 0: ".*Say \d.*\n {2}chosen "\d, of course\..*\n {2}rejected "No\./);
  const done = await run(["train", config]);
  expect(done.code, done.err).toBe(0);
  const [first] = logOf(out);
  expect(first["rewards/margins"]).toBeCloseTo(0, 5);
  expect(first.loss - 0.01 * first.aux_loss).toBeCloseTo(Math.log(2), 5);
  expect(first.expert_load_max).toBeGreaterThan(1);
  const clash = await run(["train", config, "--tuning", "full"]);
  expect(clash.err).toMatch(/target_modules has no effect with tuning full/);
  const all = beside(rows, "method: dpo\ntuning: full\ntrain: {layers: 7, modules: [self_attn]}\nrouter_bias_update_rate: 0.001\n");
  const whole = await run(["train", all.config]);
  expect(whole.code, whole.err).toBe(0);
  expect(logOf(all.out)[0].loss).toBeCloseTo(Math.log(2), 5);
  expect(logOf(all.out)[2]["rewards/margins"]).toBeGreaterThan(0);
}, 120_000);

test.each<[string[], RegExp]>([
  [["--beta", "0.1"], /beta has no effect with method lora/],
  [["--tuning", "full"], /tuning has no effect with method lora, which says it/],
  [["--train.freeze_layers", "0-1"], /train\.freeze_layers has no effect with method lora/],
  [["--router_bias_update_rate", "0.001"], /router_bias_update_rate has no effect with adapters/],
  [["--output_router_logits", "true"], /there is no option --output_router_logits/],
  [["--lerning_rate", "1"], /there is no option --lerning_rate; did you mean 'learning_rate'\?/],
  [["--learning_rate"], /--learning_rate needs a value/],
  [["--lora.rank", "3"], /there is no field 'lora\.rank'; there are r, lora_alpha/],
  [["--train.layer", "3"], /there is no field 'train\.layer'; did you mean 'layers'\?/],
  [["--train.layers", "4-9"], /layers: '4-9' is outside of 0-7/],
  [["--method", "full"], /target_modules has no effect with method full/],
  [["--method", "lorra"], /method: .*"lora"\|"full"\|"experts"\|"classification"\|"dpo"/],
  [["--train.modules", "[q_proj]"], /train\.modules has no effect with method lora/],
  [["--eval_dataset", "x.jsonl"], /eval_dataset and validation_fraction both say/],
  [["--data.seed", "3"], /data\.seed is given as seed, beside data/],
  [["--data.packin", "true"], /there is no field 'data\.packin'; did you mean 'packing'\?/],
  [["--learning_rate", "fast"], /learning_rate is "fast"; expected a number of at least 0/],
  [["--target_modules", "[lstm]"], /target_modules \[.*\] match no module of the model; it has embed_tokens, self_attn\.q_proj/],
  [["--max_length", "4"], /\d+ rows? cannot be used|at least \d+ rows cannot be used/],
  [["--dataset", "/none.jsonl"], /none\.jsonl/],
])("%j: one line, exit code 1", async (more, message) => {
  const { config } = recipe();
  const { code, err } = await run(["train", config, ...more, "--dry-run"]);
  expect(code).toBe(1);
  expect(err).toMatch(message);
  expect(err.trim().split("\n")).toHaveLength(1);
});

test("errors name the command's flags, and paths that begin beside the configuration say so", async () => {
  const { config, out } = recipe();
  const nothing = await run(["train", config, "--resume"]);
  expect([nothing.code, nothing.err]).toEqual([1, `mixtape: --resume: ${out} holds no checkpoint\n`]);
  const folder = dirname(config);
  const [name] = readdirSync(folder).filter((each) => each.endsWith(".jsonl"));
  const elsewhere = temporary();
  const lost = await run(["train", config, "--dataset", name, "--dry-run"], { cwd: elsewhere });
  expect([lost.code, lost.err]).toEqual([
    1,
    expect.stringContaining(`dataset is ${name}, and the current folder has no such file; paths begin there`),
  ]);
  expect(lost.err).toContain(`write ${join(folder, name)}, or run in ${folder}`);
  const found = await run(["train", config, "--dataset", name, "--dry-run"], { cwd: folder });
  expect(found.code, found.err).toBe(0);
  const absent = await run(["train", config, "--dataset", "nowhere.jsonl", "--dry-run"], { cwd: elsewhere });
  expect([absent.code, absent.err]).toEqual([1, expect.not.stringContaining("current folder")]);
}, 60_000);

test("some experts of some layers, the busiest of them too", async () => {
  const { config } = recipe();
  const experts = ["--target_modules", "[mlp.experts.up_proj]", "--train.layers", "null"];
  const named = await run(["train", config, "--dry-run", "--method", "experts", "--target_modules", "null"]);
  expect(named.code).toBe(1);
  const chosen = await run(["train", config, "--dry-run", ...experts.slice(0, 2), "--train.experts", "{4: [0, 3], 5: [1]}"]);
  expect(chosen.code, chosen.err).toBe(0);
  expect(chosen.out).toMatch(/mlp\.experts\.up_proj +4-5/);
  const busy = await run(["train", config, "--dry-run", ...experts.slice(0, 2), "--train.experts", "{top_by_routing_load: 2}"]);
  expect(busy.code, busy.err).toBe(0);
  expect(busy.out).toMatch(/mlp\.experts\.up_proj +4-7/);
});
