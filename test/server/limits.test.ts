/** Who may use the server and how much: keys, rates, budgets, capacity; and the errors for everyone else. */
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { get } from "node:https";
import { join } from "node:path";
import OpenAI from "openai";
import { expect, test } from "vitest";
import { createKey, type KeyTerms, readKeys, revokeKey } from "../../src/server/access/keys.ts";
import { checkServeConfig } from "../../src/server/config.ts";
import { temporary } from "../cli/run.ts";
import { canCertify, certificate } from "./harness.ts";
import { engineOf, post, startHere } from "./start.ts";

const FREE: KeyTerms = { name: "alice", expires: null, models: null, requestsPerMinute: null, tokensPerDay: null };
const BODY = { model: "default", messages: [{ role: "user", content: "Hello" }], max_tokens: 2 };
const asked = (url: string, secret: string | null) =>
  post(url, "/v1/chat/completions", BODY, secret === null ? {} : { authorization: `Bearer ${secret}` });

test("keys: only hashes are stored, readable by the owner; the right key works, others do not", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, FREE);
  expect(secret).toMatch(/^mxt_[\w-]{43}$/);
  expect(readFileSync(file, "utf8")).not.toContain(secret);
  expect(statSync(file).mode & 0o777).toBe(0o600);
  const { url } = await startHere({ keys: file });
  expect((await asked(url, secret)).status).toBe(200);
  for (const wrong of [null, "", "mxt_wrong", `${secret}x`, secret.slice(0, -1)]) {
    const response = await asked(url, wrong);
    expect(response.status).toBe(401);
    expect((await response.json()) as object).toMatchObject({ error: { code: "invalid_api_key", type: "authentication_error" } });
  }
  expect((await fetch(`${url}/v1/models`)).status).toBe(401);
  for (const open of ["/health", "/ready"]) expect((await fetch(url + open)).status).toBe(200);
});

test("a key created or revoked while the server runs takes effect within seconds", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, FREE);
  const { url } = await startHere({ keys: file });
  expect((await asked(url, secret)).status).toBe(200);
  const later = await createKey(file, { ...FREE, name: "bob" });
  await expect.poll(async () => (await asked(url, later.secret)).status, { interval: 200 }).toBe(200);
  await revokeKey(file, "alice");
  await expect.poll(async () => (await asked(url, secret)).status, { interval: 200 }).toBe(401);
  await expect(revokeKey(file, "alice")).rejects.toThrow("there is no valid key 'alice'");
});

