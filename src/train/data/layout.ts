/** From the fields of a file's row to a row of training data: finds a file's layout by the names of its columns, and reads it. */
import { chatRow, messagesOf, readMessages, readTools, sharegptMessages } from "./conversation.ts";
import { RowError, shown } from "./fault.ts";
import type { ChatRow, PreferenceRow, Row } from "./row.ts";
import type { Fields } from "./table.ts";

export const LAYOUTS = ["messages", "sharegpt", "instruction", "completion", "text", "label", "preference"] as const;
export type Layout = (typeof LAYOUTS)[number];

/** The fields of each layout: those that it needs, and those that it may have. */
export const LAYOUT_FIELDS: Readonly<Record<Layout, { readonly needs: readonly string[]; readonly may: readonly string[] }>> = {
  messages: { needs: ["messages"], may: ["tools", "system"] },
  sharegpt: { needs: ["conversations"], may: ["tools", "system"] },
  instruction: { needs: ["instruction", "output"], may: ["input", "system", "history"] },
  completion: { needs: ["prompt", "completion"], may: ["tools", "system"] },
  text: { needs: ["text"], may: [] },
  label: { needs: ["text", "label"], may: [] },
  preference: { needs: ["chosen", "rejected"], may: ["prompt", "conversations", "instruction", "input", "system", "tools"] },
};
/** All fields, as `columns` may map them. */
export const FIELD_NAMES = [...new Set(Object.values(LAYOUT_FIELDS).flatMap(({ needs, may }) => [...needs, ...may]))];

/** Layouts in the order in which they are tried: `label` before `text`, whose field it has too. */
const ORDER: readonly Layout[] = ["preference", "messages", "sharegpt", "instruction", "completion", "label", "text"];

/** Which column of the file holds a field; others have the field's own name. */
export type Columns = Readonly<Partial<Record<string, string>>>;

/** The layout of a row by its columns. Throws RowError, with the columns that there are. */
export function layoutOf(fields: Fields, columns: Columns): Layout {
  const has = (name: string) => (columns[name] ?? name) in fields;
  const found = ORDER.find((layout) => LAYOUT_FIELDS[layout].needs.every(has));
  if (found === undefined)
    throw new RowError(
      `the columns are ${Object.keys(fields).map(shown).join(", ") || "none"}, which is no known layout (${ORDER.map((layout) => LAYOUT_FIELDS[layout].needs.join(" + ")).join("; ")}): map them with columns, such as {"text": "COLUMN"}`,
    );
  if (found === "messages" && typeof fields[columns["label"] ?? "label"] === "boolean")
    throw new RowError(
      "messages with a label of true or false are unpaired preferences, which cannot be trained on: pair them as chosen and rejected, or give layout: messages to learn all of them",
    );
  return found;
}

/** Reads a row of a layout. Throws RowError. */
export function readRow(fields: Fields, layout: Layout, columns: Columns): Row {
  const get = (name: string): unknown => fields[columns[name] ?? name] ?? undefined;
  const { needs } = LAYOUT_FIELDS[layout];
  for (const name of needs)
    if (get(name) === undefined) {
      const column = columns[name] ?? name;
      throw new RowError(
        column in fields
          ? `the column ${shown(column)} is empty`
          : `there is no column ${shown(column)}: the columns are ${Object.keys(fields).map(shown).join(", ")}`,
      );
    }
  for (const medium of ["images", "videos", "audios"])
    if (Array.isArray(fields[medium]) && fields[medium].length > 0)
      throw new RowError(`the row has ${medium}, which cannot be trained on yet`);
  const system = optionalText(get("system"), "system");
  switch (layout) {
    case "messages":
      return chatRow(readMessages(get("messages"), "messages"), readTools(get("tools")), system);
    case "sharegpt":
      return chatRow(sharegptMessages(get("conversations"), "conversations"), readTools(get("tools")), system);
    case "instruction":
      return instructionRow(get, system);
    case "completion": {
      const [prompt, completion] = [get("prompt"), get("completion")];
      if (typeof prompt === "string" && typeof completion === "string") {
        if (completion === "") throw new RowError("completion is empty");
        return { kind: "completion", prompt, completion };
      }
      const learnt = messagesOf(completion, "completion", "assistant");
      const row = chatRow([...messagesOf(prompt, "prompt", "user"), ...learnt], readTools(get("tools")), system);
      return { ...row, trained: row.trained.map((each, i) => each && i >= row.messages.length - learnt.length) };
    }
    case "text":
      return { kind: "text", text: text(get("text"), "text"), continues: fields["continues"] === true };
    case "label":
      return { kind: "label", text: text(get("text"), "text"), label: label(get("label")) };
    case "preference":
      return preferenceRow(get, system);
    default:
      return layout satisfies never;
  }
}

