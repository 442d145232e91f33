/** `mixtape quantize`: converts a model folder to another weight format. */
import { type Command, Option } from "commander";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags, whole } from "./options.ts";
import { formatBytes, warn } from "./terminal.ts";

const FORMATS = ["int8", "int4", "fp8", "bf16", "fp16", "fp32"] as const;

interface QuantizeFlags extends HubFlags {
  readonly dtype: (typeof FORMATS)[number];
  readonly calibration?: string;
  readonly layers?: number;
  readonly experts?: number;
  readonly seed?: number;
}

export function addQuantize(program: Command): void {
  const command = program
    .command("quantize")
    .description("Convert a model's matrices to another format. The router, norms and biases are written in float32.")
    .argument("<source>", "a folder, a hub id, default, or random:21b-a3b, random:0.3b, random:CONFIG.json")
    .argument("<out>", "the folder to write; it must not contain a model yet")
    .optionsGroup("Options:")
    .addOption(new Option("--dtype <format>", "format of the matrices").choices(FORMATS).makeOptionMandatory())
    .option(
      "--calibration <text>",
      "int4 only: round by what each matrix sees when this text runs through the model; a UTF-8 file of 4,096 tokens or more (about 32,768 are used), or builtin. Costs less quality, takes much longer",
    )
    .option("--layers <n>", "number of layers of a random: source", whole(1))
    .option("--experts <n>", "number of experts of a random: source", whole(1))
    .option("--seed <n>", "seed of a random: source's weights (default: 0)", whole(0));
  addHubOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape quantize ./my-model ./my-model-int8 --dtype int8", "about half of bf16"],
        ["mixtape quantize ./my-model ./my-model-int4 --dtype int4 --calibration builtin", "a quarter of bf16"],
        ["mixtape quantize random:21b-a3b ./shape --dtype int4", "random weights of the real shape, for benchmarks"],
        ["mixtape quantize baidu/ERNIE-4.5-0.3B-PT ./ernie-int8 --dtype int8", "a model from the hub"],
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
    const random = source.startsWith("random:");
    const from = random ? source : await findFolder(source, flags, { signal: interrupt.signal });
    const totals = random ? [] : [...totalsByDtype(await openCheckpoint(from))];
    const before = totals.reduce((sum, [, { bytes }]) => sum + bytes, 0);
    const bar = await byteProgress("writing");
    const { dtype, calibration, layers, experts, seed } = flags;
    const options = { dtype, calibration, layers, experts, seed, onProgress: bar.update, signal: interrupt.signal, onWarning: warn };
    const written = await quantize(from, out, options)
      .then((done) => {
        bar.update({ doneBytes: done.bytes, totalBytes: done.bytes });
        return done;
      })
      .finally(bar.stop);
    if (!random) process.stdout.write(`before  ${formatBytes(before)} (${totals.map(([name]) => name.toLowerCase()).join(", ")})\n`);
    const share = random ? "" : `, ${((100 * written.bytes) / before).toFixed(0)} % of it`;
    process.stdout.write(`after   ${formatBytes(written.bytes)} (${dtype})${share}, ${written.tensors} tensors in ${out}\n`);
  } finally {
    interrupt.release();
  }
}