test("expired keys, keys of other models, and broken files", async () => {
  const file = join(temporary(), "keys.json");
  const old = await createKey(file, { ...FREE, name: "old", expires: "2020-01-01T00:00:00.000Z" });
  const other = await createKey(file, { ...FREE, name: "other", models: ["another"] });
  const { url } = await startHere({ keys: file });
  expect((await asked(url, old.secret)).status).toBe(401);
  expect((await asked(url, other.secret)).status).toBe(403);
  const list = await fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${other.secret}` } });
  expect(((await list.json()) as { data: object[] }).data).toEqual([]);
  writeFileSync(file, '{"version": 1, "keys": [{"id": 3}]}');
  await expect(readKeys(file)).rejects.toThrow(/keys\.json: not a key file: keys\.0\.id/);
  writeFileSync(file, "{");
  await expect(readKeys(file)).rejects.toThrow(/broken JSON/);
});

test("a rate limit: beyond it, 429 with the time to retry", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, { ...FREE, requestsPerMinute: 3 });
  const { url } = await startHere({ keys: file });
  for (const left of ["2", "1", "0"]) {
    const response = await asked(url, secret);
    expect([response.status, response.headers.get("x-ratelimit-remaining-requests")]).toEqual([200, left]);
  }
  const refused = await asked(url, secret);
  expect(refused.status).toBe(429);
  expect(Number(refused.headers.get("retry-after"))).toBeGreaterThan(10);
  expect((await refused.json()) as object).toMatchObject({ error: { code: "rate_limit_exceeded" } });
});

test("a budget: usage survives a restart", async () => {
  const file = join(temporary(), "keys.json");
  const { secret, key } = await createKey(file, { ...FREE, tokensPerDay: 5 });
  const first = await startHere({ keys: file });
  expect((await asked(first.url, secret)).status).toBe(200);
  const refused = await asked(first.url, secret);
  expect([refused.status, ((await refused.json()) as { error: { code: string } }).error.code]).toEqual([429, "budget_exceeded"]);
  await first.server.stop();
  expect(JSON.parse(readFileSync(`${file}.usage`, "utf8")).tokens[key.id]).toBeGreaterThan(5);
  const second = await startHere({ keys: file });
  expect((await asked(second.url, secret)).status).toBe(429);
});

test("requests beyond capacity are rejected immediately, and running ones are not disturbed", async () => {
  const running = await startHere({ maxInProgress: 4 });
  const engine = await engineOf(running);
  const long = { ...BODY, max_tokens: 200, stream: true, logit_bias: { "2": -100, "5": -100 } };
  const streams = await Promise.all(Array.from({ length: 4 }, () => post(running.url, "/v1/chat/completions", long)));
  expect(streams.map((s) => s.status)).toEqual([200, 200, 200, 200]);
  for (let i = 0; i < 6; i++) {
    const refused = await post(running.url, "/v1/chat/completions", BODY);
    expect(refused.status).toBe(429);
    expect(Number(refused.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
    await refused.arrayBuffer();
    expect(engine.stats().running).toBe(4); // it did not wait for one of them to end
  }
  for (const s of streams) expect(await s.text()).toMatch(/data: \[DONE\]\n\n$/);
  expect((await post(running.url, "/v1/chat/completions", BODY)).status).toBe(200);
  expect(engine.cache.free).toBe(engine.cache.count);
}, 180_000);

test("neither prompts nor answers nor keys are in the log", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, FREE);
  const lines: string[] = [];
  const { url } = await startHere({ keys: file }, (line) => lines.push(line));
  const word = "Xylophonist";
  const body = { ...BODY, messages: [{ role: "user", content: `${word} ${word}` }] };
  const response = await post(url, "/v1/chat/completions?x=1", body, { authorization: `Bearer ${secret}` });
  const answer = ((await response.json()) as { choices: { message: { content: string } }[] }).choices[0].message.content;
  await post(url, "/v1/chat/completions", `{"model":"default","messages":"${word}"}`, { authorization: `Bearer ${secret}` });
  await post(url, "/v1/chat/completions", body, { authorization: `Bearer ${word}` });
  const log = lines.join("");
  expect(log).toContain(response.headers.get("x-request-id") as string);
  for (const text of [word, secret, secret.slice(0, 20)]) expect(log).not.toContain(text);
  if (answer.length > 4) expect(log).not.toContain(answer);
});

test("an address that other machines can reach requires keys", () => {
  expect(() => checkServeConfig({ host: "0.0.0.0" })).toThrow(/0\.0\.0\.0 can be reached from other machines, and there are no keys/);
  expect(checkServeConfig({ host: "0.0.0.0", insecureNoAuth: true }).port).toBe(8080);
  const metrics = { metricsPort: 9090, metricsHost: "0.0.0.0" };
  expect(() => checkServeConfig(metrics)).toThrow(/metricsHost: 0\.0\.0\.0 can be reached from other machines: set metricsToken, or keys/);
  for (const held of [{ keys: "keys.json" }, { metricsToken: "0123456789abcdef" }, { insecureNoAuth: true }, { metrics: false }])
    expect(checkServeConfig({ ...metrics, ...held }).metricsHost).toBe("0.0.0.0");
  expect(() => checkServeConfig({ prot: 1 }, "my.yaml")).toThrow("my.yaml: prot: there is no such option; did you mean 'port'?");
  expect(() => checkServeConfig({ port: "x" }, "my.yaml")).toThrow(/^my\.yaml: port: /);
});

test("metrics: requests are counted; a metrics token restricts who can read them", async () => {
  const { url } = await startHere({ metricsToken: "0123456789abcdef" });
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "x" });
  await client.chat.completions.create({ model: "default", messages: [{ role: "user", content: "Hello" }], max_tokens: 3 });
  expect((await fetch(`${url}/metrics`)).status).toBe(401);
  const text = await (await fetch(`${url}/metrics`, { headers: { authorization: "Bearer 0123456789abcdef" } })).text();
  expect(text).toMatch(/mixtape_requests_total\{route="\/v1\/chat\/completions",status="200"\} 1/);
  expect(text).toMatch(/mixtape_tokens_total\{model="default",kind="completion"\} [123]\n/);
  expect(text).toMatch(/mixtape_time_to_first_token_seconds_count\{model="default"\} 1/);
  expect(text).toMatch(/mixtape_expert_load\{model="default",layer="0",expert="\d+"\} [1-9]/);
});

test("the metrics' own port: nothing but the metrics, and for holders of a key only", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, FREE);
  const { server } = await startHere({ keys: file, metricsPort: 0 });
  const port = server.metricsPort;
  const ask = async (path: string, headers: Record<string, string> = {}) =>
    (await fetch(`http://127.0.0.1:${port}${path}`, { headers })).status;
  const key = { authorization: `Bearer ${secret}` };
  expect([await ask("/metrics"), await ask("/metrics", { authorization: "Bearer x" }), await ask("/metrics", key)]).toEqual([
    401, 401, 200,
  ]);
  for (const path of ["/", "/docs", "/health", "/v1/models"]) expect(await ask(path, key)).toBe(404);
  expect((await fetch(`http://127.0.0.1:${port}/metrics`, { method: "POST", headers: key })).status).toBe(405);
});

