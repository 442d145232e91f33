/** What a row of training data can be, whatever its layout in the file. Knows no file and no tokens. */
import type { Tool } from "../../chat/tools.ts";
import type { Message } from "../../tokenizer/message.ts";

/** A conversation. `trained[i]`: the model is to learn message i. */
export interface ChatRow {
  readonly kind: "chat";
  readonly messages: readonly Message[];
  readonly tools: readonly Tool[];
  readonly trained: readonly boolean[];
}

/** A text, and how it goes on; no chat template. */
export interface CompletionRow {
  readonly kind: "completion";
  readonly prompt: string;
  readonly completion: string;
}

/** A text to learn as a whole. */
export interface TextRow {
  readonly kind: "text";
  readonly text: string;
  /** It is not the end of its document. */
  readonly continues: boolean;
}

/** A text to classify. */
export interface LabelRow {
  readonly kind: "label";
  readonly text: string;
  /** A class, several, or a number to predict, as the file has it. */
  readonly label: string | number | readonly (string | number)[];
}

/** Two answers to a prompt, of which the first is better. Answers to a conversation are messages. */
export interface PreferenceRow {
  readonly kind: "preference";
  readonly prompt: string | Pick<ChatRow, "messages" | "tools">;
  readonly chosen: string | readonly Message[];
  readonly rejected: string | readonly Message[];
}

export type Row = ChatRow | CompletionRow | TextRow | LabelRow | PreferenceRow;

/** What a model reads of a row, without what it is to say. Rows with the same input belong on one side of a split. */
export function inputOf(row: Row): string {
  switch (row.kind) {
    case "chat": {
      const last = row.messages.findLastIndex(({ role }) => role === "assistant");
      return JSON.stringify(last > 0 ? row.messages.slice(0, last) : row.messages);
    }
    case "completion":
      return row.prompt === "" ? row.completion : row.prompt;
    case "text":
    case "label":
      return row.text;
    case "preference":
      return typeof row.prompt === "string" ? row.prompt : JSON.stringify(row.prompt.messages);
    default:
      return row satisfies never;
  }
}
