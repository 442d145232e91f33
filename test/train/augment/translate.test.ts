/** Back-translation through an endpoint: bounded, repeated where that helps, remembered. */
import { readFileSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { expect, onTestFinished, test } from "vitest";
import {
  endpoint,
  PROMPT,
  RetryError,
  Translator,
  type TranslatorOptions,
  translationPrompt,
} from "../../../src/train/augment/translate.ts";
import { temporary } from "../data/files.ts";

type Answer = (prompt: string, response: ServerResponse, request: IncomingMessage) => void | Promise<void>;

async function serve(answer: Answer): Promise<string> {
  const server = createServer(async (request, response) => {
    let text = "";
    for await (const part of request) text += part;
    await answer(JSON.parse(text).messages[0].content, response, request);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close());
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1/`;
}

const say = (response: ServerResponse, content: unknown) => response.end(JSON.stringify({ choices: [{ message: { content } }] }));
const ask = (url: string, more: object = {}) => endpoint({ url, model: "m", key: null, timeout: 5000, maxTokens: 64, ...more });
const open = (options: Partial<TranslatorOptions> & Pick<TranslatorOptions, "ask">) =>
  Translator.open({ model: "m", concurrency: 4, attempts: 3, cache: null, pause: 1, ...options });

test("a round trip asks twice, greedily, with the key", async () => {
  const seen: unknown[] = [];
  const url = await serve((prompt, response, request) => {
    seen.push([request.url, request.headers.authorization, prompt]);
    say(response, prompt.includes("into French") ? '"Bonjour"' : "```\nHello there\n```");
  });
  const translator = await open({ ask: ask(url, { key: "secret" }) });
  expect(await translator.roundTrip("Hi there", "French", "English")).toBe("Hello there");
  expect(seen).toEqual([
    ["/v1/chat/completions", "Bearer secret", translationPrompt(PROMPT, "French", "Hi there")],
    ["/v1/chat/completions", "Bearer secret", translationPrompt(PROMPT, "English", "Bonjour")],
  ]);
});

test("a prompt of one's own, with the language and the text, once each", async () => {
  const seen: string[] = [];
  const asked = async (prompt: string) => `x${seen.push(prompt)}`;
  await (await open({ ask: asked, prompt: "{language}: {text}" })).roundTrip("$& {language}", "French", "English");
  expect(seen).toEqual(["French: $& {language}", "English: x1"]);
  await expect(open({ ask: asked, prompt: "Translate {text}" })).rejects.toThrow(
    'has no {language}: it must be like "Translate into {language}: {text}"',
  );
});

test("no more run at once than is allowed", async () => {
  let [running, most] = [0, 0];
  const url = await serve(async (prompt, response) => {
    most = Math.max(most, ++running);
    await new Promise((resolve) => setTimeout(resolve, 20));
    running--;
    say(response, `x ${prompt.length}`);
  });
  const translator = await open({ ask: ask(url), concurrency: 3 });
  await Promise.all(Array.from({ length: 12 }, (_, i) => translator.roundTrip(`text ${i}`, "French", "English")));
  expect(most).toBe(3);
});

test("429, 500 and broken connections are tried again, 400 is not", async () => {
  let requests = 0;
  const url = await serve((_, response) => {
    requests++;
    if (requests === 1) response.writeHead(429, { "retry-after": "0.01" }).end("slow down");
    else if (requests === 2) response.destroy();
    else say(response, "fine");
  });
  expect(await (await open({ ask: ask(url) })).roundTrip("a", "French", "English")).toBe("fine");
  expect(requests).toBe(4);

  let refused = 0;
  const wrong = await serve((_, response) => {
    refused++;
    response.writeHead(400).end('{"error": "no such model"}');
  });
  await expect((await open({ ask: ask(wrong) })).roundTrip("a", "French", "English")).rejects.toThrow(
    /answers 400: \{"error": "no such model"\}/,
  );
  expect(refused).toBe(1);
  const broken = await serve((_, response) => void response.writeHead(503).end("busy"));
  await expect((await open({ ask: ask(broken) })).roundTrip("a", "French", "English")).rejects.toThrow(
    /the translation failed 3 times: .*answers 503: busy/,
  );
});

test("an answer that does not come, is too large or is no completion", async () => {
  const silent = await serve(() => {});
  await expect(ask(silent, { timeout: 50 })("a", undefined)).rejects.toThrow(RetryError);
  await expect(ask(silent, { timeout: 50 })("a", undefined)).rejects.toThrow("no answer within 0.05 s");
  const huge = await serve((_, response) => void response.end("x".repeat(5 << 20)));
  await expect(ask(huge)("a", undefined)).rejects.toThrow("the endpoint's answer has more than 4194304 bytes");
  const other = await serve((_, response) => void say(response, null));
  await expect(ask(other)("a", undefined)).rejects.toThrow("the answer is not one of chat completions");
  expect(() => ask("ftp://x")).toThrow("is no http address");
});

test("answers are kept in a file: a second run asks nothing, a cut line is left out", async () => {
  let requests = 0;
  const counting = async (prompt: string) => `answer ${++requests} ${prompt.length}`;
  const cache = join(temporary(), "cache.jsonl");
  const first = await (await open({ ask: counting, cache })).roundTrip("a", "French", "English");
  expect(requests).toBe(2);
  expect(await (await open({ ask: counting, cache })).roundTrip("a", "French", "English")).toBe(first);
  expect(requests).toBe(2);
  const lines = readFileSync(cache, "utf8");
  writeFileSync(cache, lines.slice(0, -10)); // killed while it wrote the second answer
  await (await open({ ask: counting, cache })).roundTrip("a", "French", "English");
  expect(requests).toBe(3);
  await (await open({ ask: counting, cache })).roundTrip("a", "French", "English");
  expect(requests).toBe(3);
  await (await open({ ask: counting, cache, model: "another" })).roundTrip("a", "French", "English");
  expect(requests).toBe(5);
});

test("a signal ends it", async () => {
  const controller = new AbortController();
  const silent = await serve(() => controller.abort(new Error("stopped")));
  const translator = await open({ ask: ask(silent), signal: controller.signal });
  await expect(translator.roundTrip("a", "French", "English")).rejects.toThrow("stopped");
});
