/** Hostile clients and system faults: the server answers or rejects, leaks nothing, and keeps running. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import fc from "fast-check";
import { expect, onTestFinished, test } from "vitest";
import { createKey } from "../../src/server/access/keys.ts";
import { binary, temporary } from "../cli/run.ts";
import { engineOf, post, startHere } from "./start.ts";

const CHAT = "/v1/chat/completions";
const ENDLESS = {
  model: "default",
  messages: [{ role: "user", content: "Hello" }],
  max_tokens: 3000,
  stream: true,
  logit_bias: { "2": -100, "5": -100 },
};

/** Reads a stream up to its first piece of text. */
async function begun(response: Response) {
  const reader = (response.body as ReadableStream<Uint8Array>).getReader();
  let text = "";
  while (!/"content":"[^"]/.test(text)) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`the stream ended before any text: ${text}`);
    text += Buffer.from(value).toString();
  }
  return reader;
}

test("a thousand clients that vanish mid-stream leave nothing behind", async () => {
  const running = await startHere();
  const engine = await engineOf(running);
  const vanish = async () => {
    const leave = new AbortController();
    const response = await fetch(running.url + CHAT, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(ENDLESS),
      signal: leave.signal,
    });
    await begun(response);
    leave.abort();
  };
  const wave = async (n: number) => {
    for (let i = 0; i < n; i += 20) await Promise.all(Array.from({ length: 20 }, vanish));
    await expect.poll(() => engine.stats().running + engine.stats().waiting).toBe(0);
    expect(engine.cache.free).toBe(engine.cache.count);
    global.gc?.();
    return process.memoryUsage().rss;
  };
  const before = await wave(300);
  const after = await wave(700);
  expect(after - before).toBeLessThan(64 * 2 ** 20);
}, 120_000);

test("bodies that are too large, too deep, not JSON, not UTF-8, or of another type", async () => {
  const { url } = await startHere({ maxBodyBytes: 64 * 1024 });
  const status = async (body: string | Uint8Array, headers: Record<string, string> = { "content-type": "application/json" }) => {
    const response = await fetch(url + CHAT, { method: "POST", headers, body: body as string });
    const { error } = (await response.json()) as { error: { code: string } };
    return [response.status, error.code];
  };
  expect(await status(`{"model":"default","messages":[${"[".repeat(30_000)}${"]".repeat(30_000)}]}`)).toEqual([400, "invalid_request"]);
  expect(await status("x".repeat(70_000))).toEqual([413, "request_too_large"]);
  expect(await status('{"model":')).toEqual([400, "invalid_request"]);
  expect(await status("")).toEqual([400, "invalid_request"]);
  expect(await status("a=b", { "content-type": "application/x-www-form-urlencoded" })).toEqual([415, "unsupported_media_type"]);
  expect(await status('{"__proto__":{"x":1},"model":"default","messages":[{"role":"user","content":"x"}]}')).toEqual([
    400,
    "invalid_request",
  ]);
  expect(await status(Buffer.from('{"model":"nope\xff\xfe"}', "latin1"))).toEqual([400, "invalid_request"]); // not UTF-8
});

test("when a client leaves while its model loads or its embeddings are computed, computation stops", async () => {
  const models = [{ name: "default", path: "default", kvCacheTokens: 32768, preload: false }];
  const running = await startHere({ models });
  const send = (path: string, body: object, afterMs: number) =>
    fetch(running.url + path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "default", ...body }),
      signal: AbortSignal.timeout(afterMs),
    }).catch(() => null);
  await send(CHAT, ENDLESS, 20);
  const engine = await engineOf(running);
  await expect.poll(() => engine.stats().running + engine.stats().waiting).toBe(0);
  expect(engine.stats().generatedTokens).toBeLessThan(2000);
  await send("/v1/embeddings", { input: new Array(200).fill("word ".repeat(2000)) }, 300);
  await expect.poll(() => engine.cache.free).toBe(engine.cache.count);
});

