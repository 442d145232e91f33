/** The worker thread that encodes and decodes long texts, so that the event loop stays free. `encoder.ts` starts it. */
import { parentPort, workerData } from "node:worker_threads";
import { openTokenizer } from "../../api/tokenizer.ts";
import { type EncodedPrompt, encodePrompt, type Prompt, PromptError } from "../../chat/prompt.ts";

export type Job =
  | { readonly kind: "encode"; readonly prompt: Prompt }
  | { readonly kind: "decode"; readonly tokens: readonly number[]; readonly skipSpecialTokens: boolean; readonly longest: number };

export type Outcome =
  | { readonly kind: "encoded"; readonly prompt: EncodedPrompt }
  | { readonly kind: "decoded"; readonly text: string }
  /** The user's mistake. */
  | { readonly kind: "refused"; readonly message: string; readonly param: string }
  | { readonly kind: "failed"; readonly message: string };

const tokenizer = openTokenizer(workerData as string);

async function outcomeOf(job: Job): Promise<Outcome> {
  try {
    switch (job.kind) {
      case "encode":
        return { kind: "encoded", prompt: encodePrompt(await tokenizer, job.prompt) };
      case "decode": {
        const text = (await tokenizer).decode(job.tokens, { skip_special_tokens: job.skipSpecialTokens });
        if (text.length <= job.longest) return { kind: "decoded", text };
        return {
          kind: "refused",
          message: `the ids stand for ${text.length} characters; at most ${job.longest} are decoded at once: send fewer`,
          param: "tokens",
        };
      }
      default:
        return job satisfies never;
    }
  } catch (error) {
    if (error instanceof PromptError) return { kind: "refused", message: error.message, param: error.param };
    return { kind: "failed", message: error instanceof Error ? error.message : String(error) };
  }
}

parentPort?.on("message", async (job: Job) => parentPort?.postMessage(await outcomeOf(job)));
