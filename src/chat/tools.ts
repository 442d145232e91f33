/**
 * Conversations with tools for chat templates that know none, as the published `-PT` ones: the tools are described in the
 * system message in the words that ERNIE-4.5's thinking models are trained on, calls stand in `<tool_call>` tags, and results
 * come as a user's message. Templates that read `tools` get the conversation as it is.
 */

import type { ToolDefinition } from "../server/completion/request.ts";
import type { Message } from "../tokenizer/template.ts";

/** The tools in the form in which templates and models expect them. */
export function describe(tools: readonly ToolDefinition[]): object[] {
  return tools.map(({ name, description, parameters }) => ({
    type: "function",
    function: { name, ...(description !== undefined ? { description } : {}), ...(parameters ? { parameters } : {}) },
  }));
}

/** The messages with the arguments of calls as values: clients send them as text, templates write them as JSON themselves. */
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

/** The messages without anything that such a template would drop. */
export function withoutTools(messages: readonly Message[], tools: readonly ToolDefinition[]): Message[] {
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
    return text; // what the model once wrote, if it was no JSON
  }
}

function textOf(content: Message["content"]): string {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => part.text ?? "").join("\n");
}
