/** Connections that say nothing, or never enough: at every listener they end in time, give their slot back, and keep nobody out. */
import { readFileSync } from "node:fs";
import { request as httpRequest } from "node:http";
import { connect as http2Connect } from "node:http2";
import { Agent, request as httpsRequest } from "node:https";
import { connect, type Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as tlsConnect } from "node:tls";
import { Client, credentials, type ServiceError } from "@grpc/grpc-js";
import { expect, onTestFinished, test } from "vitest";
import { canCertify, certificate } from "../server/harness.ts";
import { type Running, startHere } from "../server/start.ts";

/** How long a thousand silent connections stay. With MIXTAPE_SILENT_SECONDS=30, the full measure, they come in plain text as well as by TLS. */
const SILENT_SECONDS = Number(process.env["MIXTAPE_SILENT_SECONDS"] ?? 3);

const LISTENERS = ["http", "grpc", "metrics"] as const;
type Listener = (typeof LISTENERS)[number];

interface Target extends Running {
  readonly ports: Readonly<Record<Listener, number>>;
  /** PEM; null: plain text. */
  readonly ca: Buffer | null;
}

async function target(secure: boolean, config: object = {}): Promise<Target> {
  const tls = secure ? certificate() : undefined;
  const running = await startHere({ grpcPort: 0, metricsPort: 0, ...(tls ? { tls } : {}), ...config });
  const ports = { http: Number(new URL(running.url).port), grpc: running.grpcPort ?? 0, metrics: running.server.metricsPort ?? 0 };
  return { ...running, ports, ca: tls ? readFileSync(tls.cert) : null };
}

/** A client that never closes its own end. */
function open(port: number): Socket {
  const socket = connect({ port, host: "127.0.0.1", allowHalfOpen: true });
  socket.on("error", () => {}).resume();
  onTestFinished(() => void socket.destroy());
  return socket;
}

/** Sends a byte now and then, for ever. */
function dribble(socket: Socket, bytes: Buffer): void {
  let at = 0;
  const timer = setInterval(() => {
    if (socket.writable) socket.write(bytes.subarray(at % bytes.length, (at % bytes.length) + 1));
    at++;
  }, 150);
  onTestFinished(() => clearInterval(timer));
}

