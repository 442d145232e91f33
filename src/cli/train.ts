/** `mixtape train`: trains a model by a configuration. */
import { existsSync, readFileSync } from "node:fs";
import { dirname, isAbsolute, join, resolve } from "node:path";
import type { Command } from "commander";
import type { Recipe } from "../api/recipe.ts";
import type { Run } from "../api/run.ts";
import type { LogEntry } from "../train/history.ts";
import type { TrainerCallback } from "../train/report.ts";
import { inFlags, onInterrupt, UsageError } from "./failure.ts";
import { examples } from "./options.ts";
import { counted, notice, warn } from "./terminal.ts";

interface TrainFlags {
  readonly dryRun?: boolean;
  readonly resume?: boolean | string;
  readonly offline?: boolean;
}

export async function addTrain(program: Command): Promise<void> {
  program
    .command("train")
    .description("Train adapters, experts or a whole model by a configuration.")
    .usage("[options] <config> [--field value ...]")
    .argument("<config>", "a YAML or JSON file")
    .argument("[fields...]", "fields of the configuration: --learning_rate 1e-4 --lora.r 8 --train.layers 20-27")
    .allowUnknownOption()
    .optionsGroup("Options:")
    .option("--dry-run", "print what would be trained, memory, steps and the first batch, and train nothing")
    .option("--resume [checkpoint]", "go on from the newest checkpoint of output_dir, or from this one")
    .option("--offline", "use only files on this machine")
    .addHelpText(
      "after",
      examples(
        ["mixtape train intents.yaml --dry-run", "see what would happen"],
        ["mixtape train intents.yaml --learning_rate 2e-4 --lora.r 16", "with other values than the file's"],
        ["mixtape train intents.yaml --resume", "go on after a power cut"],
      ) + fieldsText(),
    )
    .action(train);
}

/** Only the names: docs/training.md describes them. */
function fieldsText(): string {
  return (
    "\nFields of the configuration:\n" +
    "  model, dtype, device, threads, adapter, target_modules, lora.*,\n" +
    "  method (lora, full, experts, classification, dpo), tuning, beta, label_smoothing,\n" +
    "  train.layers, train.modules, train.experts, train.freeze_layers, train.freeze_modules,\n" +
    "  dataset, eval_dataset, validation_fraction, data.*,\n" +
    "  and the names of transformers' TrainingArguments: output_dir, learning_rate, num_train_epochs, max_steps,\n" +
    "  per_device_train_batch_size, gradient_accumulation_steps, lr_scheduler_type, warmup_steps, weight_decay,\n" +
    "  max_grad_norm, bf16, logging_steps, eval_strategy, eval_steps, save_steps, save_total_limit, seed, ...\n" +
    "  docs/training.md describes each.\n"
  );
}

async function train(config: string, fields: readonly string[], flags: TrainFlags): Promise<void> {
  const [{ override, parseRecipe, readRecipe }, { openRun }, { findFolder }] = await Promise.all([
    import("../api/recipe.ts"),
    import("../api/run.ts"),
    import("./models.ts"),
  ]);
  const raw = override(await readRecipe(config), fields, ["dry-run", "resume", "offline"]);
  const recipe = parseRecipe(raw, config);
  checkPaths(recipe, config);
  const interrupt = onInterrupt();
  const stop = new AbortController();
  try {
    const folder = await findFolder(recipe.model, flags, { signal: interrupt.signal });
    const display = await progress();
    // when the trainer has found nothing wrong: a run that is refused leaves an earlier one's files as they are
    const files: TrainerCallback = { on_train_begin: () => writeRunFiles(recipe) };
    const run = await openRun(recipe, folder, { callbacks: [files, display], warning_callback: warn, signal: interrupt.signal });
    try {
      process.stdout.write(`${await overview(run)}\n`);
      if (flags.dryRun) {
        process.stdout.write(`${await firstBatch(run)}\n`);
        return;
      }
      interrupt.signal.addEventListener("abort", () => {
        notice("stopping after this step");
        stop.abort();
      });
      await makeFolder(recipe);
      const done = await run.trainer
        .train({ resume_from_checkpoint: flags.resume ?? false, signal: stop.signal })
        .catch((error: unknown) => {
          throw inFlags(error, { resume_from_checkpoint: "--resume" });
        })
        .finally(display.stop);
      await finish(run, recipe, done.metrics, stop.signal.aborted);
    } finally {
      await run.dispose();
    }
  } finally {
    interrupt.release();
  }
  if (stop.signal.aborted) process.exitCode = 130;
}

