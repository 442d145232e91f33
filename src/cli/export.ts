/** `mixtape export`: writes a model as a file for other engines. */
import { type Command, Option } from "commander";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags } from "./options.ts";
import { formatBytes, warn } from "./terminal.ts";

const TYPES = ["q8_0", "q4_0", "bf16", "f16", "f32"] as const;

interface ExportFlags extends HubFlags {
  readonly format: "gguf";
  readonly type: (typeof TYPES)[number];
  readonly withoutTokenizer?: boolean;
}

export function addExport(program: Command): void {
  const command = program
    .command("export")
    .description("Write a model as one GGUF file, for llama.cpp and programs built on it. int8 to q8_0 and int4 to q4_0 are lossless.")
    .argument("<source>", "a folder, a GGUF file, a hub id, or default")
    .argument("<out>", "the file to write; it must not exist yet")
    .optionsGroup("Options:")
    .addOption(new Option("--format <name>", "format of the file").choices(["gguf"]).default("gguf"))
    .addOption(new Option("--type <format>", "format of the matrices; the router and norms stay f32").choices(TYPES).makeOptionMandatory())
    .option("--without-tokenizer", "if the model has no tokenizer, write a placeholder, which is enough to measure speed");
  addHubOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape export default small.gguf --type q8_0", "the bundled model"],
        ["mixtape export ./my-model-int4 my-model.gguf --type q4_0", "the same weights for another engine"],
      ),
    )
    .action(write);
}

async function write(source: string, out: string, flags: ExportFlags): Promise<void> {
  const [{ findFolder }, { exportGguf }, { byteProgress }] = await Promise.all([
    import("./models.ts"),
    import("../api/export.ts"),
    import("./progress.ts"),
  ]);
  const interrupt = onInterrupt();
  try {
    const folder = await findFolder(source, flags, { signal: interrupt.signal });
    const bar = await byteProgress("writing");
    const { type, withoutTokenizer } = flags;
    const options = { type, withoutTokenizer, onProgress: bar.update, signal: interrupt.signal, onWarning: warn };
    const written = await exportGguf(folder, out, options).finally(bar.stop);
    process.stdout.write(`wrote ${out}: ${formatBytes(written.bytes)} (${type}), ${written.tensors} tensors\n`);
  } finally {
    interrupt.release();
  }
}
