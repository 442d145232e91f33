/** Where a run's log goes: lines of JSON, TensorBoard's event files. */
import { appendFile, mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Report, TrainingArguments } from "./arguments.ts";
import { EventFile } from "./events.ts";
import type { LogEntry, TrainerControl, TrainerState } from "./history.ts";

/** Called during a run, as transformers' `TrainerCallback`. They may be async; what they throw ends the run. */
export interface TrainerCallback {
  on_train_begin?(event: TrainerEvent): void | Promise<void>;
  on_step_end?(event: TrainerEvent): void | Promise<void>;
  on_log?(event: TrainerEvent & { readonly logs: LogEntry }): void | Promise<void>;
  on_evaluate?(event: TrainerEvent & { readonly metrics: LogEntry }): void | Promise<void>;
  on_save?(event: TrainerEvent & { readonly checkpoint: string }): void | Promise<void>;
  on_train_end?(event: TrainerEvent): void | Promise<void>;
}

export interface TrainerEvent {
  readonly args: TrainingArguments;
  readonly state: Readonly<TrainerState>;
  readonly control: TrainerControl;
}

/** The file of a run's log, in its folder. */
export const LOG_FILE = "log.jsonl";

export function reporter(report: Report): TrainerCallback {
  switch (report) {
    case "jsonl":
      return lines();
    case "tensorboard":
      return events();
    case "none":
      return {};
    default:
      return report satisfies never;
  }
}

/** `log.jsonl`, a line for each entry. A run that goes on begins with the lines up to its checkpoint: those behind it will come again. */
function lines(): TrainerCallback {
  const line = (entry: LogEntry) => `${JSON.stringify(entry)}\n`;
  return {
    async on_train_begin({ args, state }) {
      await mkdir(args.output_dir, { recursive: true });
      await writeFile(join(args.output_dir, LOG_FILE), state.log_history.map(line).join(""));
    },
    on_log: ({ args, logs }) => appendFile(join(args.output_dir, LOG_FILE), line(logs)),
  };
}

/** Event files in `runs/`, with the tags that transformers gives them: `train/loss`, `eval/loss`. */
function events(): TrainerCallback {
  let file: EventFile | null = null;
  return {
    on_train_begin({ args, state }) {
      file = new EventFile(join(args.output_dir, "runs"), state.global_step + 1);
    },
    on_log({ logs }) {
      const values = Object.entries(logs).filter((entry): entry is [string, number] => entry[0] !== "step" && entry[1] !== undefined);
      file?.add(
        logs.step,
        Object.fromEntries(values.map(([name, value]) => [name.startsWith("eval_") ? `eval/${name.slice(5)}` : `train/${name}`, value])),
      );
    },
    on_train_end() {
      file?.close();
      file = null;
    },
  };
}