test("ten thousand random requests: never a 500", async () => {
  const { server } = await startHere({ maxTokens: 3 });
  const json = fc.jsonValue({ maxDepth: 3 });
  /** Mostly valid values, now and then anything. */
  const mostly = <T>(right: fc.Arbitrary<T>) => fc.oneof({ weight: 12, arbitrary: right }, { weight: 1, arbitrary: json });
  const text = fc.string({ maxLength: 20 });
  const ids = fc.array(fc.integer({ min: -1, max: 20_600 }), { maxLength: 5 });
  const message = fc.record({ role: fc.constantFrom("user", "system", "assistant", "user", "tool"), content: mostly(text) });
  const sampling = {
    max_tokens: mostly(fc.constant(1)),
    temperature: mostly(fc.double({ min: 0, max: 2, noNaN: true })),
    top_p: mostly(fc.double({ min: 0, max: 1, noNaN: true })),
    top_k: mostly(fc.nat(50)),
    n: mostly(fc.integer({ min: 1, max: 2 })),
    stop: mostly(fc.oneof(text, fc.array(text, { maxLength: 5 }))),
    logit_bias: mostly(fc.dictionary(fc.nat(21_000).map(String), fc.integer({ min: -101, max: 100 }), { maxKeys: 2 })),
    seed: mostly(fc.maxSafeInteger()),
    presence_penalty: mostly(fc.double({ min: -2, max: 2, noNaN: true })),
    repetition_penalty: mostly(fc.double({ min: -0.1, max: 2, noNaN: true })),
    stream: fc.boolean(),
    routing: fc.boolean(),
  };
  const bodies: Record<string, Record<string, fc.Arbitrary<unknown>>> = {
    [CHAT]: {
      ...sampling,
      messages: mostly(fc.array(message, { minLength: 1, maxLength: 3 })),
      logprobs: mostly(fc.boolean()),
      top_logprobs: mostly(fc.nat(3)),
      tools: mostly(fc.constant([])),
      response_format: mostly(fc.constant({ type: "json_object" })),
    },
    "/v1/completions": { ...sampling, prompt: mostly(fc.oneof(text, ids)), logprobs: mostly(fc.nat(3)), echo: mostly(fc.boolean()) },
    "/v1/embeddings": {
      input: mostly(fc.oneof(text, ids, fc.array(text, { maxLength: 3 }))),
      encoding_format: mostly(fc.constant("base64")),
    },
    "/tokenize": { text: mostly(text) },
    "/detokenize": { tokens: mostly(ids) },
    "/v1/routing": { text: mostly(text), messages: mostly(fc.array(message, { maxLength: 2 })) },
  };
  const request = fc.constantFrom(...Object.keys(bodies)).chain((url) => {
    const known: Record<string, fc.Arbitrary<unknown>> = { ...bodies[url], model: mostly(fc.constant("default")) };
    const needed = ["model", "messages", "prompt", "input", "text", "tokens"].filter(
      (key) => key in known && (url !== "/v1/routing" || key !== "messages"),
    );
    const [fields, whole] = [["model"], needed].map((requiredKeys) => fc.record(known, { requiredKeys }));
    const payload = fc.oneof({ weight: 6, arbitrary: whole }, { weight: 2, arbitrary: fields }, json).map((v) => JSON.stringify(v));
    return fc.tuple(fc.constant(url), fc.oneof({ weight: 20, arbitrary: payload }, fc.string()));
  });
  const samples = fc.sample(request, { numRuns: 10_000, seed: 1 });
  const bad: unknown[] = [];
  const statuses = new Map<number, number>();
  for (let i = 0; i < samples.length; i += 100)
    await Promise.all(
      samples.slice(i, i + 100).map(async ([url, body]) => {
        const { statusCode, payload: answer } = await server.app.inject({
          method: "POST",
          url,
          headers: { "content-type": "application/json" },
          payload: body,
        });
        statuses.set(statusCode, (statuses.get(statusCode) ?? 0) + 1);
        if (statusCode >= 500 || /"code":"internal"/.test(answer)) bad.push([url, body, answer.slice(0, 300)]);
      }),
    );
  expect(bad.slice(0, 3)).toEqual([]);
  expect(statuses.get(429)).toBe(undefined); // none was rejected before validation
  expect(statuses.get(200)).toBeGreaterThan(1000);
}, 120_000);

test("a reader that does not read makes the server wait, not buffer", async () => {
  const running = await startHere();
  const { port, hostname } = new URL(running.url);
  const socket = connect(Number(port), hostname);
  onTestFinished(() => void socket.destroy());
  await once(socket, "connect");
  const body = JSON.stringify({ ...ENDLESS, logprobs: true, top_logprobs: 20, max_tokens: 700 });
  socket.pause();
  socket.write(
    `POST ${CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
  );
  const engine = await engineOf(running);
  await expect.poll(() => engine.stats().generatedTokens, { timeout: 30_000 }).toBeGreaterThan(300);
  expect((await post(running.url, "/tokenize", { model: "default", text: "hi" })).status).toBe(200);
  let read = 0;
  socket.on("data", (part) => {
    read += part.length;
  });
  socket.resume();
  await expect.poll(() => engine.stats().running, { timeout: 30_000 }).toBe(0);
  await expect.poll(() => read, { timeout: 30_000 }).toBeGreaterThan(1e6);
}, 90_000);

/** The command itself, once it is ready; its output so far. */
async function serve(args: readonly string[]) {
  if (!existsSync(binary)) throw new Error("dist is not built; run npm run build");
  const child = spawn(process.execPath, [binary, "serve", "--port", "0", "--threads", "1", ...args], { stdio: ["ignore", "pipe", "pipe"] });
  onTestFinished(() => void child.kill("SIGKILL"));
  let output = "";
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding("utf8").on("data", (part: string) => {
      output += part;
    });
  await expect.poll(() => output, { timeout: 20_000 }).toMatch(/mixtape serves .* at http/);
  const url = /at (http\S+) /.exec(output)?.[1] ?? "";
  return { child, url, output: () => output };
}

test("SIGTERM: no new requests, running streams complete, then exit 0", async () => {
  const { child, url } = await serve([]);
  const response = await post(url, CHAT, { ...ENDLESS, max_tokens: 600 });
  const reader = await begun(response);
  child.kill("SIGTERM");
  await expect.poll(async () => (await post(url, CHAT, ENDLESS).catch(() => ({ status: 503 }))).status).toBe(503);
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) text += Buffer.from(part.value).toString();
  expect(text).toMatch(/"finish_reason":"length"[\s\S]*data: \[DONE\]\n\n$/);
  expect(child.exitCode ?? (await once(child, "exit"))[0]).toBe(0);
}, 60_000);

test("SIGKILL under load leaves a key file that opens", async () => {
  const keys = join(temporary(), "keys.json");
  const { secret } = await createKey(keys, { name: "a", expires: null, models: null, requestsPerMinute: null, tokensPerDay: 1e9 });
  const first = await serve(["--keys", keys]);
  const authorization = { authorization: `Bearer ${secret}` };
  await begun(await post(first.url, CHAT, ENDLESS, authorization));
  first.child.kill("SIGKILL");
  await once(first.child, "exit");
  const second = await serve(["--keys", keys]);
  expect((await post(second.url, CHAT, { ...ENDLESS, stream: false, max_tokens: 2 }, authorization)).status).toBe(200);
}, 60_000);
