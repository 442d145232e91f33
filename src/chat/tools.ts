/**
 * Conversations with tools for chat templates that know none, like those of the published `-PT` models: the system message
 * describes the tools in the words that ERNIE-4.5's thinking models are trained on, calls stand in `<tool_call>` tags, and
 * results come as user messages. Templates that read `tools` get the conversation unchanged.
 */
import type { Callable } from "../grammar/grammars.ts";
import type { Message } from "../tokenizer/template.ts";

/** A function that the model may call, as in OpenAI's `tools`. */
export interface Tool extends Callable {
  readonly description?: string;
}

/** The tools in the form that templates and models expect. */
export function describe(tools: readonly Tool[]): object[] {
  return tools.map(({ name, description, parameters }) => ({
    type: "function",
    function: { name, ...(description !== undefined ? { description } : {}), ...(parameters ? { parameters } : {}) },
  }));
}

/** The messages with the arguments of calls as values: clients send JSON text, templates serialize values themselves. */
export function withArguments(messages: readonly Message[]): Message[] {
  return messages.map((message): Message => {
    const calls = message["tool_calls"];
    if (!Array.isArray(calls)) return message;
    return {
      ...message,
      tool_calls: calls.map((call: { readonly function?: { readonly arguments?: unknown } }) => ({
        ...call,
        function: { ...call.function, arguments: parsed(call.function?.arguments) },
      })),
    };
  });
}

/** The messages with tools, calls and results written as plain text, which such a template would otherwise drop. */
export function withoutTools(messages: readonly Message[], tools: readonly Tool[]): Message[] {
  const plain = messages.map((message): Message => {
    if (message.role === "tool") return { role: "user", content: `<tool_output>\n${textOf(message.content)}\n</tool_output>` };
    const calls = message["tool_calls"];
    if (message.role !== "assistant" || !Array.isArray(calls) || calls.length === 0) return message;
    const { tool_calls: _calls, ...rest } = message;
    return { ...rest, content: [textOf(message.content), ...calls.map(callText)].filter((part) => part !== "").join("\n") };
  });
  if (tools.length === 0) return plain;
  const text = [
    "You may call one or more of these functions. For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call> tags:",
    '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>',
    "<tool_list>",
    ...describe(tools).map((tool) => JSON.stringify(tool)),
    "</tool_list>",
  ].join("\n");
  const [first, ...others] = plain;
  if (first?.role !== "system") return [{ role: "system", content: text }, ...plain];
  return [{ ...first, content: `${textOf(first.content)}\n\n${text}` }, ...others];
}

function callText(call: unknown): string {
  const { name, arguments: args } = ((call as { function?: unknown }).function ?? {}) as { name?: unknown; arguments?: unknown };
  const parsed = typeof args === "string" ? args : JSON.stringify(args ?? {});
  return `<tool_call>\n{"name": ${JSON.stringify(name)}, "arguments": ${parsed}}\n</tool_call>`;
}

function parsed(text: unknown): unknown {
  if (typeof text !== "string") return text ?? {};
  try {
    return JSON.parse(text);
  } catch {
    return text; // what the model wrote, though it is not JSON
  }
}

function textOf(content: Message["content"]): string {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => part.text ?? "").join("\n");
}
