/** Rules for every route: sizes, encodings, ids, errors of one shape, keys before bodies, and nothing private in the logs. */
import { connect } from "node:net";
import type { FastifyInstance } from "fastify";
import { expect, onTestFinished, test } from "vitest";
import { z } from "zod";
import { Gate } from "../../../src/server/access/gate.ts";
import { revokeKey } from "../../../src/server/access/keys.ts";
import { checkServeConfig } from "../../../src/server/config.ts";
import { ServerError } from "../../../src/server/errors.ts";
import { createHttp, guard } from "../../../src/server/http/app.ts";
import { InFlight } from "../../../src/server/http/inflight.ts";
import { createLogger } from "../../../src/server/logs.ts";
import { Metrics } from "../../../src/server/metrics.ts";
import { Reader } from "../../../src/server/reading/reader.ts";
import { keptLines, keyFile } from "../harness.ts";

const body = z.object({
  messages: z.array(z.object({ role: z.string(), content: z.union([z.string(), z.array(z.object({ text: z.string() })).max(9)]) })).max(9),
  held: z.boolean().optional(),
});

/** HTTP with three routes: one that answers, one that fails, one that writes without end. */
async function start(settings: Readonly<Record<string, unknown>> = {}) {
  const config = checkServeConfig({ port: 0, ...settings });
  const { sink, lines: logs } = keptLines();
  const log = createLogger("trace", sink);
  const stalls: number[] = [];
  const inFlight = new InFlight(config.stallTimeoutSeconds, () => stalls.push(performance.now()));
  const limits = {
    running: config.maxInProgress,
    queued: config.maxQueued,
    perOwner: config.maxInProgressPerKey,
    queueSeconds: config.queueTimeoutSeconds,
  };
  const gate = await Gate.open({ keyFile: config.keys ?? null, usageFile: config.usageFile ?? null, limits, log });
  const reader = new Reader({ maxBytes: config.maxBodyBytes, maxJsonDepth: config.maxJsonDepth });
  const metrics = new Metrics({ models: () => [], admission: gate.admission });
  const app: FastifyInstance = await createHttp({ reader, config, log, metrics, inFlight, certificate: null, version: "0" });
  let handled = 0;
  let release = () => {};
  const released = new Promise<void>((resolve) => {
    release = resolve;
  });
  await app.register(async (scope) => {
    guard(scope, gate, metrics);
    scope.post("/v1/echo", { schema: { body } }, async (request) => {
      handled++;
      if ((request.body as z.infer<typeof body>).held) await released;
      return request.body;
    });
    scope.post("/v1/fail", async (request) => {
      if (request.body === null) throw new ServerError("not_ready", "later", { retryAfterSeconds: 2.5, param: "model" });
      throw new Error("the password is 1234");
    });
    scope.get("/v1/models/:model", async () => ({}));
    scope.post("/v1/flood", async (_request, reply) => {
      reply.hijack();
      const more = () => {
        while (!reply.raw.destroyed && reply.raw.write("x".repeat(65_536)));
      };
      reply.raw.on("drain", more);
      more();
    });
  });
  onTestFinished(async () => {
    app.server.closeAllConnections();
    await app.close();
    inFlight.close();
    await gate.close();
  });
  await app.listen({ host: "127.0.0.1", port: 0 });
  const { port } = app.server.address() as { port: number };
  const post = (path: string, payload: string | Buffer | object, headers: Record<string, string> = {}) =>
    app.inject({ method: "POST", url: path, headers: { "content-type": "application/json", ...headers }, payload });
  return { app, gate, metrics, port, post, logs, inFlight, stalls, handled: () => handled, release };
}

/** A raw connection: what is received, and when it ends. */
function open(port: number) {
  const socket = connect(port, "127.0.0.1");
  let text = "";
  socket.on("error", () => {}); // the other end may reset it
  socket.setEncoding("utf8").on("data", (part) => (text += part));
  return { socket, text: () => text, closed: new Promise((resolve) => socket.once("close", resolve)) };
}

const good = { messages: [{ role: "user", content: "hello" }] };

