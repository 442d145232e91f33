/** Talks to the server: models, streamed answers, figures. Knows no page. */

export interface Routing {
  readonly text: string;
  readonly layers: readonly number[];
  readonly experts: readonly (readonly number[])[];
  readonly weights: readonly (readonly number[])[];
}

export interface Delta {
  readonly content?: string;
  readonly reasoning?: string;
  readonly routing?: readonly Routing[];
  readonly calls?: readonly { readonly index: number; readonly name?: string; readonly arguments: string }[];
  readonly finish?: string;
  readonly tokens?: number;
}

export interface Turn {
  readonly role: "system" | "user" | "assistant";
  readonly content: string;
}

export class WireError extends Error {
  readonly status: number;
  readonly retryAfterSeconds: number;

  constructor(message: string, status: number, retryAfterSeconds = 0) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

const KEY = "apiKey";

export function apiKey(): string {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
}

export function setApiKey(key: string, remember: boolean): void {
  sessionStorage.setItem(KEY, key);
  if (remember) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

export async function models(): Promise<string[]> {
  const { data } = (await (await ask("v1/models")).json()) as { data: { id: string }[] };
  return data.map((m) => String(m.id));
}

export async function text(path: string): Promise<string> {
  return (await ask(path)).text();
}

/** The answer's pieces as they come. */
export async function* chat(body: Readonly<Record<string, unknown>>, signal: AbortSignal): AsyncGenerator<Delta> {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = (response.body as ReadableStream<Uint8Array>).getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const events = held.split("\n\n");
    held = events.pop() ?? "";
    for (const event of events) {
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (data === undefined || data === "[DONE]") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new WireError(String(parsed.error.message), 500);
      yield deltaOf(parsed);
    }
  }
}

function deltaOf(chunk: {
  choices?: { delta?: Record<string, unknown>; finish_reason?: string | null }[];
  usage?: { completion_tokens?: number };
}): Delta {
  const [choice] = chunk.choices ?? [];
  const delta = choice?.delta ?? {};
  const calls = delta["tool_calls"] as { index: number; function?: { name?: string; arguments?: string } }[] | undefined;
  return {
    content: delta["content"] as string | undefined,
    reasoning: delta["reasoning_content"] as string | undefined,
    routing: delta["routing"] as Routing[] | undefined,
    calls: calls?.map((c) => ({ index: c.index, name: c.function?.name, arguments: c.function?.arguments ?? "" })),
    finish: choice?.finish_reason ?? undefined,
    tokens: chunk.usage?.completion_tokens,
  };
}

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  const key = apiKey();
  const response = await fetch(path, { ...init, headers: { ...init.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) } });
  if (response.ok) return response;
  const body = (await response.json().catch(() => null)) as { error?: { message?: string } } | null;
  throw new WireError(body?.error?.message ?? `HTTP ${response.status}`, response.status, Number(response.headers.get("retry-after") ?? 0));
}
