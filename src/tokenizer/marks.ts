// The passages of messages that a chat template must not lose, and marks to find them by in the rendered text. Knows no template.
import { randomBytes } from "node:crypto";
import type { ContentPart, Message } from "./message.ts";

/** Words that occur in no text, because nobody can guess them, one per number. Found in any case: templates may change it. */
export class Marks {
  readonly #word = `q${randomBytes(12).toString("hex")}n`;

  of(index: number): string {
    return `${this.#word}${index}z`;
  }

  /** The numbers of the marks that a text contains. */
  in(text: string): ReadonlySet<number> {
    return new Set(Array.from(text.matchAll(new RegExp(`${this.#word}(\\d+)z`, "gi")), ([, index]) => Number(index)));
  }

  /** The pieces of a text between the occurrences of a mark. */
  between(text: string, index: number): string[] {
    return text.split(new RegExp(this.of(index), "gi"));
  }
}

/** A text of a message, or the name or the arguments of one of its calls. */
export interface Passage {
  readonly kind: "text" | "name" | "arguments";
  /** Of the message. */
  readonly index: number;
  /** Of the part or the call. */
  readonly place: number;
}

export type Place = "start" | "end";

/** The passages of a message that say something. */
export function passagesOf({ content, tool_calls: calls }: Message, index: number): Passage[] {
  const passages: Passage[] = [];
  if (typeof content === "string") {
    if (content.trim() !== "") passages.push({ kind: "text", index, place: 0 });
  } else if (Array.isArray(content)) {
    for (const [place, part] of content.entries())
      if (isText(part) && part.text.trim() !== "") passages.push({ kind: "text", index, place });
  }
  if (Array.isArray(calls))
    for (const [place, call] of calls.entries()) {
      passages.push({ kind: "name", index, place });
      if (saysSomething(functionOf(call)?.arguments)) passages.push({ kind: "arguments", index, place });
    }
  return passages;
}

export function isText(part: ContentPart | undefined): part is ContentPart & { readonly text: string } {
  return typeof part?.text === "string";
}

/** The messages with a mark in each of the passages: the mark of its place in the list. The end or the start matters for texts only. */
export function marked(messages: readonly Message[], passages: readonly Passage[], marks: Marks, at: Place): Message[] {
  const changed = [...messages];
  for (let from = 0; from < passages.length; ) {
    const { index } = passages[from];
    const texts = new Map<number, string>();
    const [names, given] = [new Map<number, string>(), new Map<number, string>()];
    for (; from < passages.length && passages[from].index === index; from++) {
      const { kind, place } = passages[from];
      ({ text: texts, name: names, arguments: given })[kind].set(place, marks.of(from));
    }
    changed[index] = withCalls(withTexts(changed[index], texts, at), names, given);
  }
  return changed;
}

/** The messages with another text in place of a passage, or without the call or its arguments. */
export function altered(messages: readonly Message[], { kind, index, place }: Passage): Message[] {
  const message = messages[index];
  switch (kind) {
    case "text":
      return messages.with(index, withTexts(withTexts(message, new Map([[place, "x"]]), "end"), new Map([[place, "x"]]), "start"));
    case "name":
      return messages.with(index, { ...message, tool_calls: (message["tool_calls"] as readonly Call[]).toSpliced(place, 1) });
    case "arguments": {
      const calls = message["tool_calls"] as readonly Call[];
      const empty = (of: Call) => ({ arguments: typeof of.arguments === "string" ? "" : {} });
      return messages.with(index, { ...message, tool_calls: calls.with(place, inFunction(calls[place], empty)) });
    }
    default:
      return kind satisfies never;
  }
}

function withTexts(message: Message, marks: ReadonlyMap<number, string>, at: Place): Message {
  const { content } = message;
  const joined = (text: string, mark: string) => (at === "end" ? text + mark : mark + text);
  if (typeof content === "string") return { ...message, content: joined(content, marks.get(0) ?? "") };
  if (!Array.isArray(content) || marks.size === 0) return message;
  const parts = (content as readonly ContentPart[]).map((part, p) => {
    const mark = marks.get(p);
    return mark !== undefined && isText(part) ? { ...part, text: joined(part.text, mark) } : part;
  });
  return { ...message, content: parts };
}

/** A call as templates read it: its name and arguments stand in `function`, or in the call itself. */
interface Call {
  readonly function?: Call;
  readonly name?: unknown;
  readonly arguments?: unknown;
}

function withCalls(message: Message, names: ReadonlyMap<number, string>, given: ReadonlyMap<number, string>): Message {
  if (names.size === 0 && given.size === 0) return message;
  const calls = (message["tool_calls"] as readonly Call[]).map((call, c) => {
    const [name, args] = [names.get(c), given.get(c)];
    return inFunction(call, (of) => ({
      ...(name === undefined ? {} : { name: `${of.name}${name}` }),
      ...(args === undefined ? {} : { arguments: withMark(of.arguments, args) }),
    }));
  });
  return { ...message, tool_calls: calls };
}

function functionOf(call: Call | null): Call | null {
  return call?.function ?? call;
}

function inFunction(call: Call, change: (of: Call) => Call): Call {
  if (call?.function) return { ...call, function: { ...call.function, ...change(call.function) } };
  return { ...call, ...change(call ?? {}) };
}

/** Arguments are JSON text or the value itself. */
function withMark(given: unknown, mark: string): unknown {
  return typeof given === "string" ? given + mark : { ...(given as object), [mark]: mark };
}

function saysSomething(given: unknown): boolean {
  if (typeof given === "string") return given.trim() !== "";
  return typeof given === "object" && given !== null && !Array.isArray(given) && Object.keys(given).length > 0;
}