test.each<[string, string | Buffer | object, Record<string, string>, number, string, string | null, string]>([
  ["empty", "", {}, 400, "invalid_request", null, "empty"],
  ["broken", '{"messages": [}', {}, 400, "invalid_request", null, "broken JSON"],
  ["no object", "[]", {}, 400, "invalid_request", null, "it must be an object"],
  ["not UTF-8", Buffer.from('{"messages": "\xff\xfe"}', "latin1"), {}, 400, "invalid_request", null, "not valid UTF-8"],
  ["deep", `{"messages":${"[".repeat(100_000)}${"]".repeat(100_000)}}`, {}, 400, "invalid_request", null, "more than 100 levels deep"],
  ["deep and open", '{"a":'.repeat(200_000), {}, 400, "invalid_request", null, "more than 100 levels deep"],
  ["prototype", '{"messages": [], "__proto__": {"x": 1}}', {}, 400, "invalid_request", null, "__proto__"],
  ["hidden prototype", '{"messages": [], "__pr\\u006fto__": {"x": 1}}', {}, 400, "invalid_request", null, "__proto__"],
  ["missing field", {}, {}, 400, "invalid_request", "messages", "messages is missing"],
  [
    "field of an item",
    { messages: [{ role: "user", content: "" }, { role: "user" }] },
    {},
    400,
    "invalid_request",
    "messages[1].content",
    "messages[1].content is ",
  ],
  [
    "part of an alternative",
    { messages: [{ role: "user", content: [{ text: 1 }] }] },
    {},
    400,
    "invalid_request",
    "messages[0].content[0].text",
    "must be a text",
  ],
  ["text", "hello", { "content-type": "text/plain" }, 415, "unsupported_media_type", null, "must be JSON"],
  ["form", "a=1", { "content-type": "application/x-www-form-urlencoded" }, 415, "unsupported_media_type", null, "must be JSON"],
])("a body that is %s is refused, with the field", async (_name, payload, headers, status, code, param, message) => {
  const { post, handled } = await start();
  const reply = await post("/v1/echo", payload, headers);
  expect(reply.statusCode).toBe(status);
  expect(reply.json()).toEqual({ error: { message: expect.stringContaining(message), type: "invalid_request_error", param, code } });
  expect(handled()).toBe(0);
});

test("quotes, backslashes and brackets within JSON strings do not count as structure", async () => {
  const { post } = await start();
  const content = `${"[{".repeat(300)} \\" \\\\ " \u0000 __proto__ 你好 😀`;
  const reply = await post("/v1/echo", { messages: [{ role: "user", content }] });
  expect(reply.json().messages[0].content).toBe(content);
});

test("server errors reveal only their id, and the log has the reason", async () => {
  const { post, logs } = await start();
  const reply = await post("/v1/fail", good, { "x-request-id": "abc-1" });
  expect([reply.statusCode, reply.json().error.code, reply.headers["x-request-id"]]).toEqual([500, "internal", "abc-1"]);
  expect(reply.body).not.toContain("1234");
  expect(logs()).toMatch(/"reqId":"abc-1".*the password is 1234/);
  const later = await post("/v1/fail", "null");
  expect([later.statusCode, later.headers["retry-after"], later.json().error.param]).toEqual([503, "3", "model"]);
});

test("unknown paths and wrong methods", async () => {
  const { app } = await start();
  const missing = await app.inject({ method: "GET", url: "/v2/nothing?secret=1" });
  expect([missing.statusCode, missing.json().error.code]).toEqual([404, "not_found"]);
  expect(missing.body).not.toContain("secret");
  const wrong = await app.inject({ method: "GET", url: "/v1/echo" });
  expect([wrong.statusCode, wrong.json().error.code, wrong.headers["allow"]]).toEqual([405, "method_not_allowed", "POST"]);
  expect((await app.inject({ method: "DELETE", url: "/v1/models/a" })).statusCode).toBe(405);
  expect((await app.inject({ method: "GET", url: "/%zz" })).json().error.code).toBe("invalid_request");
});

test("a request id from the caller is kept if it is harmless", async () => {
  const { post } = await start();
  expect((await post("/v1/echo", good, { "x-request-id": 'a" b' })).headers["x-request-id"]).toMatch(/^[\da-f-]{36}$/);
});

test("responses carry the headers that protect a page", async () => {
  const { app } = await start();
  const { headers } = await app.inject({ method: "GET", url: "/v1/models/a" });
  expect(headers["content-security-policy"]).toContain("default-src 'none';script-src 'self';");
  expect(headers).toMatchObject({ "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer" });
  expect(headers["strict-transport-security"]).toBeUndefined();
  expect(headers["access-control-allow-origin"]).toBeUndefined();
});

