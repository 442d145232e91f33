/** `mixtape pull`: downloads a model or an adapter from the hub into the Hugging Face cache and prints its folder. */
import type { Command } from "commander";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags } from "./options.ts";

export function addPull(program: Command): void {
  const command = program
    .command("pull")
    .description("Download a model or an adapter from the hub and print its folder. An interrupted download resumes where it stopped.")
    .argument("<id>", "a hub id, like baidu/ERNIE-4.5-0.3B-PT");
  addHubOptions(command)
    .addHelpText(
      "after",
      `${examples(
        ["mixtape pull baidu/ERNIE-4.5-0.3B-PT", "a small dense model"],
        ['mixtape info "$(mixtape pull baidu/ERNIE-4.5-0.3B-PT)"', "use its folder in another command"],
      )}
Environment:
  HF_ENDPOINT   another hub        HF_TOKEN        for gated and private models
  HF_HUB_CACHE  another cache      HF_HUB_OFFLINE  never ask the hub
  HF_HUB_DISABLE_PROGRESS_BARS=1   no progress
`,
    )
    .action(pull);
}

async function pull(id: string, flags: HubFlags): Promise<void> {
  const { findEither } = await import("./models.ts");
  const interrupt = onInterrupt();
  try {
    process.stdout.write(`${await findEither(id, flags, { signal: interrupt.signal })}\n`);
  } finally {
    interrupt.release();
  }
}
