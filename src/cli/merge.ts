/** `mixtape merge`: adds an adapter's products to a model's matrices and writes the result as a model. */
import { type Command, Option } from "commander";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags } from "./options.ts";
import { warn } from "./terminal.ts";

interface MergeFlags extends HubFlags {
  readonly dtype?: "fp32" | "bf16" | "fp16";
}

export function addMerge(program: Command): void {
  const command = program
    .command("merge")
    .description("Merge an adapter into its base model. The result needs no adapter any more.")
    .argument("<base>", "a folder, a hub id, or default")
    .argument("<adapter>", "a folder of PEFT's format, such as run/final")
    .argument("<out>", "the folder to write; it must not contain a model yet")
    .optionsGroup("Options:")
    .addOption(
      new Option("--dtype <format>", "format of the matrices (default: as stored; bf16 if those are int8 or int4)").choices([
        "fp32",
        "bf16",
        "fp16",
      ]),
    );
  addHubOptions(command)
    .addHelpText("after", examples(["mixtape merge default run/final ./merged", "a model that answers as the adapted one"]))
    .action(merge);
}

async function merge(base: string, adapter: string, out: string, flags: MergeFlags): Promise<void> {
  const [{ findFolder }, { mergeAdapter }, { byteProgress }] = await Promise.all([
    import("./models.ts"),
    import("../api/merge.ts"),
    import("./progress.ts"),
  ]);
  const interrupt = onInterrupt();
  try {
    const folder = await findFolder(base, flags, { signal: interrupt.signal });
    const bar = await byteProgress("writing");
    const options = { dtype: flags.dtype, onProgress: bar.update, signal: interrupt.signal, onWarning: warn };
    const written = await mergeAdapter(folder, adapter, out, options).finally(bar.stop);
    process.stdout.write(`${written.tensors} tensors in ${out}, ${written.merged} matrices merged\n`);
  } finally {
    interrupt.release();
  }
}
