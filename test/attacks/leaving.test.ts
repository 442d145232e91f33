/** Clients that leave, and requests that name two hosts or two keys: each is counted as what it is, and nothing looks like a fault of the server. */
import { once } from "node:events";
import { connect as http2Connect } from "node:http2";
import { connect, type Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { expect, onTestFinished, test } from "vitest";
import { reflected, startGrpcHere } from "../server/grpc/reflected.ts";
import { engineOf, type Running, startHere } from "../server/start.ts";

const ENDLESS = { model: "default", max_tokens: 3000, logit_bias: { "2": -100, "5": -100 } };

async function send(url: string, path: string, body: object, cutAt?: number): Promise<Socket> {
  const { port, hostname } = new URL(url);
  const socket = connect(Number(port), hostname).on("error", () => {});
  await once(socket, "connect");
  const text = JSON.stringify(body);
  const head = `POST ${path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(text)}\r\n\r\n`;
  socket.write(head + text.slice(0, cutAt));
  return socket;
}

async function counted({ url }: Pick<Running, "url">, route: string): Promise<Readonly<Record<string, number>>> {
  const text = await (await fetch(`${url}/metrics`)).text();
  const found = text.matchAll(/^mixtape_requests_total\{route="([^"]+)",status="(\d+)"\} (\d+)$/gm);
  return Object.fromEntries([...found].filter(([, name]) => name === route).map(([, , status, n]) => [status, Number(n)]));
}

test.each<[string, string, object, (socket: Socket) => Promise<unknown>, number | undefined]>([
  ["in the middle of its body", "/v1/chat/completions", { ...ENDLESS, messages: [{ role: "user", content: "Hi" }] }, () => sleep(100), 20],
  ["before an answer", "/v1/chat/completions", { ...ENDLESS, messages: [{ role: "user", content: "Hi" }] }, () => sleep(200), undefined],
  ["before a text", "/v1/completions", { ...ENDLESS, prompt: "Hi" }, () => sleep(200), undefined],
  ["in the middle of a stream", "/v1/completions", { ...ENDLESS, prompt: "Hi", stream: true }, (s) => once(s, "data"), undefined],
  [
    "in the middle of embeddings",
    "/v1/embeddings",
    { model: "default", input: new Array(200).fill("word ".repeat(800)) },
    () => sleep(100),
    undefined,
  ],
  ["in the middle of routing", "/v1/routing", { model: "default", text: "word ".repeat(8000) }, () => sleep(100), undefined],
])(
  "a client that leaves %s is one line and status 499, no error",
  async (_name, path, body, until, cutAt) => {
    const lines: string[] = [];
    const running = await startHere({}, (line) => lines.push(line));
    const leave = async () => {
      const socket = await send(running.url, path, body, cutAt);
      await until(socket);
      socket.destroy();
    };
    await Promise.all(Array.from({ length: 4 }, leave));
    await expect.poll(() => counted(running, path)).toEqual({ 499: 4 });
    const engine = await engineOf(running);
    await expect.poll(() => [running.server.gate.admission.running, engine.stats().running, engine.stats().waiting]).toEqual([0, 0, 0]);
    await sleep(100); // for whatever might still be logged
    const log = lines.join("");
    expect(log).not.toMatch(/"level":"(error|warn)"|"stack"/);
    expect(lines.filter((line) => line.includes(`"path":"${path}"`)).map((line) => JSON.parse(line))).toEqual(
      Array.from({ length: 4 }, () => expect.objectContaining({ level: "info", res: { status: 499 }, msg: "the client left" })),
    );
  },
  60_000,
);

test("a client that leaves while it waits for a place", async () => {
  const lines: string[] = [];
  const running = await startHere({ maxInProgress: 1, maxQueued: 5 }, (line) => lines.push(line));
  const busy = await send(running.url, "/v1/completions", { ...ENDLESS, prompt: "Hi", stream: true });
  await once(busy, "data");
  const waiting = await Promise.all([0, 1, 2].map(() => send(running.url, "/v1/completions", { ...ENDLESS, prompt: "Hi" })));
  await expect.poll(() => running.server.gate.admission.queued).toBe(3);
  for (const socket of waiting) socket.destroy();
  await expect.poll(() => running.server.gate.admission.queued).toBe(0);
  await expect.poll(() => counted(running, "/v1/completions")).toEqual({ 499: 3 });
  busy.destroy();
  expect(lines.join("")).not.toMatch(/"level":"(error|warn)"|"stack"/);
}, 60_000);

test("gRPC: calls that are cancelled, and connections that break, are cancelled and no error", async () => {
  const lines: string[] = [];
  const running = await startGrpcHere({}, (line) => lines.push(line));
  const request = {
    model: "default",
    text: "Hi",
    options: { sampling: { logit_bias: [2, 5].map((key) => ({ key, value: -100 })) }, max_tokens: 3000 },
  };
  for (let i = 0; i < 10; i++) {
    const client = await reflected(running.address);
    const call = client.Generate(request);
    const ended = new Promise((resolve) => call.on("error", resolve).on("end", resolve));
    const begun = new Promise((resolve) => call.on("data", resolve));
    await (i % 3 === 0 ? sleep(5) : begun);
    call.cancel();
    await ended;
    client.close();
  }
  await expect.poll(() => running.server.gate.admission.running).toBe(0);
  await expect.poll(() => lines.filter((line) => line.includes('"outcome":"cancelled"')).length).toBeGreaterThanOrEqual(6);
  expect(lines.join("")).not.toMatch(/"level":"(error|warn)"|"stack"|"outcome":"internal"/);
}, 60_000);

async function raw(port: number, request: string): Promise<string> {
  const socket = connect(port, "127.0.0.1").on("error", () => {});
  onTestFinished(() => void socket.destroy());
  let text = "";
  socket.setEncoding("utf8").on("data", (part) => (text += part));
  socket.write(request);
  await once(socket, "close");
  return text;
}

const END = "connection: close\r\n\r\n";

test.each<[string, string, number]>([
  ["one host", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n", 200],
  ["no host", "GET /v1/models HTTP/1.1\r\n", 400],
  ["two hosts", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example.com\r\n", 400],
  ["the same host twice", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nHOST: localhost\r\n", 400],
  ["two hosts in one header", "GET /v1/models HTTP/1.1\r\nhost: localhost, evil.example.com\r\n", 400],
  ["another host in the target", "GET http://evil.example.com/v1/models HTTP/1.1\r\nhost: localhost\r\n", 400],
  ["two keys", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer a\r\nauthorization: Bearer b\r\n", 400],
  ["two types of content", "GET /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-type: a/b\r\ncontent-type: application/json\r\n", 400],
  ["two lengths", "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n", 400],
  ["a length and chunks", "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n", 400],
  ["a foreign host", "GET /v1/models HTTP/1.1\r\nhost: evil.example.com\r\n", 400],
])("a request with %s, at the API and at the metrics' own port", async (_name, head, status) => {
  const { url, server } = await startHere({ metricsPort: 0 });
  for (const [port, text] of [
    [Number(new URL(url).port), head + END],
    [server.metricsPort ?? 0, head.replace("/v1/models", "/metrics").replace("/tokenize", "/metrics") + END],
  ] as const)
    expect(await raw(port, text)).toMatch(new RegExp(`^HTTP/1.1 ${status} `));
});

test("gRPC: a request whose :authority and host differ is refused", async () => {
  const { address } = await startGrpcHere();
  const session = http2Connect(`http://${address}`).on("error", () => {});
  onTestFinished(() => session.destroy());
  const ask = (headers: object) =>
    new Promise((resolve) => {
      const stream = session.request({
        ":method": "POST",
        ":path": "/grpc.health.v1.Health/Check",
        "content-type": "application/grpc",
        te: "trailers",
        ...headers,
      });
      let status: unknown = null;
      const look = (found: Record<string, unknown>) => (status ??= found["grpc-status"] ?? null);
      stream
        .on("response", look)
        .on("trailers", look)
        .on("error", () => {})
        .on("close", () => resolve(status))
        .resume();
      stream.end(Buffer.alloc(5));
    });
  expect(await ask({})).toBe("0");
  expect(await ask({ ":authority": "localhost", host: "localhost" })).toBe("0");
  expect(await ask({ ":authority": "localhost", host: "evil.example.com" })).toBe("3");
});
