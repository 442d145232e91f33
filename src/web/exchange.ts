/** Exports conversations to a file and validates the files that are imported. Knows nothing of storage. */
import { type Controls, type Conversation, DEFAULT_CONTROLS, type Figures, type Message, newId, type ToolCall } from "./conversation.ts";

const FORMAT = "mixtape-conversations";
const VERSION = 1;

/** The file is not a valid export. `at` is the path of the bad value, such as `conversations[2].messages[0].role`. */
export class ExchangeError extends Error {
  override readonly name = "ExchangeError";
  readonly at: string;

  constructor(at: string, seen: string) {
    super(at === "" ? seen : `${at}: ${seen}`);
    this.at = at;
  }
}

export function writeConversations(conversations: readonly Conversation[]): string {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 1);
}

/** Parses an export. Every conversation gets a new id, so none replaces an existing one; unknown fields are dropped. Throws ExchangeError. */
export function readConversations(text: string): Conversation[] {
  let file: unknown;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new ExchangeError("", (error as Error).message);
  }
  const root = new Place(file, "");
  if (root.field("format").value !== FORMAT) root.field("format").fail(`not "${FORMAT}"`);
  if (root.field("version").value !== VERSION) root.field("version").fail(`not ${VERSION}`);
  return root.field("conversations").items().map(readConversation);
}

/** A value and its path in the file. */
class Place {
  readonly value: unknown;
  readonly #at: string;

  constructor(value: unknown, at: string) {
    this.value = value;
    this.#at = at;
  }

  fail(what: string): never {
    const seen = JSON.stringify(this.value) ?? "nothing";
    throw new ExchangeError(this.#at, `${seen.length > 40 ? `${seen.slice(0, 40)}…` : seen} is ${what}`);
  }

  field(name: string): Place {
    if (typeof this.value !== "object" || this.value === null || Array.isArray(this.value)) this.fail("not an object");
    const value = Object.hasOwn(this.value, name) ? (this.value as Record<string, unknown>)[name] : undefined;
    return new Place(value, this.#at === "" ? name : `${this.#at}.${name}`);
  }

  items(): Place[] {
    if (!Array.isArray(this.value)) this.fail("not a list");
    return this.value.map((item, i) => new Place(item, `${this.#at}[${i}]`));
  }

  text(): string {
    return typeof this.value === "string" ? this.value : this.fail("not a string");
  }

  number(): number {
    return typeof this.value === "number" && Number.isFinite(this.value) ? this.value : this.fail("not a number");
  }

  oneOf<T extends string | null>(allowed: readonly T[]): T {
    return allowed.includes(this.value as T) ? (this.value as T) : this.fail(`not one of ${allowed.join(", ")}`);
  }

  /** The result of `read`, or null when the value is null or missing. */
  maybe<T>(read: (place: Place) => T): T | null {
    return this.value === null || this.value === undefined ? null : read(this);
  }
}

function readConversation(place: Place): Conversation {
  const messages: Message[] = [];
  const known = new Set<string>();
  for (const item of place.field("messages").items()) {
    const message = readMessage(item);
    if (known.has(message.id)) item.field("id").fail("used twice");
    if (message.parent !== null && !known.has(message.parent)) item.field("parent").fail("not the id of a message before it");
    known.add(message.id);
    messages.push(message);
  }
  return {
    id: newId(),
    title: place.field("title").text().slice(0, 500),
    updated: place.field("updated").number(),
    model: place.field("model").text(),
    system: place.field("system").text(),
    controls: readControls(place.field("controls")),
    messages,
    shown: readShown(place.field("shown"), messages),
  };
}

function readMessage(place: Place): Message {
  const role = place.field("role").oneOf(["user", "assistant"] as const);
  return {
    id: place.field("id").text(),
    parent: place.field("parent").maybe((p) => p.text()),
    role,
    content: place.field("content").text(),
    reasoning: place.field("reasoning").text(),
    toolCalls: place.field("toolCalls").items().map(readToolCall),
    // An answer that was still being generated at the time of the export counts as stopped.
    end: place.field("end").oneOf(["stop", "length", "stopped", "failed", null] as const) ?? "stopped",
    error: place.field("error").maybe((p) => p.text()),
    model: place.field("model").text(),
    figures: place.field("figures").maybe(readFigures),
  };
}

function readToolCall(place: Place): ToolCall {
  return { name: place.field("name").text(), arguments: place.field("arguments").text() };
}

function readFigures(place: Place): Figures {
  const number = (name: keyof Figures) => place.field(name).number();
  return {
    promptTokens: number("promptTokens"),
    cachedTokens: number("cachedTokens"),
    completionTokens: number("completionTokens"),
    firstTokenSeconds: number("firstTokenSeconds"),
    tokensPerSecond: number("tokensPerSecond"),
  };
}

function readControls(place: Place): Controls {
  const names = Object.keys(DEFAULT_CONTROLS) as (keyof Controls)[];
  return Object.fromEntries(names.map((name) => [name, place.field(name).maybe((p) => p.number())])) as unknown as Controls;
}

/** The visible branches named in the file; wherever it names none that exists, the newest. */
function readShown(place: Place, messages: readonly Message[]): Record<string, string> {
  const newest = Object.fromEntries(messages.map((m) => [m.parent ?? "", m.id]));
  const chosen = messages.filter((m) => place.field(m.parent ?? "").value === m.id).map((m) => [m.parent ?? "", m.id]);
  return { ...newest, ...Object.fromEntries(chosen) };
}