test.skipIf(!canCertify)("TLS: over HTTPS with a certificate of one's own (needs openssl)", async () => {
  const { cert, key } = certificate();
  const { url } = await startHere({ tls: { cert, key } });
  expect(url).toMatch(/^https:/);
  const status = await new Promise((resolve, reject) => {
    get(`${url}/ready`, { ca: readFileSync(cert), servername: "localhost" }, (response) => resolve(response.statusCode)).on(
      "error",
      reject,
    );
  });
  expect(status).toBe(200);
});

test("several models: loaded on first use, idle ones unloaded when the budget needs their memory", async () => {
  const bytes = statSync(new URL("../../models/small-moe/model.safetensors", import.meta.url)).size;
  const models = ["a", "b", "c"].map((name) => ({ name, path: "default", preload: false, kvCacheTokens: 1024 }));
  const { url, server } = await startHere({ models, memoryBudgetBytes: Math.floor(2.5 * (bytes + 1024 * 2048)) });
  const loaded = () => server.catalog.list().flatMap((m) => (m.loaded ? [m.name] : []));
  expect(loaded()).toEqual([]);
  for (const [model, after] of [
    ["a", ["a"]],
    ["b", ["a", "b"]],
    ["a", ["a", "b"]],
    ["c", ["a", "c"]], // b was used longest ago
  ] as const) {
    expect((await post(url, "/v1/chat/completions", { ...BODY, model })).status).toBe(200);
    expect(loaded()).toEqual(after);
  }
  const busy = await Promise.all(["a", "c"].map((name) => server.catalog.use(name)));
  expect((await post(url, "/v1/chat/completions", { ...BODY, model: "b" })).status).toBe(429);
  for (const { release } of busy) release();
  expect((await post(url, "/v1/chat/completions", { ...BODY, model: "b" })).status).toBe(200);
});

test("a model that cannot be loaded gives 503, with the reason only in the log, and the next request tries again", async () => {
  const lines: string[] = [];
  const models = [{ name: "gone", path: "/no/such/folder", preload: false }];
  const { url } = await startHere({ models }, (line) => lines.push(line));
  for (let i = 0; i < 2; i++) {
    const response = await post(url, "/v1/chat/completions", { ...BODY, model: "gone" });
    expect(response.status).toBe(503);
    expect(await response.text()).not.toContain("/no/such/folder");
  }
  expect(lines.join("")).toContain("/no/such/folder: no such folder");
});

test("a client that leaves is charged for what was computed", async () => {
  const file = join(temporary(), "keys.json");
  const { secret, key } = await createKey(file, { ...FREE, tokensPerDay: 100_000 });
  const running = await startHere({ keys: file });
  const leave = new AbortController();
  const response = await fetch(`${running.url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${secret}` },
    body: JSON.stringify({ ...BODY, max_tokens: 3000, stream: true, logit_bias: { "2": -100, "5": -100 } }),
    signal: leave.signal,
  });
  const reader = (response.body as ReadableStream<Uint8Array>).getReader();
  for (let i = 0; i < 4; i++) await reader.read();
  leave.abort();
  const engine = await engineOf(running);
  await expect.poll(() => engine.stats().running).toBe(0);
  await running.server.stop();
  expect(JSON.parse(readFileSync(`${file}.usage`, "utf8")).tokens[key.id]).toBeGreaterThan(8);
});

test("without keys, a foreign host name that points here is rejected", async () => {
  const { server } = await startHere();
  const status = async (host: string) => (await server.app.inject({ url: "/v1/models", headers: { host } })).statusCode;
  expect(await status("evil.example")).toBe(400);
  for (const host of ["localhost", "localhost:8080", "127.0.0.1:80", "[::1]:8080"]) expect(await status(host)).toBe(200);
});
