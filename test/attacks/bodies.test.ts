/** The heaviest wrong bodies that fit the limits, all at once, against the command itself: /health answers, memory stays bounded. */
import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { request } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import { Client, credentials, type ServiceError, status } from "@grpc/grpc-js";
import { expect, onTestFinished, test } from "vitest";
import { binary } from "../cli/run.ts";

const CHAT = "/v1/chat/completions";
/** Just below the default limit of 4 MiB. */
const FULL = 4 * 2 ** 20 - 1024;

/** `head`, then as many of `element` as fit, then `tail`. */
function filled(head: string, element: string, tail: string, bytes = FULL): string {
  return `${head}${element.repeat(Math.floor((bytes - head.length - tail.length) / element.length)).replace(/,$/, "")}${tail}`;
}
const named = (count: number, value = "1") => Array.from({ length: count }, (_, i) => `"k${i}":${value}`).join();
const chat = (more: string, content = '"x"') => `{"model":"default","messages":[{"role":"user","content":${content}}]${more}}`;
/** The end of a chat's body after `chat(…)`'s open list or object. */
const around = (head: string, element: string, tail: string) => filled(chat(head).slice(0, -1), element, `${tail}}`);

const BODIES: readonly (readonly [name: string, path: string, body: string])[] = [
  ["ids outside the vocabulary", "/detokenize", filled('{"model":"default","tokens":[', "99999,", "]}")],
  ["as many of them as are allowed", "/detokenize", filled('{"model":"default","tokens":[', "99999,", "]}", 780_000)],
  ["texts for ids", "/detokenize", filled('{"model":"default","tokens":[', '"",', "]}")],
  ["objects for ids", "/detokenize", filled('{"model":"default","tokens":[', "{},", "]}")],
  ["ids that end with a text", "/detokenize", filled('{"model":"default","tokens":[', "1,", '"x"]}', 260_000)],
  ["numbers for parts", CHAT, filled('{"model":"default","messages":[{"role":"user","content":[', "1,", "]}]}")],
  ["objects for parts", CHAT, filled('{"model":"default","messages":[{"role":"user","content":[', "{},", "]}]}", 150_000)],
  ["numbers for messages", CHAT, filled('{"model":"default","messages":[', "0,", "]}")],
  ["messages without content", CHAT, filled('{"model":"default","messages":[', '{"role":"user"},', "]}")],
  ["prompts of no kind", "/v1/completions", filled('{"model":"default","prompt":[', "null,", "]}")],
  ["lists for ids", "/v1/completions", filled('{"model":"default","prompt":[', "[[]],", "]}", 150_000)],
  ["inputs of two kinds", "/v1/embeddings", filled('{"model":"default","input":["x",', "1,", "]}", 250_000)],
  ["variables", CHAT, chat(`,"chat_template_kwargs":{${named(280_000)}}`)],
  ["as many of them as JSON may have", CHAT, chat(`,"chat_template_kwargs":{${named(65_000)}}`)],
  ["biases", CHAT, chat(`,"logit_bias":{${named(64_000)}}`)],
  ["unknown fields", CHAT, chat(`,${named(64_000)}`)],
  ["metadata that is ignored", CHAT, chat(`,"metadata":{${named(64_000, '"x"')}},"stream":3`)],
  [
    "properties of a tool",
    CHAT,
    chat(`,"tools":[{"type":"function","function":{"name":"f","parameters":{"p":{${named(64_000, "{}")}}}}}]`),
  ],
  [
    "values of a schema",
    CHAT,
    around(',"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"enum":[', "1,", "]}}}"),
  ],
  ["stop texts", CHAT, around(',"stop":[', '"a",', "]")],
  ["depth", CHAT, around(',"stop":', "[", "")],
  ["texts without commas", CHAT, around(',"stop":[', '""', "]")],
  ["escaped quotes", "/tokenize", filled('{"model":"default","text":"', '\\"', '"}')],
  ["escapes of a text that can't fit", "/v1/completions", filled('{"model":"default","prompt":"', "\\u00e9", '"}')],
  ["a text that can't fit", CHAT, chat("", filled('"', "word ", '"', FULL - 200))],
];

