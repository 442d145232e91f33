/**
 * Back-translation: a text into another language and back, through any model. Bounds how much runs at once, repeats what fails for a while, and
 * remembers answers in a file, so that a run that was interrupted goes on and a run again gives the same. Knows no rows.
 */
import { createHash } from "node:crypto";
import { appendFile, readFile } from "node:fs/promises";
import { setTimeout as wait } from "node:timers/promises";
import { DataError } from "../data/fault.ts";

/** Asks a model, and gives its answer. Rejects with RetryError for what may work later. */
export type Ask = (prompt: string, signal: AbortSignal | undefined) => Promise<string>;

/** A failure that may be over soon. */
export class RetryError extends Error {
  override readonly name = "RetryError";
  /** Milliseconds that the other side wants to be left alone; null: it does not say. */
  readonly after: number | null;

  constructor(message: string, after: number | null = null, options?: ErrorOptions) {
    super(message, options);
    this.after = after;
  }
}

/** What a model is asked: {language} and {text} are filled in. */
export const PROMPT =
  "Translate the following text into {language}. Keep names, numbers, placeholders and code as they are. Answer with the translation only.\n\n{text}";

/** A prompt with its language and text filled in; what the text spells out is not. */
export function translationPrompt(prompt: string, language: string, text: string): string {
  return prompt.replace(/\{(language|text)\}/g, (_, name) => (name === "text" ? text : language));
}

export interface TranslatorOptions {
  readonly ask: Ask;
  /** Which model answers: part of what the cache goes by. */
  readonly model: string;
  /** Default: `PROMPT`. */
  readonly prompt?: string;
  /** Requests at a time. */
  readonly concurrency: number;
  /** Attempts for each request. */
  readonly attempts: number;
  /** File of the answers so far; null: none are kept. */
  readonly cache: string | null;
  readonly signal?: AbortSignal;
  /** Milliseconds before the second attempt; each further one waits twice as long. Default 1000. */
  readonly pause?: number;
}

export class Translator {
  readonly #options: TranslatorOptions;
  readonly #answers: Map<string, string>;
  readonly #waiting: (() => void)[] = [];
  #running = 0;
  #written: Promise<void> = Promise.resolve();

  private constructor(options: TranslatorOptions, answers: Map<string, string>) {
    this.#options = options;
    this.#answers = answers;
  }

  /** Reads the cache. A line that was cut off by an interruption is left out. Throws DataError for a prompt without {text} or {language}. */
  static async open(options: TranslatorOptions): Promise<Translator> {
    const missing = ["{language}", "{text}"].find((each) => !(options.prompt ?? PROMPT).includes(each));
    if (missing !== undefined)
      throw new DataError(`the prompt for translations has no ${missing}: it must be like "Translate into {language}: {text}"`);
    const answers = new Map<string, string>();
    const text = options.cache === null ? "" : await readFile(options.cache, "utf8").catch(() => "");
    for (const line of text.split("\n")) {
      if (line === "") continue;
      try {
        const { key, answer } = JSON.parse(line) as { readonly key: string; readonly answer: string };
        if (typeof key === "string" && typeof answer === "string") answers.set(key, answer);
      } catch {
        // the interrupted line
      }
    }
    // What is appended must not join an interrupted line.
    if (options.cache !== null && text !== "" && !text.endsWith("\n")) await appendFile(options.cache, "\n");
    return new Translator(options, answers);
  }

  /** The text in another language and back. Throws DataError once all attempts have failed. */
  async roundTrip(text: string, through: string, back: string): Promise<string> {
    return this.#translate(await this.#translate(text, through), back);
  }

