/** `mixtape merge`: adds an adapter's products to a model's matrices and writes the result as a model. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { PROBLEMS, type Problem } from "../model/config.ts";
import { inFlags, onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags } from "./options.ts";
import { warn } from "./terminal.ts";

interface MergeFlags extends HubFlags {
  readonly dtype?: "fp32" | "bf16" | "fp16";
  readonly labels?: readonly string[];
  readonly problemType?: Problem;
}

export function addMerge(program: Command): void {
  const command = program
    .command("merge")
    .description("Merge an adapter into its base model. The result needs no adapter any more.")
    .argument("<base>", "a folder, a hub id, or default")
    .argument("<adapter>", "a folder of PEFT's format, such as run/final, or a hub id")
    .argument("<out>", "the folder to write; it must not contain a model yet")
    .optionsGroup("Options:")
    .addOption(
      new Option("--dtype <format>", "format of the matrices (default: as stored; bf16 if those are int8, int4 or fp8)").choices([
        "fp32",
        "bf16",
        "fp16",
      ]),
    )
    .option("--labels <names>", "of an adapter with a classifier's head: its classes in order, separated by commas", names)
    .addOption(
      new Option("--problem-type <kind>", "of such an adapter (default: the base's, else by the number of classes)").choices(PROBLEMS),
    );
  addHubOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape merge default run/final ./merged", "a model that answers as the adapted one"],
        ["mixtape merge default intents ./merged --labels billing,delivery", "a classifier"],
      ),
    )
    .action(merge);
}

function names(text: string): readonly string[] {
  const all = text.split(",").map((name) => name.trim());
  if (all.includes("")) throw new InvalidArgumentError("It must be names separated by commas.");
  return all;
}

async function merge(base: string, adapter: string, out: string, flags: MergeFlags): Promise<void> {
  const [{ findAdapter, findFolder }, { mergeAdapter }, { byteProgress }] = await Promise.all([
    import("./models.ts"),
    import("../api/merge.ts"),
    import("./progress.ts"),
  ]);
  const interrupt = onInterrupt();
  try {
    const folder = await findFolder(base, flags, { signal: interrupt.signal });
    const its = await findAdapter(adapter, flags, { signal: interrupt.signal });
    const bar = await byteProgress("writing");
    const id2label = flags.labels && { ...flags.labels };
    const options = {
      ...{ dtype: flags.dtype, id2label, problem_type: flags.problemType },
      ...{ onProgress: bar.update, signal: interrupt.signal, onWarning: warn },
    };
    const written = await mergeAdapter(folder, its, out, options)
      .catch((error: unknown) => {
        throw inFlags(error, { id2label: "--labels", problem_type: "--problem-type" });
      })
      .finally(bar.stop);
    const { classes } = written;
    const kind = classes === null ? "" : `, a classifier of ${classes} ${classes === 1 ? "number" : "classes"}`;
    process.stdout.write(`${written.tensors} tensors in ${out}, ${written.merged} matrices merged${kind}\n`);
  } finally {
    interrupt.release();
  }
}
