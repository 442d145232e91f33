/** A running chat: asks the model, streams its answer, and executes slash commands. Knows no keyboard. */

import type { GenerationOptions } from "../api/generation.ts";
import type { CausalLM } from "../api/model.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { type Answer, answer, describeSpeed } from "./answer.ts";
import type { Conversation } from "./conversation.ts";
import { UsageError } from "./failure.ts";
import { counted } from "./terminal.ts";

/** Where a session writes. */
export interface Outlet {
  /** The answer's text. */
  text(piece: string): void;
  /** Everything else, a line at a time. */
  notice(line: string): void;
  /** Whether to report the speed after each answer. */
  readonly speed: boolean;
}

const COMMANDS: Readonly<Record<string, string>> = {
  "/system": "TEXT   set the system message; without TEXT, show it",
  "/adapter": "on|off answer with the adapters of --adapter, or without",
  "/reset": "        forget the conversation, but keep the system message",
  "/regenerate": "   answer the last question again",
  "/save": "FILE     write the messages as JSON",
  "/load": "FILE     continue with saved messages",
  "/stats": "        tokens and speed so far",
  "/help": "         this list",
  "/exit": "         leave; so does Ctrl-D",
};

export const COMMAND_WORDS = Object.keys(COMMANDS);

export class Session {
  readonly #model: CausalLM;
  readonly #tokenizer: Tokenizer;
  readonly #conversation: Conversation;
  readonly #options: GenerationOptions & { readonly seed: number };
  readonly #out: Outlet;
  #answers = 0;
  #newTokens = 0;
  #last: Answer | null = null;
  #running: AbortController | null = null;

  constructor(
    parts: { readonly model: CausalLM; readonly tokenizer: Tokenizer; readonly conversation: Conversation },
    options: GenerationOptions & { readonly seed: number },
    out: Outlet,
  ) {
    this.#model = parts.model;
    this.#tokenizer = parts.tokenizer;
    this.#conversation = parts.conversation;
    this.#options = options;
    this.#out = out;
  }

  /** Stops the current answer; the part so far stays in the conversation. */
  stop(): void {
    this.#running?.abort();
  }

  /**
   * Takes a message or a command. Returns false when the user wants to leave. A line that begins with / is a command if a word follows;
   * `//word` sends `/word`, and anything else, such as a path or a comment, is sent as it is.
   */
  async take(input: string): Promise<boolean> {
    const [, slashes = "", word = "", rest = ""] = /^(\/{0,2})([a-zA-Z]+(?=\s|$))?\s*([\s\S]*)$/.exec(input.trim()) ?? [];
    if (slashes === "/" && word !== "") return this.#command(`/${word}`, rest);
    if (input.trim() !== "") await this.ask(slashes === "//" && word !== "" ? input.trim().slice(1) : input);
    return true;
  }

  /** Asks and streams the answer. If that fails, the conversation is left unchanged. */
  async ask(question: string): Promise<void> {
    this.#conversation.turns.push({ role: "user", content: question });
    try {
      await this.#answer();
    } catch (error) {
      this.#conversation.turns.pop();
      throw error;
    }
  }

