/**
 * A conversation as a tree: every message follows another, and edited or repeated ones are branches beside each other.
 * All functions give a new conversation and leave the old as it is. Knows no server, no storage and no page.
 */

export interface ToolCall {
  readonly name: string;
  /** JSON as the model wrote it, which may be broken. */
  readonly arguments: string;
}

/** How fast an answer came. */
export interface Figures {
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly completionTokens: number;
  readonly firstTokenSeconds: number;
  /** Behind the first; 0 where there was but one. */
  readonly tokensPerSecond: number;
}

/** `stopped`: by the user, or because the page was closed. */
export type MessageEnd = "stop" | "length" | "stopped" | "failed";

export interface Message {
  readonly id: string;
  /** Null for a first message. */
  readonly parent: string | null;
  readonly role: "user" | "assistant";
  readonly content: string;
  readonly reasoning: string;
  readonly toolCalls: readonly ToolCall[];
  /** Null while it is written. */
  readonly end: MessageEnd | null;
  /** What went wrong, where `end` is `failed`. */
  readonly error: string | null;
  readonly model: string;
  readonly figures: Figures | null;
}

/** How answers are chosen; null leaves a control to the model's own default. */
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
  /** Empty until there is a first message or the user names it. */
  readonly title: string;
  /** Milliseconds since 1970. */
  readonly updated: number;
  readonly model: string;
  readonly system: string;
  readonly controls: Controls;
  /** In the order in which they came to be: each behind the one it follows. */
  readonly messages: readonly Message[];
  /** Which branch is shown: behind the message of each key, the message of its value. The key of first messages is "". */
  readonly shown: Readonly<Record<string, string>>;
}

const TITLE_CHARS = 60;

/** Never used before. By hand: browsers have `randomUUID` only where the page came by TLS or from this machine. */
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

/** The branch that is shown, first message first. */
export function shownMessages({ messages, shown }: Pick<Conversation, "messages" | "shown">): Message[] {
  const byId = new Map(messages.map((m) => [m.id, m]));
  const path: Message[] = [];
  for (let at = byId.get(shown[""] ?? ""); at; at = byId.get(shown[at.id] ?? "")) path.push(at);
  return path;
}

/** The messages from the first to this one. */
export function messagesUpTo({ messages }: Pick<Conversation, "messages">, id: string | null): Message[] {
  const byId = new Map(messages.map((m) => [m.id, m]));
  const path: Message[] = [];
  for (let at = byId.get(id ?? ""); at; at = byId.get(at.parent ?? "")) path.unshift(at);
  return path;
}

/** The message and those beside it, oldest first. */
export function siblings({ messages }: Pick<Conversation, "messages">, message: Message): Message[] {
  return messages.filter((m) => m.parent === message.parent);
}

/** Adds a message behind its parent, and shows it. */
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

/** Shows the branch that the message is on. */
export function show(conversation: Conversation, message: Message): Conversation {
  return { ...conversation, shown: { ...conversation.shown, [message.parent ?? ""]: message.id } };
}

export function change(conversation: Conversation, id: string, changes: Partial<Message>): Conversation {
  return { ...conversation, messages: conversation.messages.map((m) => (m.id === id ? { ...m, ...changes } : m)) };
}

/** What a conversation is called after its first words. */
function titleOf(text: string): string {
  const line = text.trim().split("\n", 1)[0];
  const characters = [...line];
  return characters.length > TITLE_CHARS ? `${characters.slice(0, TITLE_CHARS - 1).join("")}…` : line;
}
