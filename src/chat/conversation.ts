/**
 * A conversation as OpenAI's clients describe it: messages, tools, which tool to call, and the format of the answer. Checks that
 * they fit together. Knows no tokens and no protocol.
 */
import type { Message } from "../tokenizer/template.ts";
import { type ResponseFormat, type ResponseFormatOption, readFormat } from "./format.ts";
import { type Conversation, PromptError, type ToolChoice } from "./prompt.ts";
import type { Tool } from "./tools.ts";

/** A tool as users write it. */
export interface ToolOption {
  readonly type: "function";
  readonly function: Omit<Tool, "strict"> & { readonly strict?: boolean | null };
}

/** Which tool to call: `auto` (default with tools) lets the model decide, `required` makes it call one. */
export type ToolChoiceOption = "none" | "auto" | "required" | { readonly type: "function"; readonly function: { readonly name: string } };

export interface ConversationOptions {
  readonly messages: readonly Message[];
  readonly tools?: readonly ToolOption[] | null;
  readonly tool_choice?: ToolChoiceOption | null;
  /** False: at most one call. Default true. */
  readonly parallel_tool_calls?: boolean | null;
  readonly response_format?: ResponseFormatOption | null;
  /** Extra variables for the chat template. */
  readonly templateVariables?: Readonly<Record<string, unknown>>;
}

const NAME = /^[\w-]{1,64}$/;

/** Throws PromptError or GrammarError, naming the field, for parts that are malformed or contradict each other. */
export function readConversation(options: ConversationOptions): { readonly prompt: Conversation; readonly format: ResponseFormat } {
  const tools = (options.tools ?? []).map(readTool);
  const names = tools.map(({ name }) => name);
  if (new Set(names).size < names.length) throw new PromptError("tools", "two tools have the same name");
  const toolChoice = readChoice(options.tool_choice, names);
  const format = readFormat(options.response_format);
  if (toolChoice !== "none" && toolChoice !== "auto" && format.kind !== "text")
    throw new PromptError("response_format", "an answer cannot be a tool call and of a response_format at once");
  const oneToolCall = options.parallel_tool_calls === false;
  const { messages, templateVariables = {} } = options;
  return { prompt: { kind: "chat", messages, tools, toolChoice, oneToolCall, templateVariables }, format };
}

function readTool({ type, function: definition }: ToolOption, index: number): Tool {
  const field = `tools[${index}]`;
  if (type !== "function" || typeof definition !== "object" || definition === null)
    throw new PromptError(field, `${field} is not like {"type": "function", "function": {"name": "…", "parameters": {…}}}`);
  const { name, parameters, strict } = definition;
  if (typeof name !== "string" || !NAME.test(name))
    throw new PromptError(`${field}.function.name`, `${field}.function.name must be 1 to 64 letters, digits, _ and -`);
  if (parameters !== undefined && (typeof parameters !== "object" || parameters === null || Array.isArray(parameters)))
    throw new PromptError(`${field}.function.parameters`, `${field}.function.parameters must be a JSON schema: an object`);
  return { ...definition, strict: strict ?? false };
}

function readChoice(choice: ToolChoiceOption | null | undefined, names: readonly string[]): ToolChoice {
  if (choice === null || choice === undefined) return names.length > 0 ? "auto" : "none";
  if (choice !== "none" && choice !== "auto" && names.length === 0)
    throw new PromptError("tool_choice", "tool_choice asks for a call, and there are no tools");
  if (choice === "none" || choice === "auto" || choice === "required") return choice;
  const name = choice.function?.name;
  if (!names.includes(name)) throw new PromptError("tool_choice", `tool_choice names '${name}'; the tools are ${names.join(", ")}`);
  return { name };
}
