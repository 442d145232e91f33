/** Prompts to ids and ids to text without blocking the event loop: short ones in turns, long ones in a worker thread. */
import { Worker } from "node:worker_threads";
import { type EncodedPrompt, encodePrompt, type Prompt, PromptError } from "../../chat/prompt.ts";
import { Turns } from "../../grammar/turns.ts";
import type { Tokenizer } from "../../tokenizer/tokenizer.ts";
import type { Job, Outcome } from "./worker.ts";

/** Texts and lists of at least this size take a few milliseconds, which makes the thread worthwhile. */
const LONG_CHARACTERS = 16_384;
const LONG_TOKENS = 8192;
/** An idle thread ends after this time: it holds a second copy of the vocabulary. */
const IDLE_MS = 60_000;
/** What the thread runs: the built file or, where this code itself runs from source, the source through tsx. */
function script(): URL {
  if (!import.meta.url.endsWith(".ts")) return new URL("worker.js", import.meta.url);
  const [tsx, worker] = [import.meta.resolve("tsx/esm/api"), new URL("worker.ts", import.meta.url).href];
  // `--import tsx` does not reach worker threads, so the thread registers it itself.
  const code = `import { register } from ${JSON.stringify(tsx)}; register(); await import(${JSON.stringify(worker)});`;
  return new URL(`data:text/javascript,${encodeURIComponent(code)}`);
}

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
  /** In order of arrival; the first is running. */
  readonly #waiting: Waiting[] = [];
  #idle: NodeJS.Timeout | undefined;

  /** @param source folder or file that the tokenizer was opened from */
  constructor(source: string, tokenizer: Tokenizer, turns = new Turns()) {
    this.#source = source;
    this.#tokenizer = tokenizer;
    this.#turns = turns;
  }

  /** The ids of a prompt. Rejects with PromptError for what the tokenizer or the chat template refuses. */
  async encode(prompt: Prompt, signal?: AbortSignal): Promise<EncodedPrompt> {
    if (prompt.kind === "tokens" || !isLong(prompt)) return this.#turns.take(() => encodePrompt(this.#tokenizer, prompt));
    const outcome = await this.#send({ kind: "encode", prompt }, signal);
    if (outcome.kind !== "encoded") throw new Error(`internal: asked to encode, got ${outcome.kind}`);
    return outcome.prompt;
  }

  /** The text of ids, all of which must be in the vocabulary. */
  async decode(tokens: readonly number[], skipSpecialTokens: boolean): Promise<string> {
    if (tokens.length < LONG_TOKENS)
      return this.#turns.take(() => this.#tokenizer.decode(tokens, { skip_special_tokens: skipSpecialTokens }));
    const outcome = await this.#send({ kind: "decode", tokens, skipSpecialTokens });
    if (outcome.kind !== "decoded") throw new Error(`internal: asked to decode, got ${outcome.kind}`);
    return outcome.text;
  }

  /** Ends the thread; its pending jobs fail. */
  async close(): Promise<void> {
    const worker = this.#worker;
    this.#drop(new Error("the model is being unloaded"));
    await worker?.terminate();
  }

  /** The thread gets one job at a time, so that jobs of clients who have left never start. */
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
    if (outcome.kind === "refused") throw new PromptError(outcome.param, outcome.message);
    if (outcome.kind === "failed") throw new Error(`encoding failed: ${outcome.message}`);
    return outcome;
  }

  /** Stops waiting at once. A job that is already running finishes first, and its outcome is dropped. */
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
    const worker = new Worker(script(), { workerData: this.#source });
    worker.unref(); // clients that wait keep the process alive, not the idle thread
    worker.on("message", (outcome: Outcome) => {
      if (worker !== this.#worker) return; // ended meanwhile: its jobs have failed
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

/** What a message, a part or a tool costs besides its text, in characters. */
const OVERHEAD = 16;

/** Whether a value holds much text, at any depth. */
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
