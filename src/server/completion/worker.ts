/** The thread in which long texts are encoded and decoded, so that they hold nobody else's: `encoder.ts` starts it. */
import { parentPort, workerData } from "node:worker_threads";
import { openTokenizer } from "../../api/tokenizer.ts";
import { type EncodedPrompt, promptOf } from "../../chat/prompt.ts";
import { ServerError } from "../errors.ts";
import type { Prompt } from "./request.ts";

export type Job =
  | { readonly kind: "encode"; readonly prompt: Prompt }
  | { readonly kind: "decode"; readonly tokens: readonly number[]; readonly skipSpecialTokens: boolean };

export type Outcome =
  | { readonly kind: "encoded"; readonly prompt: EncodedPrompt }
  | { readonly kind: "decoded"; readonly text: string }
  /** The user's doing. */
  | { readonly kind: "refused"; readonly message: string; readonly param?: string }
  | { readonly kind: "failed"; readonly message: string };

const tokenizer = openTokenizer(workerData as string);

async function done(job: Job): Promise<Outcome> {
  try {
    switch (job.kind) {
      case "encode":
        return { kind: "encoded", prompt: promptOf(await tokenizer, job.prompt) };
      case "decode":
        return { kind: "decoded", text: (await tokenizer).decode(job.tokens, { skip_special_tokens: job.skipSpecialTokens }) };
      default:
        return job satisfies never;
    }
  } catch (error) {
    if (error instanceof ServerError) return { kind: "refused", message: error.message, param: error.param ?? undefined };
    return { kind: "failed", message: error instanceof Error ? error.message : String(error) };
  }
}

parentPort?.on("message", async (job: Job) => parentPort?.postMessage(await done(job)));