  async #answer(): Promise<void> {
    const { turns } = this.#conversation;
    const { maxPositions } = this.#model.config;
    const wanted = this.#options.max_new_tokens ?? 1024;
    const reserve = Math.min(wanted, Math.max(1, maxPositions >> 2));
    const { ids, dropped } = this.#conversation.fit(this.#tokenizer, maxPositions - reserve);
    if (dropped)
      this.#out.notice(
        `(the oldest ${counted(dropped, "message")} ${dropped === 1 ? "was" : "were"} dropped: the model's limit is ${maxPositions} tokens)`,
      );
    const max_new_tokens = Math.min(wanted, maxPositions - ids.length);
    const seed = (this.#options.seed + this.#answers) % 2 ** 47;
    this.#running = new AbortController();
    const onText = (piece: string) => this.#out.text(piece);
    const options = { ...this.#options, max_new_tokens, seed };
    const said = await answer(this.#model, this.#tokenizer, ids, options, { onText, signal: this.#running.signal });
    this.#running = null;
    this.#out.text("\n");
    this.#answers++;
    this.#newTokens += said.ids.length;
    this.#last = said;
    if (said.finish === "interrupted" && said.text.trim() === "") {
      turns.pop();
      this.#out.notice("(stopped before the answer began; the question was dropped)");
      return;
    }
    turns.push({ role: "assistant", content: said.text });
    if (said.finish === "interrupted") this.#out.notice("(stopped)");
    if (said.finish === "length") this.#out.notice(`(cut off after ${counted(said.ids.length, "token")}; --max-new-tokens allows more)`);
    if (this.#out.speed) this.#out.notice(describeSpeed(said));
  }

  async #command(word: string, rest: string): Promise<boolean> {
    const { turns } = this.#conversation;
    switch (word) {
      case "/system":
        if (rest) this.#conversation.system = rest;
        this.#out.notice(`system: ${this.#conversation.system || "(none)"}`);
        return true;
      case "/adapter":
        this.#adapter(rest);
        return true;
      case "/reset":
        turns.length = 0;
        this.#out.notice("conversation forgotten");
        return true;
      case "/regenerate":
        await this.#regenerate();
        return true;
      case "/save":
        await this.#conversation.save(fileOf(word, rest));
        this.#out.notice(`saved ${this.#conversation.messages.length} messages to ${rest}`);
        return true;
      case "/load":
        await this.#conversation.load(fileOf(word, rest));
        this.#out.notice(`loaded ${this.#conversation.messages.length} messages from ${rest}`);
        return true;
      case "/stats":
        this.#stats();
        return true;
      case "/help":
        for (const [name, meaning] of Object.entries(COMMANDS)) this.#out.notice(`  ${name} ${meaning}`);
        this.#out.notice('  a line that ends with \\ goes on; """ opens and closes a block; Ctrl-C stops an answer');
        this.#out.notice("  //word sends the message /word; other lines that begin with / and no command, such as paths, are messages");
        return true;
      case "/exit":
      case "/quit":
        return false;
      default:
        throw new UsageError(
          `there is no command ${word}; there are ${COMMAND_WORDS.join(" ")}; to send the line as a message, write /${word}`,
        );
    }
  }

  #adapter(which: string): void {
    const [name] = this.#model.adapter_names.slice(-1);
    if (name === undefined) throw new UsageError("no adapter is loaded; start the chat with --adapter FOLDER");
    if (which !== "" && which !== "on" && which !== "off") throw new UsageError(`/adapter is '${which}'; it must be on or off`);
    if (which !== "") this.#model.set_adapter(which === "on" ? name : null);
    this.#out.notice(`adapter: ${this.#model.active_adapter === null ? "off" : "on"}`);
  }

  async #regenerate(): Promise<void> {
    const { turns } = this.#conversation;
    const last = turns.at(-1);
    if (last?.role === "assistant") turns.pop();
    if (turns.at(-1)?.role !== "user") throw new UsageError("there is no question yet to answer");
    try {
      await this.#answer();
    } catch (error) {
      if (last?.role === "assistant") turns.push(last);
      throw error;
    }
  }

  #stats(): void {
    const { messages } = this.#conversation;
    const read = messages.length ? this.#tokenizer.apply_chat_template(messages).length : 0;
    this.#out.notice(`${counted(messages.length, "message")}, ${read} of ${this.#model.config.maxPositions} tokens`);
    this.#out.notice(`${counted(this.#answers, "answer")}, ${counted(this.#newTokens, "token")}; ${this.#model.device}`);
    if (this.#last) this.#out.notice(`last answer: ${describeSpeed(this.#last)}`);
  }
}

function fileOf(word: string, rest: string): string {
  if (!rest) throw new UsageError(`${word} needs a file name`);
  return rest;
}
