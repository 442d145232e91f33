/** `mixtape verify`: compares a model's tensors with the checksums that `mixtape quantize` wrote beside them. */
import type { Command } from "commander";
import { addHubOptions, examples, type HubFlags } from "./options.ts";

export function addVerify(program: Command): void {
  const command = program
    .command("verify")
    .description("Check every tensor of a model against its checksums. If any have changed, name them and exit with 1.")
    .argument("<model>", "a folder that 'mixtape quantize' wrote, a hub id, or default");
  addHubOptions(command)
    .addHelpText("after", examples(["mixtape verify ./my-model-int8", "find flipped bits and broken copies"]))
    .action(check);
}

async function check(model: string, flags: HubFlags): Promise<void> {
  const [{ findFolder }, { verify }, { byteProgress }] = await Promise.all([
    import("./models.ts"),
    import("../api/quantize.ts"),
    import("./progress.ts"),
  ]);
  const folder = await findFolder(model, flags, {});
  const bar = await byteProgress("reading");
  const changed = await verify(folder, bar.update).finally(bar.stop);
  if (changed.length === 0) {
    process.stdout.write(`all tensors of ${folder} are intact\n`);
    return;
  }
  const more = changed.length > 3 ? ` and ${changed.length - 3} more` : "";
  throw new Error(`${folder}: the bytes of ${changed.slice(0, 3).join(", ")}${more} have changed; copy or quantise the model again`);
}
