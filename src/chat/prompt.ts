/** From a prompt to the token ids that the engine continues: renders the conversation and encodes. Knows no engine and no protocol. */
import { TokenizerError } from "../tokenizer/error.ts";
import type { Message } from "../tokenizer/template.ts";
import type { ChatTemplateOptions, Tokenizer } from "../tokenizer/tokenizer.ts";
import { dialectOf, endsInReasoning } from "./dialect.ts";
import { describe, type Tool, withArguments, withoutTools } from "./tools.ts";

/** `auto`: the model decides; `required`: it must call a tool; a name: it must call that tool. */
export type ToolChoice = "auto" | "none" | "required" | { readonly name: string };

export interface Conversation {
  readonly kind: "chat";
  readonly messages: readonly Message[];
  readonly tools: readonly Tool[];
  readonly toolChoice: ToolChoice;
  /** At most one tool call; false lets the model decide how many it makes at once. */
  readonly oneToolCall: boolean;
  /** Extra variables for the chat template. */
  readonly templateVariables: Readonly<Record<string, unknown>>;
}

export type Prompt =
  /** `specialTokens`: add the special tokens that the tokenizer declares. Default true. */
  | { readonly kind: "text"; readonly text: string; readonly specialTokens?: boolean }
  | { readonly kind: "tokens"; readonly tokens: readonly number[] }
  | Conversation;

export interface EncodedPrompt {
  readonly tokens: readonly number[];
  /** The prompt ends inside the model's reasoning. */
  readonly insideReasoning: boolean;
}

/** A prompt that the tokenizer or the chat template refuses. */
export class PromptError extends RangeError {
  /** The field that holds it: `prompt` or `messages`. */
  readonly param: string;

  constructor(param: string, what: string, options?: ErrorOptions) {
    super(what, options);
    this.name = "PromptError";
    this.param = param;
  }
}

/** The ids of a prompt. Throws PromptError for what the tokenizer or the chat template refuses. */
export function encodePrompt(tokenizer: Tokenizer, prompt: Prompt): EncodedPrompt {
  switch (prompt.kind) {
    case "tokens":
      return { tokens: prompt.tokens, insideReasoning: false };
    case "text": {
      const options = { add_special_tokens: prompt.specialTokens ?? true };
      return { tokens: naming("prompt", () => tokenizer.encode(prompt.text, options)), insideReasoning: false };
    }
    case "chat": {
      const { messages, options } = templated(tokenizer, prompt);
      const tokens = naming("messages", () => tokenizer.apply_chat_template(messages, { ...options, add_generation_prompt: true }));
      return { tokens, insideReasoning: endsInReasoning(tokenizer, tokens) };
    }
    default:
      return prompt satisfies never;
  }
}

/**
 * The ids of a conversation's last message, as the model would have to write it: `prompt` is what `encodePrompt` gives for the messages
 * before it, `answer` the message with the end of its turn, encoded apart. Throws PromptError for what the tokenizer or the chat
 * template refuses.
 */
export function encodeTurn(tokenizer: Tokenizer, conversation: Conversation): { readonly prompt: number[]; readonly answer: number[] } {
  const { messages, options } = templated(tokenizer, conversation);
  return naming("messages", () => tokenizer.encode_turn(messages, options));
}

/** What the chat template is given for a conversation. */
function templated(
  tokenizer: Tokenizer,
  prompt: Conversation,
): { messages: Message[]; options: ChatTemplateOptions & { return_dict: false } } {
  const { takesTools } = dialectOf(tokenizer);
  const tools = prompt.toolChoice === "none" ? [] : prompt.tools;
  return {
    messages: takesTools ? withArguments(prompt.messages) : withoutTools(prompt.messages, tools),
    options: {
      ...prompt.templateVariables,
      ...(takesTools && tools.length > 0 ? { tools: describe(tools) } : {}),
      // Variables reach the template only: they cannot replace it or change how its text is encoded. What a user writes is
      // text, never a special token.
      chat_template: undefined,
      tokenize: true,
      return_dict: false,
      split_special_tokens: true,
    },
  };
}

/** Runs `encode`; its tokenizer errors become errors that name the field. */
function naming<T>(param: string, encode: () => T): T {
  try {
    return encode();
  } catch (cause) {
    if (cause instanceof TokenizerError) throw new PromptError(param, cause.message, { cause });
    throw cause;
  }
}
