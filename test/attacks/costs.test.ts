/**
 * What requests cost: by every route the charge is the response's `usage`, and the metrics count the same; a client that leaves pays
 * for what was computed until then.
 */
import type { Metadata } from "@grpc/grpc-js";
import { afterEach, describe, expect, onTestFinished, test, vi } from "vitest";
import { createKey, type KeyTerms } from "../../src/server/access/keys.ts";
import { Assembler } from "../../src/server/completion/assembler.ts";
import { Meter, type TokenKind } from "../../src/server/meter.ts";
import { temporary } from "../cli/run.ts";
import { ask, bearer, reflected, whole } from "../server/grpc/reflected.ts";
import { FREE } from "../server/harness.ts";
import { engineOf, post, start } from "../server/start.ts";

afterEach(() => vi.restoreAllMocks());

/** A server with a key, and what the key and the metrics have counted. */
async function serve(terms: Partial<KeyTerms> = {}, config: object = {}) {
  const file = `${temporary()}/keys.json`;
  const { secret, key } = await createKey(file, { ...FREE, tokensPerDay: 10_000_000, ...terms });
  const running = await start({ keys: file, grpcPort: 0, metricsPort: null, drainTimeoutSeconds: 1, ...config });
  onTestFinished(() => running.server.stop());
  const { server, url } = running;
  const { model, release } = await server.catalog.use("default");
  release();
  const client = await reflected(`127.0.0.1:${running.grpcPort}`);
  const limit = 10_000_000;
  const charged = () => limit - (server.gate.allowance({ id: key.id, models: null })?.tokens?.remaining ?? limit);
  const headers = { authorization: `Bearer ${secret}` };
  const metrics = async () => {
    const text = await (await fetch(`${url}/metrics`, { headers })).text();
    const of = (kind: TokenKind) =>
      Number(new RegExp(`^mixtape_tokens_total\\{model="default",kind="${kind}"\\} (\\d+)`, "m").exec(text)?.[1] ?? 0);
    return { prompt: of("prompt"), cached: of("cached"), completion: of("completion") };
  };
  return { ...running, model, engine: await engineOf(running), client, secret, headers, charged, metrics, meta: bearer(secret) };
}
type Served = Awaited<ReturnType<typeof serve>>;

const messages = [{ role: "user", content: "Find me a hotel in London, please. ".repeat(12) }];
const text = messages[0].content;
const chat = { model: "default", messages, max_tokens: 6, temperature: 1, seed: 3 };
const ENDLESS = { "2": -100, "5": -100 };

interface Body {
  readonly usage: {
    readonly prompt_tokens: number;
    readonly completion_tokens?: number;
    readonly total_tokens: number;
    readonly prompt_tokens_details?: { readonly cached_tokens: number };
  };
}
const json = async (served: Served, path: string, body: object): Promise<Body> =>
  (await post(served.url, path, body, served.headers)).json() as Promise<Body>;
/** The usage at the end of a stream. */
const streamed = async (served: Served, path: string, body: object): Promise<Body["usage"]> => {
  const lines = (
    await (await post(served.url, path, { ...body, stream: true, stream_options: { include_usage: true } }, served.headers)).text()
  ).split("\n");
  return (JSON.parse((lines.filter((line) => line.startsWith("data: {")).at(-1) as string).slice(6)) as Body).usage;
};
/** A request that computes nothing. */
const nothing = async (served: Served, status: number, path: string, body: object): Promise<number> => {
  expect((await post(served.url, path, { model: "default", ...body }, served.headers)).status, path).toBe(status);
  return 0;
};
const total = (usage: Body["usage"]) => usage.total_tokens;
const ofEnd = ({ end }: Awaited<ReturnType<typeof whole>>) => end.usage["prompt_tokens"] + end.usage["completion_tokens"];

