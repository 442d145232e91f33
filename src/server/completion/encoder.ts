/** Prompts to ids and ids to text, without holding the event loop: short ones in turns, long ones in a thread of their own. */
import { Worker } from "node:worker_threads";
import { type EncodedPrompt, promptOf } from "../../chat/prompt.ts";
import { Turns } from "../../grammar/turns.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import { ServerError } from "../errors.ts";
import type { Prompt } from "./request.ts";
import type { Job, Outcome } from "./worker.ts";

/** From so many characters or ids on the thread is worth its while: they take a few milliseconds. */
const LONG_CHARACTERS = 16_384;
const LONG_TOKENS = 8192;
/** A thread that had nothing to do for so long is ended: it holds the vocabulary once more. */
const IDLE_MS = 60_000;
/** Threads run what was compiled, also where the rest is run from its sources. */
const SCRIPT = new URL("../../../dist/server/completion/worker.js", import.meta.url);

interface Waiting {
  readonly job: Job;
  resolve(outcome: Outcome): void;
  reject(reason: unknown): void;
}

export class Encoder {
  readonly #source: string;
  readonly #tokenizer: Tokenizer;
  readonly #turns: Turns;
  #worker: Worker | null = null;
  /** In order of arrival; the first is being done. */
  readonly #waiting: Waiting[] = [];
  #idle: NodeJS.Timeout | undefined;

  /** @param source folder or file that the tokenizer was opened from */
  constructor(source: string, tokenizer: Tokenizer, turns = new Turns()) {
    this.#source = source;
    this.#tokenizer = tokenizer;
    this.#turns = turns;
  }

  /** The ids of a prompt. Throws ServerError `invalid_request` for what the tokenizer or the chat template refuses. */
  async encode(prompt: Prompt, signal?: AbortSignal): Promise<EncodedPrompt> {
    if (prompt.kind === "tokens" || !isLong(prompt)) return this.#turns.take(() => promptOf(this.#tokenizer, prompt));
    const outcome = await this.#send({ kind: "encode", prompt }, signal);
    if (outcome.kind !== "encoded") throw new Error(`internal: asked to encode, got ${outcome.kind}`);
    return outcome.prompt;
  }

  /** The text of ids, all of which the vocabulary must have. */
  async decode(tokens: readonly number[], skipSpecialTokens: boolean): Promise<string> {
    if (tokens.length < LONG_TOKENS)
      return this.#turns.take(() => this.#tokenizer.decode(tokens, { skip_special_tokens: skipSpecialTokens }));
    const outcome = await this.#send({ kind: "decode", tokens, skipSpecialTokens });
    if (outcome.kind !== "decoded") throw new Error(`internal: asked to decode, got ${outcome.kind}`);
    return outcome.text;
  }

  /** Ends the thread. What it was asked for fails. */
  async close(): Promise<void> {
    const worker = this.#worker;
    this.#drop(new Error("the model is being unloaded"));
    await worker?.terminate();
  }

  /** One job is with the thread at a time, so that those of clients who have left are never begun. */
  async #send(job: Job, signal?: AbortSignal): Promise<Exclude<Outcome, { kind: "refused" | "failed" }>> {
    signal?.throwIfAborted();
    let leave = () => {};
    const outcome = await new Promise<Outcome>((resolve, reject) => {
      const waiting = { job, resolve, reject };
      this.#waiting.push(waiting);
      if (this.#waiting.length === 1) this.#next();
      leave = () => this.#leave(waiting, signal?.reason);
      signal?.addEventListener("abort", leave);
    }).finally(() => signal?.removeEventListener("abort", leave));
    if (outcome.kind === "refused") throw new ServerError("invalid_request", outcome.message, { param: outcome.param });
    if (outcome.kind === "failed") throw new Error(`encoding failed: ${outcome.message}`);
    return outcome;
  }

  /** Whoever waits leaves at once. What has been begun for them ends first, and is told to nobody. */
  #leave(waiting: Waiting, reason: unknown): void {
    waiting.reject(reason);
    const at = this.#waiting.indexOf(waiting);
    if (at > 0) this.#waiting.splice(at, 1);
  }

  #next(): void {
    clearTimeout(this.#idle);
    const [first] = this.#waiting;
    if (first) {
      this.#worker ??= this.#start();
      this.#worker.postMessage(first.job);
    } else if (this.#worker) {
      const worker = this.#worker;
      this.#idle = setTimeout(() => {
        this.#worker = null;
        void worker.terminate();
      }, IDLE_MS).unref();
    }
  }

  #start(): Worker {
    const worker = new Worker(SCRIPT, { workerData: this.#source });
    worker.unref(); // whoever waits for an answer keeps the process
    worker.on("message", (outcome: Outcome) => {
      if (worker !== this.#worker) return; // it was ended, and what it was asked for has failed
      this.#waiting.shift()?.resolve(outcome);
      this.#next();
    });
    worker.on("error", (error) => {
      if (worker === this.#worker) this.#drop(error);
    });
    return worker;
  }

  #drop(reason: Error): void {
    clearTimeout(this.#idle);
    this.#worker = null;
    for (const waiting of this.#waiting.splice(0)) waiting.reject(reason);
  }
}

/** What a message, a part or a tool takes beside its text, in characters. */
const OVERHEAD = 16;

/** Whether there is much text in a value, wherever it stands. */
function isLong(value: unknown): boolean {
  let left = LONG_CHARACTERS;
  const count = (each: unknown): void => {
    if (left <= 0) return;
    if (typeof each === "string") left -= each.length;
    else if (typeof each === "object" && each !== null) {
      left -= OVERHEAD;
      for (const part of Object.values(each)) count(part);
    }
  };
  count(value);
  return left <= 0;
}
