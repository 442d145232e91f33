/** The HTTP client of the page: models, streamed answers, metrics. Knows nothing of the page and stores no conversation. */
import { readEvents } from "./events.ts";
import type { Vault } from "./vault.ts";
import { type Delta, readDelta, readFailure, readModels, readShape, type ServedModel } from "./wire.ts";

/** A request that failed, or whose answer is incomplete. */
export class ClientError extends Error {
  override readonly name = "ClientError";
  /**
   * `network`: the server could not be reached; `broken`: the answer was malformed or cut off; `key`: a valid API key is required (401);
   * `busy`: try again later (429, 503); `refused`: any other error status.
   */
  readonly kind: "network" | "broken" | "key" | "busy" | "refused";
  /** Seconds to wait before a retry; null when the server sent no `Retry-After`. */
  readonly retryAfterSeconds: number | null;

  constructor(kind: ClientError["kind"], message: string, retryAfterSeconds: number | null = null) {
    super(message);
    this.kind = kind;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

export interface ChatMessage {
  readonly role: "system" | "user" | "assistant";
  readonly content: string;
}

/** The body of POST /v1/chat/completions without the streaming fields. */
export interface ChatRequest {
  readonly model: string;
  readonly messages: readonly ChatMessage[];
  readonly routing?: true;
  readonly [control: string]: unknown;
}

export class Client {
  readonly #vault: Vault;
  readonly #base: string;

  /** @param base URL of the server, ending in a slash */
  constructor(vault: Vault, base: string) {
    this.#vault = vault;
    this.#base = base;
  }

  async models(signal?: AbortSignal): Promise<readonly ServedModel[]> {
    return readModels(await (await this.#ask("v1/models", { signal })).json());
  }

  /** The mixture layers of a model and its number of experts; null when the reply names none. The server refuses dense models. */
  async shape(model: string): Promise<ReturnType<typeof readShape>> {
    return readShape(await (await this.#post("v1/routing", { model, text: "." })).json());
  }

  async text(path: "metrics" | "health" | "ready", signal?: AbortSignal): Promise<string> {
    return (await this.#ask(path, { signal })).text();
  }

  /** True when the server accepts requests, false when it answers that it does not. Throws ClientError when it cannot be reached. */
  async ready(signal?: AbortSignal): Promise<boolean> {
    try {
      await this.#ask("ready", { signal });
      return true;
    } catch (error) {
      if (error instanceof ClientError && error.kind !== "network") return false;
      throw error;
    }
  }

  /** Streams an answer, delta by delta. Throws ClientError, or the signal's reason once `signal` is aborted. */
  async *chat(request: ChatRequest, signal: AbortSignal): AsyncGenerator<Delta, void, undefined> {
    const response = await this.#post("v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
    if (!response.body) throw new ClientError("broken", "the server sent a response without a body");
    let complete = false;
    try {
      for await (const data of readEvents(response.body)) {
        if (data === "[DONE]") {
          complete = true;
          break;
        }
        const event = parse(data);
        const failure = readFailure(event);
        if (failure) throw new ClientError("broken", failure.message);
        const delta = readDelta(event);
        if (!delta) throw new ClientError("broken", "the server sent an event that is not a chat completion chunk");
        yield delta;
      }
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      throw error instanceof ClientError ? error : new ClientError("broken", (error as Error).message);
    }
    if (!complete) throw new ClientError("broken", "the connection closed before the answer was complete");
  }

  #post(path: string, body: unknown, signal?: AbortSignal): Promise<Response> {
    return this.#ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
  }

  async #ask(path: string, init: RequestInit): Promise<Response> {
    const key = this.#vault.key;
    let response: Response;
    try {
      response = await fetch(this.#base + path, {
        ...init,
        headers: { ...init.headers, ...(key === "" ? {} : { authorization: `Bearer ${key}` }) },
      });
    } catch (error) {
      if (init.signal?.aborted) throw init.signal.reason;
      throw new ClientError("network", (error as Error).message);
    }
    if (response.ok) return response;
    const failure = readFailure(parse(await response.text().catch(() => "")));
    const wait = Number(response.headers.get("retry-after") ?? Number.NaN);
    const kind = response.status === 401 ? "key" : response.status === 429 || response.status === 503 ? "busy" : "refused";
    throw new ClientError(kind, failure?.message ?? `HTTP ${response.status}`, Number.isFinite(wait) && wait >= 0 ? wait : null);
  }
}

/** Returns undefined for text that is not JSON. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
