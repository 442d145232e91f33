/** The heaviest wrong bodies that fit the limits, all at once, against the command itself: /health answers, memory stays bounded. */
import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { request } from "node:http";
import { Worker } from "node:worker_threads";
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
async function serve() {
  if (!existsSync(binary)) throw new Error("dist is not built; run npm run build");
  const child = spawn(process.execPath, [binary, "serve", "--port", "0", "--log-level", "warn"], { stdio: ["ignore", "ignore", "pipe"] });
  onTestFinished(() => void child.kill("SIGKILL"));
  let output = "";
  child.stderr.setEncoding("utf8").on("data", (part: string) => void (output += part));
  await expect.poll(() => output, { timeout: 20_000 }).toMatch(/ at http\S+ /);
  return { url: / at (http\S+) /.exec(output)?.[1] ?? "", pid: child.pid as number, child };
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

const megabytes = (pid: number, what: "VmHWM" | "VmRSS") =>
  Number(new RegExp(`${what}:\\s+(\\d+) kB`).exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

test("the heaviest wrong bodies at once: /health does not wait, memory stays under 600 MB", async () => {
  const { url, pid, child } = await serve();
  const bodies = BODIES.map(([, path, body]) => [path, Buffer.from(body)] as const);
  expect(bodies.length).toBeGreaterThanOrEqual(20);
  await send(url, CHAT, Buffer.from(chat(',"max_tokens":1')));
  let least = Number.POSITIVE_INFINITY;
  // A busy machine may delay a round; a held event loop delays each, by seconds.
  for (let round = 0; round < 4 && least >= 100; round++) {
    const health = await watch(url);
    const statuses = await Promise.all(bodies.map(([path, body]) => send(url, path, body)));
    least = Math.min(least, await health.stop());
    // 429: more bytes than the server keeps for one caller's bodies.
    expect(BODIES.flatMap(([name], i) => ([400, 429].includes(statuses[i]) ? [] : [[name, statuses[i]]]))).toEqual([]);
    expect(statuses.filter((status) => status === 400).length).toBeGreaterThan(12);
    console.log(least, megabytes(pid, "VmHWM"));
  }
  expect(least).toBeLessThan(100);
  expect(megabytes(pid, "VmHWM")).toBeLessThan(600);
  expect(child.exitCode).toBe(null);
}, 60_000);
