/** Where a prompt comes from: an argument, standard input, or token ids. */
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { UsageError } from "./failure.ts";

export interface PromptFlags {
  readonly ids?: readonly number[];
  readonly chat?: boolean;
}

/** A prompt before it is encoded. */
export type Prompt = { readonly text: string; readonly ids?: undefined } | { readonly text?: undefined; readonly ids: readonly number[] };

/** Reads the prompt. Throws UsageError when there is none, an empty one, or two. */
export async function readPrompt(argument: string | undefined, flags: PromptFlags): Promise<Prompt> {
  if (flags.ids) {
    if (argument !== undefined) throw new UsageError("the prompt is given twice: as text and with --ids");
    if (flags.chat) throw new UsageError("--chat wraps a text, and --ids gives token ids; leave one out");
    return { ids: flags.ids };
  }
  if (argument === undefined && process.stdin.isTTY) throw new UsageError("no prompt: give a text, pipe one in, or use --ids");
  const text = argument ?? (await readAll(process.stdin)).replace(/\r?\n$/, "");
  if (text.trim() === "") throw new UsageError("the prompt is empty: at least one character is needed");
  return { text };
}

/** The ids of a prompt; with `chat`, as the first message of a conversation. */
export function encodePrompt(prompt: Prompt, tokenizer: Tokenizer | null, { chat = false }: { chat?: boolean }): number[] {
  if (prompt.ids) return [...prompt.ids];
  if (!tokenizer) throw new Error("internal: a text prompt without a tokenizer");
  if (!chat) return tokenizer.encode(prompt.text);
  if (tokenizer.chat_template === null)
    throw new UsageError("--chat needs a chat template, and this model has none; leave --chat out to continue plain text");
  const messages = [{ role: "user", content: prompt.text }];
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, split_special_tokens: true });
}

async function readAll(stream: NodeJS.ReadableStream): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(Buffer.from(part));
  return Buffer.concat(parts).toString("utf8");
}

/** The text of each token; a token with only part of a character is shown by its name in the vocabulary. */
export function tokenTexts(tokenizer: Tokenizer, ids: readonly number[]): string[] {
  return ids.map((id) => {
    const text = tokenizer.decode([id]);
    return text === "" || text.includes("\ufffd") ? tokenizer.convert_ids_to_tokens(id) : text;
  });
}