const PREFACE = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const SETTINGS = Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0]);
const PING = Buffer.from([0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
/** The first half of a ClientHello. */
const HELLO = Buffer.concat([Buffer.from([0x16, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3]), Buffer.alloc(100, 7)]);

const WAYS: Readonly<Record<string, (socket: Socket) => void>> = {
  "says nothing": () => {},
  "sends half of a TLS greeting": (socket) => void socket.write(HELLO),
  "dribbles a TLS greeting": (socket) => dribble(socket, HELLO),
  "dribbles headers": (socket) => dribble(socket, Buffer.from(`GET /health HTTP/1.1\r\nhost: localhost\r\nx: ${"y".repeat(5000)}`)),
  "dribbles empty lines": (socket) => dribble(socket, Buffer.from("\r\n")),
  "sends headers and half of a body": (socket) =>
    void socket.write("POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"),
  "sends what is no request, and stays": (socket) => void socket.write("\x00\x01\x02\x03\r\n\r\n"),
  "sends the HTTP/2 preface only": (socket) => void socket.write(PREFACE),
  "opens an HTTP/2 session without a stream, and pings": (socket) => {
    socket.write(Buffer.concat([PREFACE, SETTINGS]));
    dribble(socket, PING);
  },
};

/** How many connections a listener has, by the server's own count. */
async function connectionsOf({ ports }: Target): Promise<Readonly<Record<string, number>>> {
  const text = await (await fetch(`http://127.0.0.1:${ports.metrics}/metrics`, { headers: { connection: "close" } })).text();
  return Object.fromEntries(
    [...text.matchAll(/^mixtape_connections\{listener="(\w+)"\} (\d+)$/gm)].map(([, name, n]) => [name, Number(n)]),
  );
}

/** The only connection left is the one that asks. */
const NONE = { http: 0, grpc: 0, metrics: 1 };

const GET = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/** Whether a well-behaved client is served now. */
async function served({ ports, ca }: Target, listener: Listener): Promise<boolean> {
  if (listener === "grpc") {
    const client = new Client(`127.0.0.1:${ports.grpc}`, ca ? credentials.createSsl(ca) : credentials.createInsecure());
    const [write, read] = [(value: Uint8Array) => Buffer.from(value), (value: Buffer) => value];
    const error = await new Promise<ServiceError | null>((resolve) =>
      client.makeUnaryRequest("/grpc.health.v1.Health/Check", write, read, new Uint8Array(), { deadline: Date.now() + 10_000 }, (e) =>
        resolve(e),
      ),
    );
    client.close();
    return error === null;
  }
  const socket =
    listener === "http" && ca ? tlsConnect({ port: ports.http, host: "127.0.0.1", ca }) : connect(ports[listener], "127.0.0.1");
  let text = "";
  socket.on("data", (part) => (text += part)).on("error", () => {});
  socket.write(listener === "metrics" ? GET.replace("/health", "/metrics") : GET);
  await Promise.race([new Promise((resolve) => socket.once("close", resolve)), sleep(10_000)]);
  socket.destroy();
  return text.startsWith("HTTP/1.1 200");
}

const KINDS: readonly (readonly [string, boolean])[] = canCertify
  ? [
      ["plain", false],
      ["TLS", true],
    ]
  : [["plain", false]];

test.each(KINDS)("%s: whoever sends no complete request is gone after the deadline, and the slots are free", async (_name, secure) => {
  const there = await target(secure, { requestTimeoutSeconds: 1.5, headersTimeoutSeconds: 1.5, keepAliveTimeoutSeconds: 30 });
  const sockets = LISTENERS.flatMap((listener) =>
    Object.values(WAYS).map((way) => {
      const socket = open(there.ports[listener]);
      way(socket);
      return socket;
    }),
  );
  if (there.ca) {
    // The handshake is complete, and then nothing.
    for (const listener of ["http", "grpc"] as const)
      tlsConnect({ socket: open(there.ports[listener]), ca: there.ca, ALPNProtocols: ["h2", "http/1.1"] }).on("error", () => {});
    http2Connect(`https://127.0.0.1:${there.ports.grpc}`, { ca: there.ca }).on("error", () => {});
  }
  await expect.poll(async () => (await connectionsOf(there))["http"], { interval: 20 }).toBeGreaterThan(3); // they were there
  await expect.poll(() => connectionsOf(there), { timeout: 20_000, interval: 300 }).toEqual(NONE);
  await expect.poll(() => sockets.filter((s) => !s.readableEnded && !s.destroyed).length).toBe(0);
});

test.each(KINDS)("%s: with every slot taken by silent connections, others are served at once", async (_name, secure) => {
  const there = await target(secure, { host: "localhost", maxConnections: 5 });
  for (const listener of LISTENERS) {
    for (let i = 0; i < 20; i++) open(there.ports[listener]);
    for (const way of Object.values(WAYS)) way(open(there.ports[listener]));
    await sleep(300);
    for (let i = 0; i < 3; i++) expect(await served(there, listener), listener).toBe(true);
  }
});

test("idle connections and subscriptions anyone may open make room; one that is being answered does not", async () => {
  const there = await target(false, { maxConnections: 3 });
  const idle = await Promise.all(
    [0, 1].map(async () => {
      const socket = open(there.ports.http);
      socket.write("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n");
      await new Promise((resolve) => socket.once("data", resolve));
      return socket;
    }),
  );
  const body = JSON.stringify({ model: "default", prompt: "Hello", max_tokens: 3000, stream: true, logit_bias: { 2: -100, 5: -100 } });
  const busy = httpRequest({
    port: there.ports.http,
    method: "POST",
    path: "/v1/completions",
    headers: { "content-type": "application/json" },
  });
  onTestFinished(() => void busy.destroy());
  let ended = false;
  busy
    .on("error", () => (ended = true))
    .on("response", (response) =>
      response
        .on("end", () => (ended = true))
        .on("error", () => {})
        .resume(),
    );
  busy.end(body);
  await new Promise((resolve) => busy.once("response", resolve));
  for (let i = 0; i < 10; i++) expect(await served(there, "http")).toBe(true);
  expect([idle.some((socket) => socket.readableEnded || socket.destroyed), ended]).toEqual([true, false]);

  const watches = Array.from({ length: 3 }, () => {
    const session = http2Connect(`http://127.0.0.1:${there.ports.grpc}`).on("error", () => {});
    onTestFinished(() => session.destroy());
    const stream = session.request({
      ":method": "POST",
      ":path": "/grpc.health.v1.Health/Watch",
      "content-type": "application/grpc",
      te: "trailers",
    });
    stream.on("error", () => {}).end(Buffer.alloc(5));
    return new Promise((resolve) => stream.once("response", resolve));
  });
  await Promise.all(watches);
  expect(await served(there, "grpc")).toBe(true);
}, 60_000);

test.skipIf(!canCertify)(
  "a thousand silent connections at each listener beside 32 users: no request is lost",
  async () => {
    const there = await Promise.all((SILENT_SECONDS < 30 ? [true] : [false, true]).map((secure) => target(secure)));
    let stop = false;
    let refused = 0;
    let halt = () => {};
    const stopped = new Promise<void>((resolve) => (halt = resolve));
    const silent = there.flatMap((each) =>
      LISTENERS.flatMap((listener) =>
        Array.from({ length: 1000 }, async () => {
          while (!stop) {
            const socket = connect(each.ports[listener], "127.0.0.1")
              .on("error", () => {})
              .resume();
            const closed = new Promise((resolve) => socket.once("close", resolve));
            await Promise.race([closed, stopped]);
            if (!stop) refused++;
            socket.destroy();
          }
        }),
      ),
    );
    await expect.poll(() => connectionsOf(there[0]), { timeout: 30_000 }).toMatchObject({ http: 1000, grpc: 1000, metrics: 1001 });
    const ask = ({ ports, ca }: Target, agent: Agent | undefined) =>
      new Promise<number>((resolve) => {
        const options = {
          port: ports.http,
          host: "127.0.0.1",
          method: "POST",
          path: "/tokenize",
          headers: { "content-type": "application/json" },
        };
        const request = ca ? httpsRequest({ ...options, ca, agent }) : httpRequest(options);
        request.on("response", (response) =>
          response
            .resume()
            .on("end", () => resolve(response.statusCode ?? 0))
            .on("error", () => resolve(-1)),
        );
        request.on("error", () => resolve(-1)).end(JSON.stringify({ model: "default", text: "Hello" }));
      });
    const end = performance.now() + SILENT_SECONDS * 1000;
    const statuses = new Map<number, number>();
    const agent = new Agent({ keepAlive: true });
    await Promise.all(
      Array.from({ length: 32 }, async (_, i) => {
        // Half of the users keep their connection, half make a new one for each request.
        while (performance.now() < end) {
          const status = await ask(there[i % there.length], i % 4 < 2 ? agent : undefined);
          statuses.set(status, (statuses.get(status) ?? 0) + 1);
        }
      }),
    );
    stop = true;
    halt();
    await Promise.all(silent);
    agent.destroy();
    console.info(
      `${SILENT_SECONDS} s beside ${3000 * there.length} silent connections: statuses`,
      Object.fromEntries(statuses),
      `${refused} silent ones closed`,
    );
    expect([...statuses.keys()]).toEqual([200]);
    expect(statuses.get(200)).toBeGreaterThan(100);
    for (const each of there) await expect.poll(() => connectionsOf(each), { timeout: 10_000 }).toEqual(NONE);
  },
  120_000,
);

test("a full server makes room among the connections of the address that has most: others lose no request", async () => {
  const there = await target(false, { maxConnections: 64 });
  let stop = false;
  let evicted = 0;
  const flood = Array.from({ length: 150 }, async () => {
    while (!stop) {
      const socket = connect({ port: there.ports.http, host: "127.0.0.1", localAddress: "127.0.0.2" });
      socket.on("error", () => {}).resume();
      await Promise.race([new Promise((resolve) => socket.once("close", resolve)), sleep(500)]);
      if (!socket.destroyed) continue; // it stays, and another one comes
      evicted++;
      await sleep(5);
    }
  });
  const end = performance.now() + 2000;
  const results: boolean[] = [];
  await Promise.all(
    Array.from({ length: 8 }, async () => {
      while (performance.now() < end) results.push(await served(there, "http"));
    }),
  );
  stop = true;
  await Promise.all(flood);
  expect(evicted).toBeGreaterThan(200);
  expect([results.filter(Boolean).length, results.length > 50]).toEqual([results.length, true]);
}, 30_000);