/** The command, ready; it ends with the test. */
async function serve(more: readonly string[] = []) {
  if (!existsSync(binary)) throw new Error("dist is not built; run npm run build");
  const child = spawn(process.execPath, [binary, "serve", "--port", "0", "--threads", "1", "--log-level", "warn", ...more], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  onTestFinished(() => void child.kill("SIGKILL"));
  let output = "";
  child.stderr.setEncoding("utf8").on("data", (part: string) => void (output += part));
  await expect.poll(() => output, { timeout: 20_000 }).toMatch(/ at http\S+ /);
  const grpc = `127.0.0.1:${/gRPC on port (\d+)/.exec(output)?.[1]}`;
  return { url: / at (http\S+) /.exec(output)?.[1] ?? "", grpc, pid: child.pid as number, child };
}

function send(url: string, path: string, body: Buffer): Promise<number> {
  return new Promise((resolve, reject) => {
    const headers = { "content-type": "application/json", "content-length": body.length };
    const asked = request(url + path, { method: "POST", headers, agent: false }, (answer) => {
      answer.resume().on("end", () => resolve(answer.statusCode ?? 0));
    });
    asked.on("error", reject).end(body);
  });
}

/** Asks /health every 5 ms from a thread of its own, so that this one's work is not measured. `stop` gives the longest wait, in ms. */
async function watch(url: string): Promise<{ stop(): Promise<number> }> {
  const code = `
    const { parentPort, workerData } = require("node:worker_threads");
    const { Agent, get } = require("node:http");
    const agent = new Agent({ keepAlive: true });
    let worst = 0, over = false;
    parentPort.once("message", () => { over = true; });
    const ask = () => {
      if (over) { agent.destroy(); parentPort.postMessage(worst); return; }
      const start = performance.now();
      get(workerData + "/health", { agent }, (answer) => answer.resume().on("end", () => {
        worst = Math.max(worst, performance.now() - start);
        setTimeout(ask, 5);
      })).on("error", () => { worst = Infinity; setTimeout(ask, 5); });
    };
    get(workerData + "/health", { agent }, (answer) => answer.resume().on("end", () => { parentPort.postMessage(0); ask(); }));`;
  const worker = new Worker(code, { eval: true, workerData: url });
  const next = () => new Promise<number>((resolve) => worker.once("message", resolve));
  await next();
  return {
    stop: async () => {
      worker.postMessage(0);
      const worst = await next();
      await worker.terminate();
      return worst;
    },
  };
}

/**
 * Attacks while /health is asked, which must not wait for 100 ms. A busy machine delays answers without any attack, so what those
 * take is measured too, and delays single rounds; an event loop that is held delays each of them, by seconds.
 */
async function undisturbed(url: string, attack: () => Promise<void>): Promise<void> {
  const idle = await watch(url);
  await sleep(300);
  const quiet = await idle.stop();
  let least = Number.POSITIVE_INFINITY;
  for (let round = 0; round < 5 && least >= 100; round++) {
    const health = await watch(url);
    await attack();
    least = Math.min(least, await health.stop());
  }
  expect(least).toBeLessThan(100 + 4 * quiet);
}

/** The most memory that a process had. */
const megabytes = (pid: number) => Number(/VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

test("the heaviest wrong bodies at once: /health does not wait, memory stays under 600 MB", async () => {
  const { url, pid, child } = await serve();
  const bodies = BODIES.map(([, path, body]) => [path, Buffer.from(body)] as const);
  expect(bodies.length).toBeGreaterThanOrEqual(20);
  await send(url, CHAT, Buffer.from(chat(',"max_tokens":1')));
  await undisturbed(url, async () => {
    const statuses = await Promise.all(bodies.map(([path, body]) => send(url, path, body)));
    // 429: more bytes than the server keeps for one caller's bodies.
    expect(BODIES.flatMap(([name], i) => ([400, 429].includes(statuses[i]) ? [] : [[name, statuses[i]]]))).toEqual([]);
    expect(statuses.filter((status) => status === 400).length).toBeGreaterThan(12);
  });
  expect(megabytes(pid)).toBeLessThan(600);
  expect(child.exitCode).toBe(null);
}, 60_000);

test("twenty times the same body: /health does not wait, memory stays under 600 MB", async () => {
  const { url, pid, child } = await serve();
  const heavy = ["ids that end with a text", "objects for parts", "properties of a tool", "a text that can't fit"];
  for (const [name, path, text] of BODIES) {
    if (!heavy.includes(name)) continue;
    const body = Buffer.from(text);
    await undisturbed(url, async () => {
      const statuses = await Promise.all(Array.from({ length: 20 }, () => send(url, path, body)));
      expect(statuses.filter((code) => code !== 400 && code !== 429)).toEqual([]);
    });
  }
  expect(megabytes(pid)).toBeLessThan(600);
  expect(child.exitCode).toBe(null);
}, 60_000);

/** A field of a protobuf message that holds bytes. */
function field(number: number, bytes: Buffer): Buffer {
  const head = [number * 8 + 2];
  for (let length = bytes.length; ; length = Math.floor(length / 128)) {
    head.push((length % 128) + (length >= 128 ? 128 : 0));
    if (length < 128) break;
  }
  return Buffer.concat([Buffer.from(head), bytes]);
}
const repeated = (...bytes: number[]) => Buffer.alloc(FULL - (FULL % bytes.length), Buffer.from(bytes));
const MODEL = field(1, Buffer.from("default"));

const MESSAGES: readonly (readonly [name: string, method: string, message: Buffer])[] = [
  ["empty messages", "Chat", repeated(0x12, 0)],
  ["empty tools", "Chat", repeated(0x1a, 0)],
  ["unknown fields", "Chat", repeated(0x78, 1)],
  ["nested groups", "Chat", repeated(0x7b)],
  ["empty stop texts", "Chat", field(6, repeated(0x1a, 0))],
  ["empty biases", "Chat", field(6, field(1, repeated(0x4a, 0)))],
  ["template variables", "Chat", field(7, Buffer.from(`{${named(280_000)}}`))],
  ["deep template variables", "Chat", field(7, repeated(0x5b))],
  ["a schema without end", "Chat", field(6, field(6, field(2, Buffer.from(filled("[", "1,", "1]")))))],
  ["ids, packed", "Generate", field(3, field(1, repeated(1)))],
  ["ids, one by one", "Detokenize", repeated(0x10, 1)],
  ["ids outside the vocabulary", "Detokenize", field(2, Buffer.alloc(390_000, Buffer.from([0xff, 0xff, 0x7f])))],
  ["empty inputs", "Embed", repeated(0x12, 0)],
  ["empty messages to route", "Route", field(4, repeated(0x0a, 0))],
];

test("the heaviest wrong messages over gRPC at once: /health does not wait, memory stays under 600 MB", async () => {
  const { url, grpc, pid, child } = await serve(["--grpc-port", "0"]);
  const client = new Client(grpc, credentials.createInsecure());
  onTestFinished(() => client.close());
  const call = (service: string, method: string, message: Buffer) =>
    new Promise<number>((resolve) => {
      const same = (bytes: Buffer) => bytes;
      const asked = client.makeServerStreamRequest(`/${service}/${method}`, same, same, message);
      asked.on("error", ({ code }: ServiceError) => resolve(code)).on("end", () => resolve(status.OK));
      asked.resume();
    });
  await undisturbed(url, async () => {
    const codes = await Promise.all(
      MESSAGES.map(([, method, message]) => call("mixtape.v1.Mixtape", method, Buffer.concat([MODEL, message]))),
    );
    const wrong = MESSAGES.flatMap(([name], i) =>
      [status.INVALID_ARGUMENT, status.RESOURCE_EXHAUSTED].includes(codes[i]) ? [] : [[name, codes[i]]],
    );
    expect(wrong).toEqual([]);
  });
  // Services of libraries decode by themselves, so they take small messages only.
  await undisturbed(url, async () => {
    const sent = Array.from({ length: 8 }, () => call("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo", repeated(0x78, 1)));
    await Promise.all(sent);
  });
  expect(megabytes(pid)).toBeLessThan(600);
  expect(child.exitCode).toBe(null);
}, 60_000);
