// What chat templates are given: the messages of a conversation. Knows no template.

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
