/** Asks the server: models, streamed answers, figures. Knows no page and keeps no conversation. */
import { readEvents } from "./events.ts";
import type { Vault } from "./vault.ts";
import { type Delta, readDelta, readFailure, readModels, readShape } from "./wire.ts";

/** A question that got no answer, or not all of it. */
export class ClientError extends Error {
  override readonly name = "ClientError";
  /** `network`: the server was not reached; `broken`: the answer stopped before its end; `key`: a key is wanted; `busy`: try later. */
  readonly kind: "network" | "broken" | "key" | "busy" | "refused";
  /** Seconds after which to ask again; null where the server named none. */
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

/** The body of POST /v1/chat/completions, less what streaming adds. */
export interface ChatRequest {
  readonly model: string;
  readonly messages: readonly ChatMessage[];
  readonly routing?: true;
  readonly [control: string]: unknown;
}

export class Client {
  readonly #vault: Vault;
  readonly #base: string;

  /** @param base URL of the server, with a slash at its end */
  constructor(vault: Vault, base: string) {
    this.#vault = vault;
    this.#base = base;
  }

  async models(signal?: AbortSignal): Promise<readonly string[]> {
    return readModels(await (await this.#ask("v1/models", { signal })).json());
  }

  /** Mixture layers and experts of a model; null for one that has none. */
  async shape(model: string): Promise<ReturnType<typeof readShape>> {
    return readShape(await (await this.#post("v1/routing", { model, text: "." })).json());
  }

  async text(path: "metrics" | "health" | "ready", signal?: AbortSignal): Promise<string> {
    return (await this.#ask(path, { signal })).text();
  }

  /** True when the server takes requests, false when it says that it does not. */
  async ready(signal?: AbortSignal): Promise<boolean> {
    try {
      await this.#ask("ready", { signal });
      return true;
    } catch (error) {
      if (error instanceof ClientError && error.kind !== "network") return false;
      throw error;
    }
  }

  /** An answer, piece by piece. Throws ClientError; when `signal` is aborted, its reason. */
  async *chat(request: ChatRequest, signal: AbortSignal): AsyncGenerator<Delta, void, undefined> {
    const response = await this.#post("v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
    if (!response.body) throw new ClientError("broken", "the answer is empty");
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
        if (!delta) throw new ClientError("broken", "an event of the answer is not what it should be");
        yield delta;
      }
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      throw error instanceof ClientError ? error : new ClientError("broken", (error as Error).message);
    }
    if (!complete) throw new ClientError("broken", "the connection ended before the answer did");
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

/** Undefined for what is not JSON. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
