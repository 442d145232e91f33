/** `mixtape quantize`: writes a model folder anew, its matrices in another format. */
import { type Command, Option } from "commander";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags } from "./options.ts";
import { formatBytes } from "./terminal.ts";

const FORMATS = ["int8", "bf16", "fp16", "fp32"] as const;

interface QuantizeFlags extends HubFlags {
  readonly dtype: (typeof FORMATS)[number];
}

export function addQuantize(program: Command): void {
  const command = program
    .command("quantize")
    .description("Write a model anew with its matrices in another format. The router, norms and biases stay float32.")
    .argument("<source>", "a folder, a hub id, or default")
    .argument("<out>", "the folder to write; it must not hold a model yet")
    .optionsGroup("Options:")
    .addOption(new Option("--dtype <format>", "format of the matrices").choices(FORMATS).makeOptionMandatory());
  addHubOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape quantize ./my-model ./my-model-int8 --dtype int8", "about half of bf16"],
        ["mixtape quantize baidu/ERNIE-4.5-0.3B-PT ./ernie-int8 --dtype int8", "a model of the hub"],
      ),
    )
    .action(convert);
}

async function convert(source: string, out: string, flags: QuantizeFlags): Promise<void> {
  const [{ findFolder }, { quantize }, { openCheckpoint, totalsByDtype }, { byteProgress }] = await Promise.all([
    import("./models.ts"),
    import("../api/quantize.ts"),
    import("../checkpoint/checkpoint.ts"),
    import("./progress.ts"),
  ]);
  const interrupt = onInterrupt();
  try {
    const folder = await findFolder(source, flags, { signal: interrupt.signal });
    const totals = [...totalsByDtype(await openCheckpoint(folder))];
    const before = totals.reduce((sum, [, { bytes }]) => sum + bytes, 0);
    const bar = await byteProgress("writing");
    const options = { dtype: flags.dtype, onProgress: bar.update, signal: interrupt.signal };
    const written = await quantize(folder, out, options)
      .then((done) => {
        bar.update({ doneBytes: done.bytes, totalBytes: done.bytes });
        return done;
      })
      .finally(bar.stop);
    const share = ((100 * written.bytes) / before).toFixed(0);
    process.stdout.write(`before  ${formatBytes(before)} (${totals.map(([dtype]) => dtype.toLowerCase()).join(", ")})\n`);
    process.stdout.write(
      `after   ${formatBytes(written.bytes)} (${flags.dtype}), ${share} % of it, ${written.tensors} tensors in ${out}\n`,
    );
  } finally {
    interrupt.release();
  }
}
