/**
 * Prompts to ids and ids to text without blocking the event loop: short ones in turns, long ones in a worker thread. Owners take
 * turns in both. Prompts that are too long for any tokens to fit are refused by their length.
 */
import { type EncodedPrompt, encodePrompt, type Prompt, PromptError } from "../../chat/prompt.ts";
import { Turns } from "../../grammar/turns.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import { ServerError } from "../errors.ts";
import { Thread, threadScript } from "../thread.ts";
import type { Job, Outcome } from "./worker.ts";

/** Texts and lists of at least this size take a few milliseconds, which makes the thread worthwhile. */
const LONG_CHARACTERS = 16_384;
const LONG_TOKENS = 8192;
/** The longest text that ids decode to, in characters: it becomes a response. */
const LONGEST_DECODED = 2 ** 22;

export interface EncodeTerms {
  /** Id of the caller. */
  readonly owner?: string;
  /** The most tokens that the prompt may have. Default: no limit. */
  readonly mostTokens?: number;
}

export class Encoder {
  readonly #tokenizer: Tokenizer;
  readonly #turns: Turns;
  readonly #thread: Thread<Job, Outcome>;
  #longestToken: number | null = null;

  /** @param source folder or file that the tokenizer was opened from */
  constructor(source: string, tokenizer: Tokenizer, turns = new Turns()) {
    this.#tokenizer = tokenizer;
    this.#turns = turns;
    this.#thread = new Thread(threadScript(import.meta.url, "worker"), source);
  }

  /**
   * The ids of a prompt. Rejects with PromptError for what the tokenizer or the chat template refuses, with ServerError
   * `context_length_exceeded` for a text that cannot be written with `mostTokens`.
   */
  async encode(prompt: Prompt, signal?: AbortSignal, { owner, mostTokens }: EncodeTerms = {}): Promise<EncodedPrompt> {
    if (mostTokens !== undefined) this.#checkLength(prompt, mostTokens);
    if (prompt.kind === "tokens" || !isLong(prompt))
      return this.#turns.take(() => {
        signal?.throwIfAborted();
        return encodePrompt(this.#tokenizer, prompt);
      }, owner);
    const outcome = await this.#send({ kind: "encode", prompt }, owner, signal);
    if (outcome.kind !== "encoded") throw new Error(`internal: asked to encode, got ${outcome.kind}`);
    return outcome.prompt;
  }

  /**
   * The text of ids, all of which must be in the vocabulary. Rejects with ServerError `invalid_request` when it is longer than a
   * response may be.
   */
  async decode(tokens: readonly number[], skipSpecialTokens: boolean, signal?: AbortSignal, { owner }: EncodeTerms = {}): Promise<string> {
    if (tokens.length < LONG_TOKENS)
      return this.#turns.take(() => this.#tokenizer.decode(tokens, { skip_special_tokens: skipSpecialTokens }), owner);
    const outcome = await this.#send({ kind: "decode", tokens, skipSpecialTokens, longest: LONGEST_DECODED }, owner, signal);
    if (outcome.kind !== "decoded") throw new Error(`internal: asked to decode, got ${outcome.kind}`);
    return outcome.text;
  }

  /** Ends the thread; its pending jobs fail. */
  async close(): Promise<void> {
    await this.#thread.close(new Error("the model is being unloaded"));
  }

  async #send(job: Job, owner?: string, signal?: AbortSignal): Promise<Exclude<Outcome, { kind: "refused" | "failed" }>> {
    const outcome = await this.#thread.run(job, { owner, signal });
    if (outcome.kind === "refused") throw new PromptError(outcome.param, outcome.message);
    if (outcome.kind === "failed") throw new Error(`encoding failed: ${outcome.message}`);
    return outcome;
  }

  /** No text is encoded that has more characters than the longest tokens of the vocabulary could hold. */
  #checkLength(prompt: Prompt, mostTokens: number): void {
    if (prompt.kind === "tokens") return;
    const characters =
      prompt.kind === "text" ? prompt.text.length : prompt.messages.reduce((sum, { content }) => sum + lengthOf(content), 0);
    if (characters <= mostTokens) return; // at least one character a token
    this.#longestToken ??= longestToken(this.#tokenizer);
    if (characters <= mostTokens * this.#longestToken) return;
    throw new ServerError(
      "context_length_exceeded",
      `the prompt has ${characters} characters; no text of more than ${mostTokens * this.#longestToken} fits the ${mostTokens} tokens that a prompt may have here`,
      { param: prompt.kind === "chat" ? "messages" : "prompt" },
    );
  }
}

/** Characters of a message's content. */
function lengthOf(content: unknown): number {
  if (typeof content === "string") return content.length;
  return Array.isArray(content) ? content.reduce((sum: number, part: { readonly text?: unknown }) => sum + lengthOf(part.text), 0) : 0;
}

/** In characters, as the vocabulary writes it: at least as long as the text that it stands for. */
function longestToken({ vocabulary }: Tokenizer): number {
  let longest = 1;
  for (let id = 0; id < vocabulary.fullSize; id++) if (vocabulary.has(id)) longest = Math.max(longest, vocabulary.token(id).length);
  return longest;
}

/** What a value costs besides its text, in characters: a message, a part, a number in a schema. */
const OVERHEAD = 24;

/** Whether a value holds much text or many values, at any depth. */
function isLong(value: unknown): boolean {
  let left = LONG_CHARACTERS;
  const count = (each: unknown, name = ""): void => {
    left -= OVERHEAD + name.length;
    if (typeof each === "string") left -= each.length;
    else if (Array.isArray(each)) for (let i = 0; i < each.length && left > 0; i++) count(each[i]);
    else if (typeof each === "object" && each !== null)
      for (const key in each) {
        if (left <= 0) return;
        count((each as Readonly<Record<string, unknown>>)[key], key);
      }
  };
  count(value);
  return left <= 0;
}
