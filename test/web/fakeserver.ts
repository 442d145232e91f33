/**
 * A real HTTP server of this machine that serves the built page under a policy at least as strict as the real one's, and
 * answers chats by a script: what can't be had from a model on demand (hostile text, failures, slow answers).
 */
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const PAGE = fileURLToPath(new URL("../../dist/web", import.meta.url));
const TYPES: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".css": "text/css",
  ".svg": "image/svg+xml",
};
const POLICY = ["default-src", "base-uri", "form-action", "frame-ancestors"]
  .map((what) => `${what} 'none'`)
  .concat(["script-src", "style-src", "img-src", "connect-src"].map((what) => `${what} 'self'`))
  .join("; ");

/** The body of a chat request, as far as scripts look at it. */
export interface Asked {
  readonly model: string;
  readonly messages: readonly { readonly role: string; readonly content: string }[];
  readonly routing?: boolean;
  readonly [control: string]: unknown;
}

/** How a chat is answered. */
export interface Script {
  /** Another answer than a stream: status, headers, message. */
  readonly refuse?: { readonly status: number; readonly headers?: Readonly<Record<string, string>>; readonly message: string };
  /** Deltas, one an event. */
  readonly deltas?: readonly Readonly<Record<string, unknown>>[];
  /** Time between two events. */
  readonly everyMs?: number;
  /** Waits behind so many events until it is told to go on. */
  readonly hold?: { readonly after: number; readonly until: Promise<void> };
  /** Breaks the connection behind so many events. */
  readonly breakAfter?: number;
}

export interface FakeServer {
  readonly url: string;
  /** What was asked, oldest first. */
  readonly asked: readonly Asked[];
  /** Chats whose client left before their end. */
  readonly left: number;
  models: readonly string[];
  /** The only key that is accepted; null: none is wanted. */
  key: string | null;
  answer: (asked: Asked, attempt: number) => Script;
  metrics: string;
  close(): Promise<void>;
}

export const LAYERS = [1, 2, 3, 4, 5, 6, 7, 8];
export const EXPERTS = 32;

/** A text cut into words, each a token that used experts which follow from its place. */
export function spoken(text: string, routing = false): Readonly<Record<string, unknown>>[] {
  return (text.match(/\s*\S+\s*$|\s*\S+/g) ?? []).map((content, i) => ({ content, ...(routing ? { routing: [routed(content, i)] } : {}) }));
}

export function routed(text: string, i: number) {
  const experts = LAYERS.map((layer) => [0, 1, 2, 3].map((k) => (i * (k + 1) + layer * 5 + k * 7) % EXPERTS));
  return { token: i, text, layers: LAYERS, experts: experts.map(distinct), weights: LAYERS.map(() => [0.4, 0.3, 0.2, 0.1]) };
}

function distinct(experts: readonly number[]): number[] {
  const taken: number[] = [];
  for (const e of experts) {
    let next = e;
    while (taken.includes(next)) next = (next + 1) % EXPERTS;
    taken.push(next);
  }
  return taken;
}

export async function startFake(): Promise<FakeServer> {
  const asked: Asked[] = [];
  let left = 0;
  const server: Server = createServer((request, response) => {
    handle(request, response).catch((error: unknown) => response.destroy(error as Error));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const fake: FakeServer = {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    asked,
    get left() {
      return left;
    },
    models: ["ernie-small", "ernie-large"],
    key: null,
    answer: () => ({ deltas: spoken("Hello there.") }),
    metrics: "",
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };

  async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = (request.url ?? "/").split("?")[0];
    response.setHeader("content-security-policy", POLICY);
    response.setHeader("x-content-type-options", "nosniff");
    if (path.startsWith("/v1/") && fake.key !== null && request.headers.authorization !== `Bearer ${fake.key}`)
      return refuse(response, 401, "this server needs a valid API key", { "www-authenticate": "Bearer" });
    if (path === "/v1/models") return json(response, { object: "list", data: fake.models.map((id) => ({ id, object: "model" })) });
    if (path === "/v1/routing") return json(response, { layers: LAYERS.map((layer) => ({ layer, load: new Array(EXPERTS).fill(0) })) });
    if (path === "/v1/chat/completions") return chat(JSON.parse(await body(request)) as Asked, request, response);
    if (path === "/metrics") {
      response.setHeader("content-type", "text/plain; version=0.0.4").end(fake.metrics);
      return;
    }
    if (path === "/health" || path === "/ready") return json(response, { status: "ok" });
    const file = join(PAGE, normalize(path === "/" ? "/index.html" : path));
    const bytes = await readFile(file).catch(() => null);
    if (bytes === null) return refuse(response, 404, `there is no ${path}`);
    response.setHeader("content-type", TYPES[extname(file)] ?? "application/octet-stream").end(bytes);
  }

  async function chat(question: Asked, request: IncomingMessage, response: ServerResponse): Promise<void> {
    asked.push(question);
    const script = fake.answer(question, asked.length);
    if (script.refuse) return refuse(response, script.refuse.status, script.refuse.message, script.refuse.headers);
    let gone = false;
    request.socket.once("close", () => (gone = true));
    response.once("close", () => {
      if (!response.writableFinished) gone = true;
    });
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store" });
    const deltas = script.deltas ?? [];
    const send = (data: unknown) => response.write(`data: ${JSON.stringify(data)}\n\n`);
    for (const [i, delta] of deltas.entries()) {
      if (gone) {
        left++;
        return;
      }
      if (i === script.hold?.after) await script.hold.until;
      if (i === script.breakAfter) return void response.socket?.end(); // what was sent arrives before
      send({ object: "chat.completion.chunk", choices: [{ index: 0, delta, finish_reason: null }] });
      if (script.everyMs) await new Promise((resolve) => setTimeout(resolve, script.everyMs));
    }
    send({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }] });
    const usage = { prompt_tokens: 64, completion_tokens: deltas.length, prompt_tokens_details: { cached_tokens: 32 } };
    send({ choices: [], usage: { ...usage, total_tokens: 64 + deltas.length } });
    response.end("data: [DONE]\n\n");
  }

  return fake;
}

function json(response: ServerResponse, value: unknown): void {
  response.setHeader("content-type", "application/json").end(JSON.stringify(value));
}

function refuse(response: ServerResponse, status: number, message: string, headers: Readonly<Record<string, string>> = {}): void {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify({ error: { message, type: "invalid_request_error", param: null, code: "refused" } }));
}

async function body(request: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  return Buffer.concat(parts).toString("utf8");
}