type Get = (name: string) => unknown;

function instructionRow(get: Get, system: string | null): ChatRow {
  const messages = [];
  for (const [i, pair] of pairs(get("history")).entries()) {
    if (!Array.isArray(pair) || pair.length !== 2) throw new RowError(`history[${i}] must be a question and its answer: ${shown(pair)}`);
    messages.push(said("user", text(pair[0], `history[${i}][0]`)), said("assistant", text(pair[1], `history[${i}][1]`)));
  }
  messages.push(said("user", instructed(get)), said("assistant", text(get("output"), "output")));
  return chatRow(messages, [], system);
}

function pairs(history: unknown): readonly unknown[] {
  if (history === undefined || history === "") return [];
  if (!Array.isArray(history)) throw new RowError(`history must be a list of questions and answers, not ${shown(history)}`);
  return history;
}

/** Instruction and input as one message, as LLaMA-Factory joins them. */
function instructed(get: Get): string {
  const parts = [text(get("instruction"), "instruction"), optionalText(get("input"), "input") ?? ""];
  return parts.filter((part) => part !== "").join("\n");
}

function preferenceRow(get: Get, system: string | null): PreferenceRow {
  const tools = readTools(get("tools"));
  const [chosen, rejected] = [get("chosen"), get("rejected")];
  const plain = typeof chosen === "string" && typeof rejected === "string";
  if (get("instruction") !== undefined) {
    const { messages } = chatRow([said("user", instructed(get))], tools, system);
    return { kind: "preference", prompt: { messages, tools }, chosen: answers(chosen, "chosen"), rejected: answers(rejected, "rejected") };
  }
  if (get("conversations") !== undefined) {
    const { messages } = chatRow(sharegptMessages(get("conversations"), "conversations"), tools, system);
    return { kind: "preference", prompt: { messages, tools }, chosen: answers(chosen, "chosen"), rejected: answers(rejected, "rejected") };
  }
  const prompt = get("prompt");
  if (typeof prompt === "string" && plain) {
    if (chosen === rejected) throw new RowError("chosen and rejected are the same");
    return { kind: "preference", prompt, chosen, rejected };
  }
  if (prompt !== undefined) {
    const { messages } = chatRow(messagesOf(prompt, "prompt", "user"), tools, system);
    return { kind: "preference", prompt: { messages, tools }, chosen: answers(chosen, "chosen"), rejected: answers(rejected, "rejected") };
  }
  // Both hold the whole conversation: what they share is the prompt.
  if (plain) throw new RowError("chosen and rejected are texts, and there is no prompt");
  const [good, bad] = [answers(chosen, "chosen"), answers(rejected, "rejected")];
  let shared = 0;
  while (shared < Math.min(good.length, bad.length) && JSON.stringify(good[shared]) === JSON.stringify(bad[shared])) shared++;
  if (shared === 0 || shared === good.length || shared === bad.length)
    throw new RowError("chosen and rejected must be conversations that begin alike and end differently, or there must be a prompt");
  const { messages } = chatRow(
    good.slice(0, shared).map((message) => ({ message, trained: null })),
    tools,
    system,
  );
  return { kind: "preference", prompt: { messages, tools }, chosen: good.slice(shared), rejected: bad.slice(shared) };
}

function answers(value: unknown, name: string): ChatRow["messages"] {
  const list = messagesOf(value, name, "assistant").map(({ message }) => message);
  if (list.at(-1)?.role !== "assistant") throw new RowError(`${name} must end with a message of the assistant`);
  return list;
}

function said(role: string, content: string) {
  return { message: { role, content }, trained: null };
}

function text(value: unknown, name: string): string {
  if (typeof value !== "string") throw new RowError(`${name} must be a text, not ${shown(value)}`);
  if (value.trim() === "") throw new RowError(`${name} is empty`);
  return value;
}

function optionalText(value: unknown, name: string): string | null {
  if (value === undefined || value === "") return null;
  if (typeof value !== "string") throw new RowError(`${name} must be a text, not ${shown(value)}`);
  return value;
}

function label(value: unknown): string | number | readonly (string | number)[] {
  const one = (each: unknown): string | number => {
    if (typeof each === "boolean") return String(each);
    if (typeof each === "number" && Number.isFinite(each)) return each;
    if (typeof each === "string" && each.trim() !== "") return each.trim();
    throw new RowError(`label must be a name or a number, not ${shown(each)}`);
  };
  return Array.isArray(value) ? value.map(one) : one(value);
}
