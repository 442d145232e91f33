/**
 * How a model marks what is not plain answer: its reasoning and its tool calls. Read from its chat template, never from its
 * name. Knows no request.
 */
import type { Tokenizer } from "../tokenizer/tokenizer.ts";

/** The tags of the ERNIE-4.5 `-Thinking` family, and those that `tools.ts` teaches other models. Single tokens or plain text. */
export const TAGS = {
  think: ["<think>", "</think>"],
  response: ["<response>", "</response>"],
  call: ["<tool_call>", "</tool_call>"],
} as const;

export interface Dialect {
  /** The model reasons between the `think` tags before it answers. */
  readonly thinks: boolean;
  /** The template describes tools and writes calls and their results. */
  readonly takesTools: boolean;
}

export function dialectOf({ chat_template }: Pick<Tokenizer, "chat_template">): Dialect {
  const template = chat_template ?? "";
  return { thinks: template.includes(TAGS.think[0]) || template.includes(TAGS.think[1]), takesTools: /\btools\b/.test(template) };
}

/** Whether a prompt of a model that thinks ends inside the reasoning: with the opening tag and white space. */
export function endsInReasoning(tokenizer: Tokenizer, tokens: readonly number[]): boolean {
  return dialectOf(tokenizer).thinks && new RegExp(`${TAGS.think[0]}\\s*$`).test(tokenizer.decode(tokens.slice(-16)));
}