/** Each road, and the tokens that the response says it used. */
const ROADS: readonly (readonly [string, (served: Served) => Promise<number>])[] = [
  ["a chat", async (s) => total((await json(s, "/v1/chat/completions", chat)).usage)],
  ["the same chat, now in the prefix cache", async (s) => total((await json(s, "/v1/chat/completions", chat)).usage)],
  ["a chat with n: 8", async (s) => total((await json(s, "/v1/chat/completions", { ...chat, n: 8 })).usage)],
  ["a stream with n: 3", (s) => streamed(s, "/v1/chat/completions", { ...chat, n: 3 }).then(total)],
  [
    "a chat that a stop text ends",
    async (s) => total((await json(s, "/v1/chat/completions", { ...chat, max_tokens: 60, stop: ["e"] })).usage),
  ],
  ["a completion", async (s) => total((await json(s, "/v1/completions", { model: "default", prompt: text })).usage)],
  [
    "completions of three prompts, n: 2",
    async (s) =>
      total((await json(s, "/v1/completions", { model: "default", prompt: [text, `${text}!`, "one"], n: 2, temperature: 1 })).usage),
  ],
  ["an echoed completion", async (s) => total((await json(s, "/v1/completions", { model: "default", prompt: text, echo: true })).usage)],
  ["a streamed completion of ids", (s) => streamed(s, "/v1/completions", { model: "default", prompt: [5, 6, 7, 8] }).then(total)],
  ["an embedding", async (s) => total((await json(s, "/v1/embeddings", { model: "default", input: text })).usage)],
  ["embeddings", async (s) => total((await json(s, "/v1/embeddings", { model: "default", input: [text, text, "one"] })).usage)],
  [
    "a routing",
    async (s) => ((await json(s, "/v1/routing", { model: "default", text })) as unknown as { tokens: unknown[] }).tokens.length,
  ],
  [
    "a conversation's routing",
    async (s) => ((await json(s, "/v1/routing", { model: "default", messages })) as unknown as { tokens: unknown[] }).tokens.length,
  ],
  ["tokens of a text: nothing", (s) => nothing(s, 200, "/tokenize", { text })],
  ["a text of tokens: nothing", (s) => nothing(s, 200, "/detokenize", { tokens: [5, 6] })],
  [
    "a chat that is refused: nothing",
    (s) =>
      nothing(s, 400, "/v1/chat/completions", {
        messages,
        response_format: { type: "json_schema", json_schema: { name: "x", schema: { $ref: "#/no" } } },
      }),
  ],
  ["a prompt that is too long: nothing", (s) => nothing(s, 400, "/v1/completions", { prompt: text.repeat(100) })],
  ["an embedding that is too long: nothing", (s) => nothing(s, 400, "/v1/embeddings", { input: ["one", text.repeat(100)] })],
  [
    "gRPC's Chat",
    async (s) =>
      ofEnd(
        await whole(
          s.client.Chat({ model: "default", messages: [{ role: "ROLE_USER", content: text }], options: { max_tokens: 5 } }, s.meta),
        ),
      ),
  ],
  [
    "gRPC's Generate",
    async (s) => ofEnd(await whole(s.client.Generate({ model: "default", text, options: { max_tokens: 5, stop: ["e"] } }, s.meta))),
  ],
  [
    "gRPC's Embed",
    async (s) =>
      (await ask(s.client, "Embed", { model: "default", inputs: [{ text }, { text: "one" }] }, s.meta))["prompt_tokens"] as number,
  ],
  ["gRPC's Route", async (s) => (await whole(s.client.Route({ model: "default", text }, s.meta))).events.length],
];

test("by every road, the charge and the metrics are the usage", async () => {
  const served = await serve();
  for (const [name, road] of ROADS) {
    const [before, counted] = [served.charged(), await served.metrics()];
    const used = await road(served);
    const now = await served.metrics();
    if (!name.endsWith("nothing")) expect(used, name).toBeGreaterThan(0);
    expect(served.charged() - before, name).toBe(used);
    expect(now.prompt + now.completion - counted.prompt - counted.completion, name).toBe(used);
  }
  expect((await served.metrics()).cached).toBeGreaterThan(0);
});

test("n answers cost their prompt once, in the cache or not", async () => {
  const served = await serve();
  const fresh = { ...chat, messages: [{ role: "user", content: `Something new. ${text}` }] };
  const { usage: one } = await json(served, "/v1/chat/completions", fresh);
  for (const n of [1, 8]) {
    const { usage } = await json(served, "/v1/chat/completions", { ...fresh, n });
    expect(usage.prompt_tokens).toBe(one.prompt_tokens);
    expect(usage.completion_tokens).toBeLessThanOrEqual(6 * n);
    expect(usage.prompt_tokens_details?.cached_tokens).toBeGreaterThan(0);
  }
});

