// Chat templates: renders messages, and rejects conversations that a template would drop parts of. Knows nothing of ids.
import { Template } from "@huggingface/jinja";
import { TokenizerError } from "./error.ts";

/** A message of a conversation. Templates may use additional fields (`tool_calls`, `name`, `reasoning_content`). */
export interface Message {
  readonly role: string;
  readonly content?: string | readonly ContentPart[] | null;
  readonly [key: string]: unknown;
}

/** A part of a message. Templates that support only strings get the text parts, joined with newlines. */
export interface ContentPart {
  readonly type: string;
  readonly text?: string;
  readonly [key: string]: unknown;
}

export class ChatTemplate {
  private readonly template: Template;
  private readonly takesParts: boolean;

  /** Throws `TokenizerError` if `source` is not a valid Jinja template. */
  constructor(source: string) {
    try {
      this.template = new Template(source);
    } catch (cause) {
      throw new TokenizerError(`chat template: ${reason(cause)}`, { cause });
    }
    this.takesParts = /\bfor\s+\w+\s+in\s+[\w.[\]'"]*content\b/.test(source);
  }

  /**
   * Renders a conversation. Throws `TokenizerError` if the template raises an error, if a message is malformed, or if the template would
   * silently drop the content of a message (the published ERNIE templates do so for the role `tool`).
   */
  render(messages: readonly Message[], variables: Readonly<Record<string, unknown>>): string {
    const flat = messages.map((message, i) => this.fitted(message, i));
    const text = this.run(flat, variables);
    this.refuseLoss(flat, variables, text);
    return text;
  }

  /** Converts a message to the form that this template supports. Throws `TokenizerError` if it has unsupported parts. */
  fitted(message: Message, index: number): Message {
    if (typeof message !== "object" || message === null || typeof message.role !== "string")
      throw new TokenizerError(`message ${index} has no role: ${JSON.stringify(message)}`);
    const { content } = message;
    if (content === undefined || content === null || typeof content === "string") return message;
    if (!Array.isArray(content))
      throw new TokenizerError(`message ${index} (${message.role}): content is neither text nor a list of parts`);
    if (this.takesParts) return message;
    const texts = (content as readonly ContentPart[]).map((part) => {
      if (part?.type === "text" && typeof part.text === "string") return part.text;
      throw new TokenizerError(
        `message ${index} (${message.role}): the chat template supports only text, not parts of type ${JSON.stringify(part?.type)}`,
      );
    });
    return { ...message, content: texts.join("\n") };
  }

  private run(messages: readonly Message[], variables: Readonly<Record<string, unknown>>): string {
    try {
      return this.template.render({ ...variables, messages });
    } catch (cause) {
      const empty = messages.findIndex(({ content }) => content === undefined || content === null);
      if (empty >= 0)
        throw new TokenizerError(
          `message ${empty} (${messages[empty].role}): the chat template can't render it without content; give it a text, if need be an empty one`,
          { cause },
        );
      throw new TokenizerError(`chat template: ${reason(cause)}`, { cause });
    }
  }

  /**
   * A message is lost if its content does not affect the rendered text. One extra rendering probes all messages at once; those whose
   * probe does not show up are probed individually.
   */
  private refuseLoss(messages: readonly Message[], variables: Readonly<Record<string, unknown>>, text: string): void {
    let word = "probe";
    while (text.includes(word)) word += "x";
    const marked = messages.map((message, i) => (saysSomething(message) ? appended(message, `${word}${i}z`) : message));
    const seen = this.attempt(marked, variables);
    for (const [i, message] of messages.entries()) {
      const lost =
        saysSomething(message) &&
        !seen?.includes(`${word}${i}z`) &&
        this.attempt(messages.with(i, marked[i] ?? message), variables) === text;
      if (lost) throw lossError(message, i, "its content");
      const { tool_calls: calls, ...without } = message;
      if (Array.isArray(calls) && calls.length > 0 && this.attempt(messages.with(i, without as Message), variables) === text)
        throw lossError(message, i, "its tool calls");
    }
  }

  /** Renders changed messages; null if the template raises an error, which proves that it reads them. */
  private attempt(messages: readonly Message[], variables: Readonly<Record<string, unknown>>): string | null {
    try {
      return this.template.render({ ...variables, messages });
    } catch {
      return null;
    }
  }
}

/** The rendered text up to the end of the last message's content, for the model to continue. Throws `TokenizerError` if it cannot be found. */
export function openEnd(rendered: string, messages: readonly Message[]): string {
  const content = messages.at(-1)?.content;
  const parts = Array.isArray(content) ? (content as readonly ContentPart[]).flatMap(({ text }) => text ?? []) : [content ?? ""];
  const final = parts.at(-1) ?? "";
  const at = typeof final === "string" ? rendered.lastIndexOf(final.trim()) : -1;
  if (typeof final !== "string" || at < 0)
    throw new TokenizerError(
      "continue_final_message: the chat template changes the last message, so its end cannot be found in the rendered text",
    );
  const kept = final.trimStart(); // includes trailing white space, unless the template trims it
  return rendered.slice(0, at + (rendered.startsWith(kept, at) ? kept.length : final.trim().length));
}

function saysSomething({ content }: Message): boolean {
  if (typeof content === "string") return content.trim() !== "";
  return Array.isArray(content) && content.some((part: ContentPart) => typeof part?.text === "string" && part.text.trim() !== "");
}

function appended(message: Message, probe: string): Message {
  const { content } = message;
  if (typeof content === "string") return { ...message, content: content + probe };
  const parts = (content ?? []) as readonly ContentPart[];
  return { ...message, content: parts.map((part) => (typeof part?.text === "string" ? { ...part, text: part.text + probe } : part)) };
}

function lossError({ role }: Message, index: number, what: string): TokenizerError {
  return new TokenizerError(`the chat template drops message ${index} (${role}): ${what} would be lost`);
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message.replace(/\s*\n\s*/g, " ") : String(cause);
}
