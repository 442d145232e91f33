/**
 * A conversation as a tree: each message has a parent, and edited or regenerated messages are branches of the same parent.
 * Every function returns a new conversation and leaves its argument unchanged. Knows nothing of server, storage or page.
 */

export interface ToolCall {
  readonly name: string;
  /** JSON as the model wrote it; it may be malformed. */
  readonly arguments: string;
}

/** Token counts and timing of one answer. */
export interface Figures {
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly completionTokens: number;
  readonly firstTokenSeconds: number;
  /** Measured after the first token; 0 when there was only one. */
  readonly tokensPerSecond: number;
}

/** Why a message ended. `stopped`: by the user, or because the page was closed. */
export type MessageEnd = "stop" | "length" | "stopped" | "failed";

export interface Message {
  readonly id: string;
  /** Id of the parent message; null for a first message. */
  readonly parent: string | null;
  readonly role: "user" | "assistant";
  readonly content: string;
  readonly reasoning: string;
  readonly toolCalls: readonly ToolCall[];
  /** Null while the answer is being generated. */
  readonly end: MessageEnd | null;
  /** The error message when `end` is `failed`, else null. */
  readonly error: string | null;
  readonly model: string;
  readonly figures: Figures | null;
}

/** Sampling controls; null means the model's default. */
export interface Controls {
  readonly temperature: number | null;
  readonly topP: number | null;
  readonly topK: number | null;
  readonly maxTokens: number | null;
  readonly seed: number | null;
  readonly presencePenalty: number | null;
  readonly frequencyPenalty: number | null;
  readonly repetitionPenalty: number | null;
}

export const DEFAULT_CONTROLS: Controls = {
  temperature: null,
  topP: null,
  topK: null,
  maxTokens: null,
  seed: null,
  presencePenalty: null,
  frequencyPenalty: null,
  repetitionPenalty: null,
};

export interface Conversation {
  readonly id: string;
  /** Empty until the first message, or until the user names the conversation. */
  readonly title: string;
  /** Milliseconds since 1970. */
  readonly updated: number;
  readonly model: string;
  readonly system: string;
  readonly controls: Controls;
  /** In order of creation, so a parent always comes before its children. */
  readonly messages: readonly Message[];
  /** Which branch is shown: maps the id of a parent to the id of its visible child. The key "" stands for the root. */
  readonly shown: Readonly<Record<string, string>>;
}

const TITLE_CHARS = 60;

/** A random 128-bit id in hexadecimal. Browsers offer `crypto.randomUUID` only over TLS or on localhost. */
export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(from: Pick<Conversation, "model" | "system" | "controls">): Conversation {
  const { model, system, controls } = from;
  return { id: newId(), title: "", updated: Date.now(), model, system, controls, messages: [], shown: {} };
}

export function userMessage(parent: string | null, content: string): Message {
  return { ...emptyAnswer(parent, ""), role: "user", content, end: "stop" };
}

/** An answer before its first token. */
export function emptyAnswer(parent: string | null, model: string): Message {
  return {
    id: newId(),
    parent,
    role: "assistant",
    content: "",
    reasoning: "",
    toolCalls: [],
    end: null,
    error: null,
    model,
    figures: null,
  };
}

/** The messages of the visible branch, from the first to the last. */
export function shownMessages({ messages, shown }: Pick<Conversation, "messages" | "shown">): Message[] {
  const byId = new Map(messages.map((m) => [m.id, m]));
  const path: Message[] = [];
  for (let at = byId.get(shown[""] ?? ""); at; at = byId.get(shown[at.id] ?? "")) path.push(at);
  return path;
}

/** The messages from the first up to and including the one with this id. */
export function messagesUpTo({ messages }: Pick<Conversation, "messages">, id: string | null): Message[] {
  const byId = new Map(messages.map((m) => [m.id, m]));
  const path: Message[] = [];
  for (let at = byId.get(id ?? ""); at; at = byId.get(at.parent ?? "")) path.unshift(at);
  return path;
}

/** The message and its siblings, oldest first. */
export function siblings({ messages }: Pick<Conversation, "messages">, message: Message): Message[] {
  return messages.filter((m) => m.parent === message.parent);
}

/** Adds a message under its parent and makes its branch the visible one. */
export function append(conversation: Conversation, message: Message): Conversation {
  const title = conversation.title || (message.role === "user" ? titleOf(message.content) : "");
  return {
    ...conversation,
    title,
    updated: Date.now(),
    messages: [...conversation.messages, message],
    shown: { ...conversation.shown, [message.parent ?? ""]: message.id },
  };
}

/** Makes the branch of this message the visible one. */
export function show(conversation: Conversation, message: Message): Conversation {
  return { ...conversation, shown: { ...conversation.shown, [message.parent ?? ""]: message.id } };
}

export function change(conversation: Conversation, id: string, changes: Partial<Message>): Conversation {
  return { ...conversation, messages: conversation.messages.map((m) => (m.id === id ? { ...m, ...changes } : m)) };
}

/** A title from the first line of the first message. */
function titleOf(text: string): string {
  const line = text.trim().split("\n", 1)[0];
  const characters = [...line];
  return characters.length > TITLE_CHARS ? `${characters.slice(0, TITLE_CHARS - 1).join("")}…` : line;
}
