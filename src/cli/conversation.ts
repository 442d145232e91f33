/** A conversation: its messages, the part of it that fits the model, and its file. Knows neither the terminal nor how answers are generated. */
import { randomUUID } from "node:crypto";
import { readFile, rename, rm, writeFile } from "node:fs/promises";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { UsageError } from "./failure.ts";

const ROLES = ["system", "user", "assistant"] as const;

export type Turn = { readonly role: (typeof ROLES)[number]; readonly content: string };

export class Conversation {
  /** Empty: none. */
  system: string;
  /** User and assistant in turn, oldest first. */
  readonly turns: Turn[] = [];

  constructor(system = "") {
    this.system = system;
  }

  get messages(): Turn[] {
    return this.system ? [{ role: "system", content: this.system }, ...this.turns] : [...this.turns];
  }

  /**
   * The ids of the prompt, at most `room` of them: the oldest turns are dropped for good, but never the last question.
   * Throws UsageError if even that alone is too long.
   */
  fit(tokenizer: Tokenizer, room: number): { ids: number[]; dropped: number } {
    let dropped = 0;
    for (;;) {
      // Special tokens that people type are plain text.
      const ids = tokenizer.apply_chat_template(this.messages, { add_generation_prompt: true, split_special_tokens: true });
      if (ids.length <= room) return { ids, dropped };
      if (this.turns.length <= 1)
        throw new UsageError(`the message has ${ids.length} tokens, and the model takes ${room} besides its answer; shorten it`);
      do {
        this.turns.shift();
        dropped++;
      } while (this.turns.length > 1 && this.turns[0].role !== "user");
    }
  }

  /** Writes the messages as JSON, atomically. */
  async save(file: string): Promise<void> {
    const temporary = `${file}.${randomUUID()}.tmp`;
    try {
      await writeFile(temporary, `${JSON.stringify(this.messages, null, 2)}\n`);
      await rename(temporary, file);
    } catch (cause) {
      await rm(temporary, { force: true });
      throw new UsageError(`${file}: can't be written (${cause instanceof Error ? cause.message : String(cause)})`, { cause });
    }
  }

  /** Replaces the messages with those of a file. If the file has none, throws UsageError and changes nothing. */
  async load(file: string): Promise<void> {
    let text: string;
    try {
      text = await readFile(file, "utf8");
    } catch (cause) {
      throw new UsageError(`${file}: can't be read (${cause instanceof Error ? cause.message : String(cause)})`, { cause });
    }
    const messages = parseMessages(file, text);
    const system = messages.filter(({ role }) => role === "system");
    this.system = system.map(({ content }) => content).join("\n");
    this.turns.splice(0, this.turns.length, ...messages.filter(({ role }) => role !== "system"));
  }
}

function parseMessages(file: string, text: string): Turn[] {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new UsageError(`${file}: broken JSON (${cause instanceof Error ? cause.message : String(cause)})`, { cause });
  }
  if (!Array.isArray(value)) throw new UsageError(`${file}: not a list of messages`);
  return value.map((message: unknown, i) => {
    const { role, content } = (message ?? {}) as { role?: unknown; content?: unknown };
    const known = ROLES.find((each) => each === role);
    if (!known || typeof content !== "string")
      throw new UsageError(`${file}: message ${i} is not like {"role": "user", "content": "…"}; roles are ${ROLES.join(", ")}`);
    return { role: known, content };
  });
}