/** Relative paths begin at the current folder. Throws UsageError for one that is not there, but is beside the configuration. */
function checkPaths(recipe: Recipe, config: string): void {
  const { dataset, eval_dataset = [], adapter = [], model } = recipe;
  const beside = dirname(config);
  for (const [field, paths] of Object.entries({ dataset, eval_dataset, adapter, model }))
    for (const path of [paths].flat()) {
      const other = join(beside, path);
      if (isAbsolute(path) || resolve(other) === resolve(path) || existsSync(path) || !existsSync(other)) continue;
      throw new UsageError(
        `${config}: ${field} is ${path}, and the current folder has no such file; paths begin there, not at the configuration: write ${other}, or run in ${beside}`,
      );
    }
}

/** What will be trained, how long, and in how much memory. */
async function overview({ trainer, rows, evaluation }: Run): Promise<string> {
  const { describe } = await import("../train/memory.ts");
  const { total, perEpoch } = trainer.steps();
  const { tokens, trained } = rows.statistics();
  return [
    await trainer.parameters(),
    `data: ${rows.length.toLocaleString("en")} rows of ${tokens.toLocaleString("en")} tokens, ${trained.toLocaleString("en")} of them with a label${evaluation ? `; ${evaluation.length.toLocaleString("en")} rows for evaluation` : ""}`,
    `steps: ${total.toLocaleString("en")}, ${perEpoch.toLocaleString("en")} an epoch`,
    `memory: ${describe(await trainer.memory())}`,
  ].join("\n");
}

/** The first batch as text; what is not learnt is in brackets. */
async function firstBatch({ trainer, tokenizer }: Run): Promise<string> {
  const lines: string[] = [];
  const shown = (ids: readonly number[]) => JSON.stringify(tokenizer.decode(ids, { skip_special_tokens: false }));
  for (const [r, row] of (await trainer.rows(0)).entries()) {
    if ("prompt_ids" in row) {
      lines.push(`row ${r}: ${shown(row.prompt_ids)}\n  chosen ${shown(row.chosen_ids)}\n  rejected ${shown(row.rejected_ids)}`);
      continue;
    }
    const { input_ids, labels } = row;
    if (!Array.isArray(labels) || labels.length !== input_ids.length) {
      lines.push(`row ${r}, ${counted(input_ids.length, "token")}, ${JSON.stringify(labels)}: ${shown(input_ids)}`);
      continue;
    }
    let text = "";
    for (let i = 0; i < input_ids.length; ) {
      const learnt = labels[i] >= 0;
      let end = i;
      while (end < input_ids.length && labels[end] >= 0 === learnt) end++;
      const piece = tokenizer.decode(input_ids.slice(i, end), { skip_special_tokens: false });
      text += learnt ? piece : `[${piece}]`;
      i = end;
    }
    lines.push(`row ${r}, ${counted(input_ids.length, "token")}: ${JSON.stringify(text)}`);
  }
  return `first batch (in brackets: not learnt)\n${lines.join("\n")}`;
}

async function makeFolder({ args: { output_dir } }: Recipe): Promise<void> {
  const { mkdir } = await import("node:fs/promises");
  await mkdir(output_dir, { recursive: true }).catch((cause: Error) => {
    throw new UsageError(`output_dir ${output_dir} can't be made (${cause.message})`, { cause });
  });
}

/** The run's configuration and where it runs, beside its checkpoints. */
async function writeRunFiles(recipe: Recipe): Promise<void> {
  const { writeFile } = await import("node:fs/promises");
  const { cpus, platform, release, totalmem } = await import("node:os");
  const { join } = await import("node:path");
  const { stringify } = await import("yaml");
  const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as { version: string };
  const { args, ...own } = recipe;
  const folder = args.output_dir;
  const { seed: _seed, shuffle: _shuffle, max_length: _length, ...data } = own.data; // they are among the arguments
  await writeFile(join(folder, "config.yaml"), stringify({ ...own, data, ...args }));
  const [cpu] = cpus();
  const environment = {
    mixtape: version,
    node: process.version,
    platform: `${platform()} ${release()}`,
    cpu: cpu?.model ?? "unknown",
    cores: cpus().length,
    memory_bytes: totalmem(),
    seed: args.seed,
    started: new Date().toISOString(),
  };
  await writeFile(join(folder, "environment.json"), `${JSON.stringify(environment, null, 1)}\n`);
}

