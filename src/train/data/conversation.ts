/** Reads conversations of data files: OpenAI's messages, TRL's, LLaMA-Factory's parts, and ShareGPT's. Knows no template and no tokens. */
import type { Tool } from "../../chat/tools.ts";
import type { ContentPart, Message } from "../../tokenizer/message.ts";
import { RowError, shown } from "./fault.ts";
import type { ChatRow } from "./row.ts";

/** A message, and whether its row says that it is to be learnt; null: it does not say. */
export interface ReadMessage {
  readonly message: Message;
  readonly trained: boolean | null;
}

/** Messages of a row: more are refused, because each turn is encoded with all before it. */
const MOST_MESSAGES = 1000;

/** A row of messages: the assistant's are learnt, except those whose weight is 0. Throws RowError. @param system goes in front, unless there is one */
export function chatRow(read: readonly ReadMessage[], tools: readonly Tool[], system: string | null): ChatRow {
  const all =
    system === null || read[0]?.message.role === "system"
      ? read
      : [{ message: { role: "system", content: system }, trained: null }, ...read];
  return {
    kind: "chat",
    messages: all.map(({ message }) => message),
    tools,
    trained: all.map(({ message, trained }) => message.role === "assistant" && trained !== false),
  };
}

/** A text, a message or a list of messages. @param role of a text */
export function messagesOf(value: unknown, name: string, role: string): ReadMessage[] {
  if (typeof value === "string" && !/^\s*\[\s*\{/.test(value)) {
    if (value.trim() === "") throw new RowError(`${name} is empty`);
    return [{ message: { role, content: value }, trained: null }];
  }
  const list = Array.isArray(value) || typeof value === "string" ? listOf(value, name) : [value];
  return isSharegpt(list[0]) ? sharegptMessages(list, name) : readMessages(list, name);
}

/** OpenAI's messages, or JSON text of them, as tables have it. */
export function readMessages(value: unknown, name: string): ReadMessage[] {
  const isEmptySystem = (each: unknown) => isObject(each) && each["role"] === "system" && each["content"] === "";
  return listOf(value, name).flatMap((each, i) => (isEmptySystem(each) ? [] : [readMessage(each, `${name}[${i}]`)]));
}

function readMessage(value: unknown, name: string): ReadMessage {
  if (!isObject(value)) throw new RowError(`${name} is not a message: ${shown(value)}`);
  const { role, weight, loss_weight, train, ...rest } = value;
  if (typeof role !== "string" || role === "") throw new RowError(`${name} has no role: ${shown(value)}`);
  // Columns of Parquet have every field, empty ones too.
  const message = Object.fromEntries(
    Object.entries(rest).filter(([key, each]) => key === "content" || (each !== null && each !== undefined)),
  );
  const said = weightOf(weight ?? loss_weight ?? train, name);
  if (Array.isArray(message["content"])) return { message: { role, ...message, ...readParts(message["content"], name) }, trained: said };
  const { content } = message;
  if (content !== undefined && content !== null && typeof content !== "string")
    throw new RowError(`${name}.content must be a text or a list of parts, not ${shown(content)}`);
  const calls = message["tool_calls"];
  if (calls !== undefined && !Array.isArray(calls)) throw new RowError(`${name}.tool_calls must be a list, not ${shown(calls)}`);
  if (!content && !(Array.isArray(calls) && calls.length > 0)) throw new RowError(`${name} (${role}) has no content`);
  return { message: { ...message, role, content: (content as string | null | undefined) ?? "" }, trained: said };
}

function weightOf(value: unknown, name: string): boolean | null {
  if (value === undefined || value === null) return null;
  if (value === 0 || value === false) return false;
  if (value === 1 || value === true) return true;
  throw new RowError(`the weight of ${name} is ${shown(value)}; it must be 0 or 1`);
}

/** Parts of a message: texts stay parts; LLaMA-Factory's `value`, reasoning and calls become what templates know. */
function readParts(parts: readonly unknown[], name: string): Partial<Message> {
  const content: ContentPart[] = [];
  const calls: unknown[] = [];
  let reasoning = "";
  for (const [i, part] of parts.entries()) {
    const said = isObject(part) ? (part["text"] ?? part["value"]) : undefined;
    if (!isObject(part) || typeof said !== "string")
      throw new RowError(`${name}.content[${i}] must be like {"type": "text", "text": "…"}, not ${shown(part)}`);
    switch (part["type"]) {
      case "text":
        content.push({ type: "text", text: said });
        break;
      case "reasoning":
        reasoning += said;
        break;
      case "tool_call":
      case "tool_calls":
        calls.push(...callsOf(said, `${name}.content[${i}]`));
        break;
      default:
        throw new RowError(
          `${name}.content[${i}] is of type ${shown(part["type"])}; only texts, reasoning and tool calls can be trained on`,
        );
    }
  }
  if (content.length === 0 && calls.length === 0) throw new RowError(`${name} has no content`);
  return {
    content: content.length === 1 ? content[0].text : content.length === 0 ? "" : content,
    ...(reasoning === "" ? {} : { reasoning_content: reasoning }),
    ...(calls.length === 0 ? {} : { tool_calls: calls }),
  };
}

const ROLES: Readonly<Record<string, string>> = {
  human: "user",
  user: "user",
  gpt: "assistant",
  chatgpt: "assistant",
  bing: "assistant",
  bard: "assistant",
  assistant: "assistant",
  function_call: "assistant",
  system: "system",
  observation: "tool",
  function: "tool",
  tool: "tool",
};

function isSharegpt(value: unknown): boolean {
  return isObject(value) && "from" in value && "value" in value;
}

/** ShareGPT's messages: `from` and `value`. A `function_call` becomes the assistant's message with tool calls. */
export function sharegptMessages(value: unknown, name: string): ReadMessage[] {
  return listOf(value, name).map((each, i) => {
    const place = `${name}[${i}]`;
    if (!isSharegpt(each) || !isObject(each))
      throw new RowError(`${place} must be like {"from": "human", "value": "…"}, not ${shown(each)}`);
    const { from, value: said } = each;
    const role = ROLES[String(from).toLowerCase()];
    if (role === undefined) throw new RowError(`${place} is from ${shown(from)}; known are ${Object.keys(ROLES).join(", ")}`);
    if (typeof said !== "string" || said === "") throw new RowError(`${place} (${role}) has no value`);
    const message = from === "function_call" ? { role, content: "", tool_calls: callsOf(said, place) } : { role, content: said };
    return { message, trained: weightOf(each["weight"] ?? each["loss_weight"] ?? each["train"], place) };
  });
}

/** Tool calls written as JSON: one, or a list of them. */
function callsOf(text: string, name: string): object[] {
  const value = json(text, name);
  return (Array.isArray(value) ? value : [value]).map((call) => {
    if (!isObject(call) || typeof call["name"] !== "string")
      throw new RowError(`${name} must be a call like {"name": "…", "arguments": {…}}, not ${shown(call)}`);
    return { type: "function", function: { name: call["name"], arguments: call["arguments"] ?? {} } };
  });
}

/** OpenAI's tools, or bare function descriptions; a list or JSON text of one. */
export function readTools(value: unknown): Tool[] {
  if (value === undefined || value === "" || value === null) return [];
  return listOf(value, "tools").map((each, i) => {
    const described = isObject(each) && isObject(each["function"]) ? each["function"] : each;
    if (!isObject(described) || typeof described["name"] !== "string")
      throw new RowError(`tools[${i}] must be like {"name": "…", "parameters": {…}}, not ${shown(each)}`);
    const { name, description, parameters } = described;
    return {
      name,
      strict: false,
      ...(typeof description === "string" ? { description } : {}),
      ...(isObject(parameters) ? { parameters } : {}),
    };
  });
}

function listOf(value: unknown, name: string): readonly unknown[] {
  const list = typeof value === "string" ? json(value, name) : value;
  if (!Array.isArray(list)) throw new RowError(`${name} must be a list, not ${shown(list)}`);
  if (list.length > MOST_MESSAGES) throw new RowError(`${name} has ${list.length} entries; at most ${MOST_MESSAGES} are taken`);
  return list;
}

function json(text: string, name: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new RowError(`${name} is not JSON: ${shown(text)}`);
  }
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