test("web pages elsewhere may use the API only if their origin is listed", async () => {
  const { app } = await start({ corsOrigins: ["https://chat.example.com"] });
  const preflight = (origin: string) =>
    app.inject({ method: "OPTIONS", url: "/v1/echo", headers: { origin, "access-control-request-method": "POST" } });
  expect((await preflight("https://chat.example.com")).headers["access-control-allow-origin"]).toBe("https://chat.example.com");
  expect((await preflight("https://evil.example.com")).headers["access-control-allow-origin"]).toBeUndefined();
});

test("without keys, the server answers only to this machine's names: a page can't point its own name here", async () => {
  const { app } = await start({ allowedHosts: ["chat.internal"] });
  const ask = async (host: string) => (await app.inject({ method: "GET", url: "/v1/models/a", headers: { host } })).statusCode;
  expect([await ask("localhost:8000"), await ask("127.0.0.1"), await ask("[::1]:80"), await ask("chat.internal")]).toEqual([
    200, 200, 200, 200,
  ]);
  const asProxied = { host: "evil.example.com", "x-forwarded-host": "localhost" };
  const { app: behind } = await start({ trustProxy: true });
  expect((await behind.inject({ url: "/v1/models", headers: asProxied })).statusCode).toBe(400);
  expect([await ask("evil.example.com"), await ask("127.0.0.1.evil.example.com")]).toEqual([400, 400]);
});

test("keys: none, wrong, revoked, expired, and one created while the server runs", async () => {
  const { file, secret, key } = await keyFile();
  const { app, post, logs } = await start({ keys: file });
  const ask = async (authorization?: string) => {
    const reply = await post("/v1/echo", good, authorization === undefined ? {} : { authorization });
    return [reply.statusCode, reply.statusCode === 200 ? "" : reply.json().error.code];
  };
  const refused = [401, "invalid_api_key"];
  expect(await ask()).toEqual(refused);
  expect(await ask("Bearer mxt_wrong")).toEqual(refused);
  expect(await ask(`Basic ${secret}`)).toEqual(refused);
  expect(await ask(`Bearer ${secret} ${secret}`)).toEqual(refused);
  expect(await ask(`Bearer ${secret}`)).toEqual([200, ""]);
  expect((await app.inject({ method: "GET", url: "/v1/models/a" })).statusCode).toBe(401);
  await revokeKey(file, key.id);
  await expect.poll(() => ask(`Bearer ${secret}`)).toEqual(refused);
  expect(logs()).not.toContain(secret);
});

test("an expired key is rejected", async () => {
  const { file, secret } = await keyFile({ expires: "2026-01-01T00:00:00.000Z" });
  const { post } = await start({ keys: file });
  const reply = await post("/v1/echo", good, { authorization: `Bearer ${secret}` });
  expect([reply.statusCode, reply.json().error.message]).toEqual([401, "this API key has expired"]);
});

test("rates and budgets: OpenAI's headers, then 429 with the time to wait", async () => {
  const { file, secret, key } = await keyFile({ requestsPerMinute: 2, tokensPerDay: 100 });
  const { post, gate } = await start({ keys: file });
  const ask = () => post("/v1/echo", good, { authorization: `Bearer ${secret}` });
  expect((await ask()).headers).toMatchObject({
    "x-ratelimit-limit-requests": "2",
    "x-ratelimit-remaining-requests": "1",
    "x-ratelimit-reset-requests": expect.stringMatching(/^(30|2\d)s$/),
    "x-ratelimit-limit-tokens": "100",
    "x-ratelimit-remaining-tokens": "100",
    "x-ratelimit-reset-tokens": expect.stringMatching(/^((\d+h)?\d+m)?\d+s$/),
  });
  await ask();
  const third = await ask();
  expect([third.statusCode, third.json().error.code, third.headers["retry-after"]]).toEqual([
    429,
    "rate_limit_exceeded",
    expect.stringMatching(/^(30|2\d)$/),
  ]);
  gate.charge(key.id, 100);
  const spent = await ask();
  expect([spent.statusCode, spent.json().error.type]).toEqual([429, "insufficient_quota"]);
  expect(Number(spent.headers["retry-after"])).toBeGreaterThan(0);
});