async function finish({ trainer }: Run, { args, method }: Recipe, metrics: LogEntry, stopped: boolean): Promise<void> {
  const { writeFile } = await import("node:fs/promises");
  const { join } = await import("node:path");
  const { curvesSvg } = await import("./curves.ts");
  const svg = curvesSvg(trainer.state.log_history, `${args.output_dir}: ${method}, ${trainer.state.global_step} steps`);
  await writeFile(join(args.output_dir, "curves.svg"), svg);
  const { drawPng } = await import("./picture.ts");
  await drawPng(svg, "")
    .then(({ png }) => writeFile(join(args.output_dir, "curves.png"), png))
    .catch((error: Error) => warn(`curves.png was not drawn: ${error.message}`));
  if (stopped) {
    process.stdout.write(`stopped after step ${trainer.state.global_step}; 'mixtape train ... --resume' goes on\n`);
    return;
  }
  const out = join(args.output_dir, "final");
  await trainer.save_model(out);
  const speed = (metrics.train_tokens_per_second ?? 0).toFixed(0);
  process.stdout.write(
    `trained ${counted(trainer.state.global_step, "step")}, mean loss ${metrics.train_loss?.toFixed(4)}, ${speed} tokens/s; written to ${out}\n`,
  );
}

/** What an evaluation measured, without how long it took. */
function measures(logs: LogEntry): string {
  const found = Object.entries(logs).filter(([name]) => name.startsWith("eval_") && !/_runtime$|_per_second$/.test(name));
  return found.map(([name, value]) => `${name} ${value?.toFixed(4)}`).join("  ");
}

/** Loss, speed and time left: a bar on a terminal, else a line for each entry of the log. */
async function progress(): Promise<TrainerCallback & { stop(): void }> {
  const { default: cliProgress } = await import("cli-progress");
  const bar = process.stderr.isTTY
    ? new cliProgress.SingleBar({
        ...{ barCompleteChar: "━", barIncompleteChar: "╌", hideCursor: true, stream: process.stderr, barsize: 24, etaBuffer: 50 },
        format: "step {value} of {total} {bar} loss {loss}  {speed} tokens/s  {eta_formatted} left",
      })
    : null;
  let [begun, first, tokens] = [0, 0, 0];
  let loss = "-";
  return {
    on_train_begin({ state }) {
      [begun, first, tokens] = [performance.now(), state.global_step, state.num_input_tokens_seen];
      bar?.start(state.max_steps, state.global_step, { loss, speed: "-" });
    },
    on_step_end({ state }) {
      const speed = ((state.num_input_tokens_seen - tokens) / (performance.now() - begun)) * 1000;
      bar?.update(state.global_step, { loss, speed: speed.toFixed(0) });
    },
    on_log({ logs, state }) {
      if (logs.loss !== undefined) loss = logs.loss.toFixed(4);
      if (bar) return;
      const seconds = (performance.now() - begun) / 1000;
      const left = (seconds / Math.max(1, state.global_step - first)) * (state.max_steps - state.global_step);
      const speed = (state.num_input_tokens_seen - tokens) / seconds;
      if (logs.loss !== undefined)
        process.stderr.write(
          `step ${logs.step} of ${state.max_steps}  loss ${loss}  grad_norm ${logs.grad_norm?.toFixed(3)}  learning_rate ${logs.learning_rate?.toExponential(2)}  ${speed.toFixed(0)} tokens/s  ${Math.ceil(left)} s left\n`,
        );
      if (logs.eval_loss !== undefined) process.stderr.write(`step ${logs.step}  ${measures(logs)}\n`);
    },
    on_save({ checkpoint }) {
      if (!bar) process.stderr.write(`saved ${checkpoint}\n`);
    },
    stop: () => bar?.stop(),
  };
}
