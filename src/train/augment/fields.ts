/** The texts of a row that augmentation may change, and the row with others in their place. Every other field stays as it is. */
import { RowError, shown } from "../data/fault.ts";
import type { Columns, Layout } from "../data/layout.ts";
import type { Fields } from "../data/table.ts";

/** Names of what can be changed: fields, and in conversations the messages of a role. Labels never are. */
export const TARGETS = ["user", "system", "assistant", "instruction", "input", "output", "prompt", "completion", "text"] as const;
export type Target = (typeof TARGETS)[number];

/** What is changed where nothing else is asked for: what a user writes. */
export const USUAL: Readonly<Record<Layout, readonly Target[]>> = {
  messages: ["user"],
  sharegpt: ["user"],
  instruction: ["instruction", "input"],
  completion: ["prompt", "user"],
  text: ["text"],
  label: ["text"],
  preference: ["prompt", "instruction", "input", "user"],
};

const CONVERSATIONS = ["messages", "conversations", "prompt", "completion"];
/** Fields with answers: not changed, and what the changed texts must still fit. */
const ANSWERS = ["output", "completion", "chosen", "rejected"];

/** A text of a row. */
export interface Place {
  readonly text: string;
  /** The column, and within a conversation the message and, of several parts, the part. */
  readonly column: string;
  readonly message: number | null;
  readonly part: number | null;
}

/** The texts to change, and texts beside them that say what the model is to answer. Throws RowError for conversations that are none. */
export function textsOf(
  fields: Fields,
  columns: Columns,
  targets: readonly Target[],
): { readonly places: readonly Place[]; readonly answers: readonly string[] } {
  const places: Place[] = [];
  const answers: string[] = [];
  const chosen: readonly string[] = targets;
  for (const name of [
    "text",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "chosen",
    "rejected",
    "label",
  ]) {
    const column = columns[name] ?? name;
    const value = fields[column];
    const list = CONVERSATIONS.includes(name) || ANSWERS.includes(name) ? listIn(value, column) : null;
    if (list !== null) {
      for (const [message, each] of list.entries()) {
        const { role, texts } = said(each);
        for (const { text, part } of texts)
          if (chosen.includes(role)) places.push({ text, column, message, part });
          else if (role === "assistant") answers.push(text);
      }
    } else if (typeof value === "string") {
      if (chosen.includes(name)) places.push({ text: value, column, message: null, part: null });
      else if (ANSWERS.includes(name) || name === "label") answers.push(value);
    }
  }
  return { places: places.filter(({ text }) => text.trim() !== ""), answers };
}

/** The row with other texts in these places. */
export function withTexts(fields: Fields, places: readonly Place[], texts: readonly string[]): Fields {
  const changed: Record<string, unknown> = { ...fields };
  for (const column of new Set(places.map((place) => place.column))) {
    const own = places.flatMap((place, i) => (place.column === column ? [{ ...place, text: texts[i] }] : []));
    if (own[0].message === null) changed[column] = own[0].text;
    else {
      const list = structuredClone(listIn(fields[column], column)) as Record<string, unknown>[];
      for (const { message, part, text } of own) replace(list[message ?? 0], part, text);
      const isText = typeof fields[column] === "string";
      changed[column] = isText ? JSON.stringify(list) : list;
    }
  }
  return changed;
}

/** A conversation, also as JSON text; null for what is none. */
function listIn(value: unknown, column: string): readonly unknown[] | null {
  if (Array.isArray(value)) return value.length > 0 && typeof value[0] === "object" ? value : null;
  if (typeof value === "object" && value !== null && ("role" in value || "from" in value)) return [value];
  if (typeof value !== "string" || !/^\s*\[\s*\{/.test(value)) return null;
  try {
    return JSON.parse(value) as unknown[];
  } catch {
    if (column === "messages" || column === "conversations") throw new RowError(`${column} is not JSON: ${shown(value)}`);
    return null; // a text that begins like a list
  }
}

const ROLES: Readonly<Record<string, string>> = { human: "user", gpt: "assistant", chatgpt: "assistant" };

function said(message: unknown): {
  readonly role: string;
  readonly texts: readonly { readonly text: string; readonly part: number | null }[];
} {
  if (typeof message !== "object" || message === null) return { role: "", texts: [] };
  const { role, from, content, value } = message as Readonly<Record<string, unknown>>;
  const name = String(role ?? from);
  const text = content ?? value;
  const texts = Array.isArray(text)
    ? text.flatMap((each: Readonly<Record<string, unknown>> | null, part) => {
        const own = each?.["text"] ?? each?.["value"];
        return each?.["type"] === "text" && typeof own === "string" ? [{ text: own, part }] : [];
      })
    : typeof text === "string"
      ? [{ text, part: null }]
      : [];
  return { role: ROLES[name] ?? name, texts };
}

function replace(message: Record<string, unknown>, part: number | null, text: string): void {
  const key = "content" in message ? "content" : "value";
  if (part === null) message[key] = text;
  else {
    const own = (message[key] as Record<string, unknown>[])[part];
    own["text" in own ? "text" : "value"] = text;
  }
}
