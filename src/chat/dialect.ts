/**
 * How a model writes what is not plain answer: its reasoning and its calls of tools. Read from its chat template, never from
 * its name. Knows no request.
 */
import type { Tokenizer } from "../tokenizer/tokenizer.ts";

/** The marks of the ERNIE-4.5 `-Thinking` family, and of what `tools.ts` teaches the others. Single tokens or plain text. */
export const TAGS = {
  think: ["<think>", "</think>"],
  response: ["<response>", "</response>"],
  call: ["<tool_call>", "</tool_call>"],
} as const;

export interface Dialect {
  /** It reasons between the marks of `think` before it answers. */
  readonly thinks: boolean;
  /** Its template describes tools, writes calls and their results. */
  readonly takesTools: boolean;
}

export function dialectOf({ chat_template }: Pick<Tokenizer, "chat_template">): Dialect {
  const template = chat_template ?? "";
  return { thinks: template.includes(TAGS.think[0]) || template.includes(TAGS.think[1]), takesTools: /\btools\b/.test(template) };
}