describe("a client that leaves", () => {
  let served: Served;
  /** Long enough for many steps of one row less than the step's limit. */
  const long = Array.from({ length: 3000 }, (_, i) => 10 + (i % 5000));

  /** Sends, and leaves once `when` says so. Resolves with what was charged. */
  const leaveWhen = async (path: string, body: object, when: (charged: number) => boolean): Promise<number> => {
    const before = served.charged();
    const leave = new AbortController();
    const sent = fetch(`${served.url}${path}`, {
      method: "POST",
      headers: { "content-type": "application/json", ...served.headers },
      body: JSON.stringify({ model: "default", ...body }),
      signal: leave.signal,
    })
      .then((response) => response.text())
      .catch(() => "");
    const deadline = performance.now() + 20_000;
    while (!when(served.charged() - before) && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 1));
    leave.abort();
    await sent;
    await expect.poll(() => served.server.gate.admission.running, { timeout: 20_000 }).toBe(0);
    await expect.poll(() => served.engine.stats().running).toBe(0);
    return served.charged() - before;
  };

  test("pays for the chunks of its prompt, of embeddings and of routings that were computed, and no more are", async () => {
    served = await serve({}, { models: [{ name: "default", path: "default", kvCacheTokens: 32768, threads: 1, chunkSize: 64 }] });
    const texts = served.model.tokenizer.decode(long.slice(0, 2000));
    for (const [path, body, whole] of [
      ["/v1/completions", { prompt: long, max_tokens: 5 }, 3000],
      ["/v1/completions", { prompt: long.map((id) => id + 1), n: 4, max_tokens: 5, stream: true, temperature: 1 }, 3000],
      ["/v1/embeddings", { input: [long, long] }, 6000],
      ["/v1/routing", { text: texts }, served.model.tokenizer.encode(texts).length],
      ["/v1/chat/completions", { messages: [{ role: "user", content: texts }], max_tokens: 5 }, 2000],
    ] as const) {
      const charged = await leaveWhen(path, body, (sofar) => sofar >= 256);
      expect(charged, path).toBeGreaterThanOrEqual(256);
      expect(charged, path).toBeLessThan(whole);
    }
  });

  test("pays for the answer's tokens, read or not", async () => {
    served = await serve();
    const endless = { messages: [{ role: "user", content: "Hi" }], max_tokens: 2000, logit_bias: ENDLESS };
    for (const stream of [true, false]) {
      const generated = served.engine.stats().generatedTokens;
      const charged = await leaveWhen("/v1/chat/completions", { ...endless, stream }, (sofar) => sofar >= 120);
      const computed = served.engine.stats().generatedTokens - generated;
      expect(charged).toBeGreaterThanOrEqual(120);
      // The prompt has less than 20 tokens; a step may be under way when the client leaves.
      expect(charged).toBeGreaterThanOrEqual(computed - 2);
      expect(charged).toBeLessThan(computed + 20);
    }
  });

  test("of gRPC pays as well", async () => {
    served = await serve({}, { models: [{ name: "default", path: "default", kvCacheTokens: 32768, threads: 1, chunkSize: 64 }] });
    for (const [method, request] of [
      ["Generate", { tokens: { ids: long } }],
      ["Route", { tokens: { ids: long } }],
    ] as const) {
      const before = served.charged();
      const call = served.client[method]({ model: "default", ...request }, served.meta as Metadata);
      call.on("error", () => {});
      await expect.poll(() => served.charged() - before, { interval: 1, timeout: 20_000 }).toBeGreaterThanOrEqual(256);
      call.cancel();
      await expect.poll(() => served.server.gate.admission.running, { timeout: 20_000 }).toBe(0);
      expect(served.charged() - before).toBeLessThan(3000);
    }
  });
});

test("an answer that fails midway is charged for what was computed before", async () => {
  const served = await serve();
  const { usage } = await json(served, "/v1/chat/completions", { ...chat, max_tokens: 1 });
  const before = served.charged();
  let taken = 0;
  const take = Assembler.prototype.take;
  vi.spyOn(Assembler.prototype, "take").mockImplementation(function (this: Assembler, token) {
    if (++taken > 4) throw new Error("the test's own failure");
    return take.call(this, token);
  });
  const response = await post(served.url, "/v1/chat/completions", { ...chat, logit_bias: ENDLESS, max_tokens: 40 }, served.headers);
  expect(response.status).toBe(500);
  expect(served.charged() - before).toBe(usage.prompt_tokens + 4);
});

test("a budget is used up while a request runs: that one goes on, the next is refused", async () => {
  const served = await serve({ tokensPerDay: 60 });
  const response = await post(
    served.url,
    "/v1/chat/completions",
    { model: "default", messages: [{ role: "user", content: "Hi" }], max_tokens: 300, stream: true, logit_bias: ENDLESS },
    served.headers,
  );
  const reading = response.text();
  await expect
    .poll(
      async () =>
        (
          await post(
            served.url,
            "/v1/chat/completions",
            { ...chat, messages: [{ role: "user", content: "Hi" }], max_tokens: 1 },
            served.headers,
          )
        ).status,
      { interval: 5, timeout: 20_000 },
    )
    .toBe(429);
  expect((await reading).match(/finish_reason":"length"/)).not.toBeNull();
});

test("a meter counts a prompt once, whoever reads it and however often", () => {
  const recorded: Record<TokenKind, number> = { prompt: 0, cached: 0, completion: 0 };
  const meter = new Meter((kind, tokens) => {
    recorded[kind] += tokens;
  });
  const [a, b, other] = [meter.answerTo(0), meter.answerTo(0), meter.answerTo(2)];
  a.read(64, 32);
  b.read(96, 64);
  a.read(80, 32); // slower than the other answer
  a.read(100, 32);
  b.read(32, 0); // preempted, and read again
  b.read(100, 0);
  other.read(10, 0);
  a.wrote(true);
  b.wrote(false);
  expect(meter.usage).toEqual({ promptTokens: 110, cachedTokens: 32, completionTokens: 2, reasoningTokens: 1 });
  expect(recorded).toEqual({ prompt: 110, cached: 32, completion: 2 });
});