test("a full server rejects immediately, before it reads a body, and waiting requests are served in turn", async () => {
  const { post, gate, metrics, handled, release } = await start({ maxInProgress: 1, maxQueued: 1 });
  const slow = post("/v1/echo", { ...good, held: true }).then((response) => response);
  await expect.poll(handled).toBe(1);
  const waits = post("/v1/echo", good).then((response) => response);
  await expect.poll(() => gate.admission.queued).toBe(1);
  const refused = await post("/v1/echo", "{".repeat(1_000_000)); // the place is held until this has been answered
  release();
  expect([refused.statusCode, refused.json().error.code, refused.headers["retry-after"]]).toEqual([
    429,
    "overloaded",
    expect.stringMatching(/^\d+$/),
  ]);
  expect([(await slow).statusCode, (await waits).statusCode, handled()]).toEqual([200, 200, 2]);
  const text = await metrics.registry.metrics();
  expect(text).toContain('mixtape_refusals_total{code="overloaded"} 1');
  expect(text).toContain('mixtape_requests_total{route="/v1/echo",status="200"} 2');
  expect(text).toContain("mixtape_requests_in_progress 0");
});

test("100 MB are rejected by their announced size or when they exceed the limit, and are neither read nor kept", async () => {
  const { port } = await start({ maxBodyBytes: 2 ** 20 });
  const before = process.memoryUsage().rss;
  const chunk = `${(65_536).toString(16)}\r\n${" ".repeat(65_536)}\r\n`;
  for (const head of ["content-length: 100000000", "transfer-encoding: chunked"]) {
    const client = open(port);
    client.socket.write(`POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n${head}\r\n\r\n`);
    for (let sent = 0; sent < 100_000_000; sent += chunk.length)
      if (!client.socket.write(chunk)) await new Promise((resolve) => client.socket.once("drain", resolve));
    // The client can send everything and still receives the error.
    await expect.poll(client.text).toMatch(/^HTTP\/1\.1 413 [\s\S]*"code":"request_too_large"/);
    client.socket.destroy();
  }
  expect(process.memoryUsage().rss - before).toBeLessThan(100e6);
});

test("incomplete requests and endless headers time out, and their connections are closed", async () => {
  const { port, post } = await start({ headersTimeoutSeconds: 0.3, requestTimeoutSeconds: 0.6 });
  const exchange = async (...parts: string[]) => {
    const { socket, text, closed } = open(port);
    for (const part of parts) socket.write(part);
    await closed;
    return text().split("\r\n", 1)[0];
  };
  const head = "POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
  const [nothing, halfHead, halfBody, huge, noise] = await Promise.all([
    exchange(""),
    exchange(head),
    exchange(`${head}content-length: 100\r\n\r\n{"messages"`),
    exchange(`${head}x-a: ${"a".repeat(20_000)}\r\n\r\n`),
    exchange("\u0016\u0003\u0001 hello\r\n\r\n"),
  ]);
  expect(nothing).toMatch(/^(HTTP\/1.1 408 .*)?$/);
  expect(halfHead).toBe("HTTP/1.1 408 Request Timeout");
  expect(halfBody).toMatch(/408/);
  expect(huge).toBe("HTTP/1.1 431 Request Header Fields Too Large");
  expect(noise).toBe("HTTP/1.1 400 Bad Request");
  expect((await post("/v1/echo", good)).statusCode).toBe(200);
});

test("a client that reads nothing of its answer is disconnected, and its place is freed", async () => {
  const { port, gate, stalls } = await start({ stallTimeoutSeconds: 0.4 });
  const { socket } = open(port);
  socket.write("POST /v1/flood HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}");
  socket.pause();
  await expect.poll(() => gate.admission.running).toBe(1);
  await expect.poll(() => gate.admission.running).toBe(0);
  expect(stalls).toHaveLength(1);
  socket.destroy();
});

test("the logs contain neither user content nor keys, unless content logging is on", async () => {
  const { file, secret } = await keyFile();
  const quiet = await start({ keys: file });
  const authorization = `Bearer ${secret}`;
  const asked = { messages: [{ role: "user", content: "XYZZY-prompt" }] };
  await quiet.post("/v1/echo?q=XYZZY-query", asked, { authorization });
  await quiet.post("/v1/fail", asked, { authorization });
  await quiet.post("/v1/echo", '{"messages": "XYZZY-broken', { authorization });
  await quiet.post("/v1/echo", { messages: [{ role: "user", content: 1, "XYZZY-field": 2 }] }, { authorization });
  await quiet.app.inject({ method: "GET", url: "/v1/models/a?key=XYZZY", headers: { authorization, "x-api-key": "XYZZY" } });
  expect(quiet.logs()).toContain('"path":"/v1/echo"');
  expect(quiet.logs()).not.toContain("XYZZY");
  expect(quiet.logs()).not.toContain(secret);
  const open = await start({ logContent: true });
  await open.post("/v1/echo", asked);
  expect(open.logs()).toContain("XYZZY-prompt");
});