  async #translate(text: string, language: string): Promise<string> {
    const prompt = translationPrompt(this.#options.prompt ?? PROMPT, language, text);
    const key = createHash("sha256").update(`${this.#options.model}\n${prompt}`).digest("hex");
    const known = this.#answers.get(key);
    if (known !== undefined) return known;
    const answer = cleaned(await this.#slot(() => this.#attempt(prompt)));
    this.#answers.set(key, answer);
    const { cache } = this.#options;
    if (cache !== null) await (this.#written = this.#written.then(() => appendFile(cache, `${JSON.stringify({ key, answer })}\n`)));
    return answer;
  }

  async #attempt(prompt: string): Promise<string> {
    const { ask, attempts, signal, pause = 1000 } = this.#options;
    for (let attempt = 1; ; attempt++) {
      signal?.throwIfAborted();
      try {
        return await ask(prompt, signal);
      } catch (error) {
        if (!(error instanceof RetryError)) throw error;
        if (attempt >= attempts) throw new DataError(`the translation failed ${attempts} times: ${error.message}`, [], { cause: error });
        await wait(Math.min(60_000, error.after ?? pause * 2 ** (attempt - 1)), undefined, { signal });
      }
    }
  }

  /** Runs at most so many at a time. */
  async #slot<T>(run: () => Promise<T>): Promise<T> {
    if (this.#running >= this.#options.concurrency) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#running++;
    try {
      return await run();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    }
  }
}

/** The answer without the quotes and code fences that models put around it. */
function cleaned(answer: string): string {
  const text = answer
    .trim()
    .replace(/^```\w*\n([\s\S]*?)\n?```$/, "$1")
    .trim();
  const quoted = /^(["“'「])([\s\S]*)(["”'」])$/.exec(text);
  return quoted && !quoted[2].includes(quoted[1]) && !quoted[2].includes(quoted[3]) ? quoted[2].trim() : text;
}

export interface EndpointOptions {
  /** Such as http://127.0.0.1:8000/v1. */
  readonly url: string;
  readonly model: string;
  readonly key: string | null;
  /** Milliseconds for an answer. */
  readonly timeout: number;
  readonly maxTokens: number;
}

/** Bytes of an answer that are read. */
const MOST_ANSWER = 4 * 1024 ** 2;

/** Asks an OpenAI-compatible endpoint, greedily. Throws DataError for answers that will not become better. */
export function endpoint({ url, model, key, timeout, maxTokens }: EndpointOptions): Ask {
  const target = `${url.replace(/\/+$/, "")}/chat/completions`;
  if (!URL.canParse(target) || !/^https?:/.test(target))
    throw new DataError(`the endpoint ${url} is no http address, such as http://127.0.0.1:8000/v1`);
  const headers = { "content-type": "application/json", ...(key === null ? {} : { authorization: `Bearer ${key}` }) };
  return async (prompt, signal) => {
    const body = JSON.stringify({ model, messages: [{ role: "user", content: prompt }], temperature: 0, max_tokens: maxTokens });
    const limit = AbortSignal.timeout(timeout);
    let response: Response;
    let text: string;
    try {
      response = await fetch(target, { method: "POST", headers, body, signal: signal ? AbortSignal.any([signal, limit]) : limit });
      text = await limited(response);
    } catch (cause) {
      signal?.throwIfAborted();
      if (cause instanceof DataError) throw cause;
      const why = limit.aborted
        ? `no answer within ${timeout / 1000} s`
        : cause instanceof Error
          ? ((cause.cause as Error | undefined)?.message ?? cause.message)
          : String(cause);
      throw new RetryError(`${target}: ${why}`, null, { cause });
    }
    if (!response.ok) {
      const what = `${target} answers ${response.status}: ${text.slice(0, 200).replace(/\s+/g, " ")}`;
      if (response.status !== 408 && response.status !== 429 && response.status < 500) throw new DataError(what);
      const after = Number(response.headers.get("retry-after"));
      throw new RetryError(what, after > 0 ? after * 1000 : null);
    }
    const content = answerOf(text);
    if (content === null) throw new DataError(`${target}: the answer is not one of chat completions: ${text.slice(0, 200)}`);
    return content;
  };
}

async function limited(response: Response): Promise<string> {
  const parts: Uint8Array[] = [];
  let bytes = 0;
  for await (const part of response.body ?? []) {
    bytes += part.length;
    if (bytes > MOST_ANSWER) throw new DataError(`the endpoint's answer has more than ${MOST_ANSWER} bytes`);
    parts.push(part);
  }
  return Buffer.concat(parts).toString("utf8");
}

function answerOf(text: string): string | null {
  try {
    const { choices } = JSON.parse(text) as { readonly choices?: readonly { readonly message?: { readonly content?: unknown } }[] };
    const content = choices?.[0]?.message?.content;
    return typeof content === "string" ? content : null;
  } catch {
    return null;
  }
}
