/** `mixtape generate`: continues a text, or answers it, once. Knows neither conversations nor formats. */
import type { Command } from "commander";
import { COUNTS } from "../api/defaults.ts";
import type { Answer } from "./answer.ts";
import { Interrupted, onInterrupt, UsageError } from "./failure.ts";
import { addFormatOptions, type FormatFlags, readFormatFlags } from "./format.ts";
import {
  addAdapterOption,
  addModelOptions,
  addSamplingOptions,
  examples,
  generationOptions,
  type ModelFlags,
  type SamplingFlags,
  tokenIds,
  within,
} from "./options.ts";
import { encodePrompt, type Prompt, type PromptFlags, readPrompt } from "./prompt.ts";
import { counted, notice } from "./terminal.ts";

interface GenerateFlags extends ModelFlags, SamplingFlags, PromptFlags, FormatFlags {
  readonly text?: boolean;
  readonly json?: boolean;
  readonly numReturnSequences: number;
}

export function addGenerate(program: Command): void {
  const command = program
    .command("generate")
    .description("Continue a text, or answer it with --chat. The text is an argument or comes from standard input.")
    .argument("[text]", "the prompt")
    .optionsGroup("Options:")
    .option("--ids <list>", "token ids as the prompt, like 1,2,3; prints ids", tokenIds)
    .option("--text", "with --ids: print text")
    .option("--chat", "send the prompt as a user message, with the model's chat template")
    .option("--json", "print one JSON object when the answer is complete")
    .option("--num-return-sequences <n>", "answers to the prompt; more than one are sampled", within(COUNTS.num_return_sequences), 1);
  addFormatOptions(command);
  addSamplingOptions(addAdapterOption(addModelOptions(command)))
    .addHelpText(
      "after",
      examples(
        ['mixtape generate "To save a document" --greedy', "the likeliest continuation"],
        ['mixtape generate --chat "What is a mixture of experts?" --seed 7', "a repeatable answer"],
        ["cat notes.txt | mixtape generate --max-new-tokens 50", "a prompt from standard input"],
        ['mixtape generate --chat "Where is my parcel?" --adapter runs/shop', "with a LoRA adapter"],
        ["mixtape generate --ids 1,2,3 --greedy", "token ids in, token ids out"],
        ['mixtape generate --chat "What can you do?" --json | jq .logprobs', "everything about an answer"],
        [
          'mixtape generate --chat "Name and city as JSON: Laura Stone lives in Vienna." --schema person.json',
          "JSON that satisfies a schema",
        ],
        ['mixtape generate --chat "Good or bad: The soup was cold." --regex "Positive|Negative"', "text that matches a regular expression"],
      ),
    )
    .action(generate);
}

async function generate(argument: string | undefined, flags: GenerateFlags): Promise<void> {
  if (flags.text && !flags.ids) throw new UsageError("--text goes with --ids; a text prompt prints text anyway");
  if (flags.greedy && flags.numReturnSequences > 1)
    throw new UsageError(`--num-return-sequences ${flags.numReturnSequences} with --greedy: all answers would be the same`);
  const format = await readFormatFlags(flags);
  const prompt = await readPrompt(argument, flags);
  const { findModel, openModel, openTokenizer } = await import("./models.ts");
  const { answer, describeSpeed } = await import("./answer.ts");
  const interrupt = onInterrupt();
  try {
    const { folder, adapters } = await findModel(flags, { signal: interrupt.signal });
    // The model's files are read while the tokenizer is built, so that the first token comes sooner.
    const opening = openModel(folder, flags, adapters);
    opening.catch(() => {}); // awaited below; it may fail before that
    const readTokens = async () => {
      const tokenizer = !flags.ids || flags.text || flags.stop || format ? await openTokenizer(folder) : null;
      return { tokenizer, ids: encodePrompt(prompt, tokenizer, flags) };
    };
    const { tokenizer, ids } = await readTokens().catch((error: unknown) => {
      opening.then((model) => model.dispose()).catch(() => {}); // the prompt's error is the one to report
      throw error;
    });
    const printsIds = flags.ids !== undefined && !flags.text;
    const model = await opening;
    try {
      const single = flags.numReturnSequences === 1;
      const streams = single && !flags.json;
      let count = 0;
      const target = {
        signal: interrupt.signal,
        ...(streams && !printsIds ? { onText: (text: string) => void process.stdout.write(text) } : {}),
        ...(streams && printsIds ? { onId: (id: number) => void process.stdout.write(count++ ? `,${id}` : String(id)) } : {}),
      };
      const options = {
        ...generationOptions(flags),
        ...(single ? {} : { do_sample: true }),
        ...(format ? { response_format: format } : {}),
      };
      const answers: Answer[] = [];
      for (let i = 0; i < flags.numReturnSequences; i++) {
        const one = await answer(model, tokenizer, ids, { ...options, seed: options.seed + i }, target);
        if (streams) process.stdout.write("\n");
        if (one.finish === "interrupted") throw new Interrupted();
        answers.push(one);
        if (format && one.finish === "length")
          notice(`(cut off after ${counted(one.ids.length, "token")}, so the answer is incomplete; --max-new-tokens allows more)`);
        if (!single && !flags.json) process.stdout.write(`${i ? "---\n" : ""}${printsIds ? one.ids.join(",") : one.text}\n`);
      }
      if (flags.json)
        process.stdout.write(`${JSON.stringify(describe(flags, prompt, ids, tokenizer ? answers : withoutText(answers), options.seed))}\n`);
      else if (process.stderr.isTTY) notice(answers.map(describeSpeed).join("; "));
    } finally {
      await model.dispose();
    }
  } finally {
    interrupt.release();
  }
}

type Told = Omit<Answer, "text"> & { readonly text: string | null };

/** Without a tokenizer there is no text, which differs from an empty one. */
function withoutText(answers: readonly Answer[]): Told[] {
  return answers.map((answer) => ({ ...answer, text: null }));
}

/** The object that --json prints; several answers go into `answers`. */
function describe(flags: GenerateFlags, prompt: Prompt, ids: readonly number[], answers: readonly Told[], seed: number) {
  const seconds = answers.reduce((sum, a) => sum + a.seconds, 0);
  const tokens = answers.reduce((sum, a) => sum + a.ids.length, 0);
  const each = answers.map((a, i) => ({
    text: a.text,
    ids: a.ids,
    logprobs: a.logprobs,
    finish_reason: a.finish,
    new_tokens: a.ids.length,
    seed: seed + i,
  }));
  return {
    model: flags.model,
    prompt: prompt.text ?? null,
    prompt_ids: ids,
    prompt_tokens: ids.length,
    ...(each.length === 1 ? each[0] : { answers: each }),
    first_token_seconds: round(answers[0].firstMs / 1000),
    seconds: round(seconds),
    tokens_per_second: seconds > 0 ? round(tokens / seconds) : null,
  };
}

function round(value: number): number | null {
  return Number.isFinite(value) ? Math.round(value * 10_000) / 10_000 : null;
}
