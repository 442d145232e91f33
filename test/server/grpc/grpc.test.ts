/** The gRPC service as clients see it: the same answers as over HTTP, and work that stops when clients stop it. */
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Client, credentials, Metadata, makeGenericClientConstructor, status } from "@grpc/grpc-js";
import { service as healthService } from "grpc-health-check";
import { expect, test } from "vitest";
import { GREEDY } from "../../../src/engine/sampling.ts";
import { temporary } from "../../cli/run.ts";
import { keyFile } from "../harness.ts";
import { engineOf, post, startHere } from "../start.ts";
import { ask, bearer, failure, reflect, reflected, startGrpcHere, whole } from "./reflected.ts";

const HOTEL = { model: "default", messages: [{ role: "ROLE_USER", content: "Find me a hotel in London." }] };
const greedy = (max_tokens: number) => ({ sampling: { temperature: 0 }, max_tokens });
/** Clients made of reflected descriptors see maps as what they are on the wire. */
const bias = (of: Record<number, number>) => Object.entries(of).map(([key, value]) => ({ key, value }));
/** Never ends by itself: both end tokens are forbidden. */
const ENDLESS = { ...HOTEL, options: { max_tokens: 4000, sampling: { temperature: 1, logit_bias: bias({ 2: -100, 5: -100 }) } } };

test("reflection names the services, in both versions, and is enough to call them", async () => {
  const { address, client } = await startGrpcHere();
  for (const version of ["v1", "v1alpha"]) {
    const { list_services_response } = (await reflect(address, { list_services: "*" }, version)) as {
      list_services_response: { service: { name: string }[] };
    };
    expect(list_services_response.service.map(({ name }) => name)).toEqual(["mixtape.v1.Mixtape", "grpc.health.v1.Health"]);
  }
  const { text, end } = await whole(client.Chat({ ...HOTEL, options: greedy(20) }));
  expect(text.length).toBeGreaterThan(20);
  expect(end.usage["completion_tokens"]).toBeGreaterThan(5);
});

test("a conversation is answered as over HTTP, a text is continued as by the engine alone", async () => {
  const running = await startGrpcHere();
  const { client, url } = running;
  const { text, end } = await whole(client.Chat({ ...HOTEL, options: greedy(24) }));
  const messages = [{ role: "user", content: HOTEL.messages[0].content }];
  const http = (await (await post(url, "/v1/chat/completions", { model: "default", messages, temperature: 0, max_tokens: 24 })).json()) as {
    choices: { message: { content: string } }[];
    usage: { prompt_tokens: number; completion_tokens: number };
  };
  expect(text).toBe(http.choices[0].message.content);
  expect(end.usage).toMatchObject({
    prompt_tokens: http.usage.prompt_tokens,
    completion_tokens: http.usage.completion_tokens,
  });

  const { model, release } = await running.server.catalog.use("default");
  const tokens = model.tokenizer.encode("The hotel");
  const alone: { id: number; logprob: number }[] = [];
  for await (const token of model.engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 12 })) alone.push(token);
  release();
  const options = { ...greedy(12), logprobs: 2, routing: true };
  const [byText, byIds] = await Promise.all([
    whole(client.Generate({ model: "default", text: "The hotel", options })),
    whole(client.Generate({ model: "default", tokens: { ids: tokens }, options })),
  ]);
  expect(byText.text).toBe(model.tokenizer.decode(alone.map(({ id }) => id)));
  expect(byIds.text).toBe(byText.text);
  expect(byText.logprobs.map(({ token }) => token.id)).toEqual(alone.map(({ id }) => id));
  for (const [i, { token, top }] of byText.logprobs.entries()) {
    expect(token.logprob).toBeCloseTo(alone[i].logprob, 4);
    expect(top).toHaveLength(2);
    expect(top[0].id).toBe(token.id); // greedy: it is the likeliest
    expect(top[0].logprob).toBeCloseTo(token.logprob, 4);
  }
  expect(byText.routing).toHaveLength(12);
  const chosen = model.config.moe?.chosen;
  for (const { layers } of byText.routing)
    for (const { experts, weights } of layers) {
      expect(experts).toHaveLength(chosen as number);
      expect(weights.reduce((a, b) => a + b)).toBeCloseTo(1, 4);
    }
});

test("formats, tools, and fields set to zero", async () => {
  const { client } = await startGrpcHere();
  const yes = { type: "object", properties: { yes: { type: "boolean" } }, required: ["yes"], additionalProperties: false };
  const formatted = await whole(
    client.Chat({ ...HOTEL, options: { max_tokens: 60, response_format: { json_schema: JSON.stringify(yes) } } }),
  );
  expect(typeof JSON.parse(formatted.text).yes).toBe("boolean");
  const generated = await whole(
    client.Generate({
      model: "default",
      text: "Yes or no?",
      options: { max_tokens: 60, response_format: { json_schema: JSON.stringify(yes) } },
    }),
  );
  expect(typeof JSON.parse(generated.text).yes).toBe("boolean");
  const n = { type: "object", properties: { n: { enum: [1, 2] } }, required: ["n"], additionalProperties: false };
  const called = await whole(
    client.Chat({
      ...HOTEL,
      tools: [{ name: "book", parameters: JSON.stringify(n) }],
      tool_choice: { tool: "book" },
      options: { max_tokens: 100 },
    }),
  );
  expect(called.end.reason).toBe("FINISH_REASON_TOOL_CALLS");
  expect(called.calls[0].name).toBe("book");
  expect(called.calls[0].id).not.toBe("");
  expect([1, 2]).toContain(JSON.parse(called.calls.map((call) => call.arguments).join("")).n);
  // 0 is a value: of the model's own defaults it would sample.
  const zero = () => whole(client.Chat({ ...HOTEL, options: { max_tokens: 10, logprobs: 0, sampling: { temperature: 0 } } }));
  const [a, b] = [await zero(), await zero()];
  expect(a.text).toBe(b.text);
  expect(a.logprobs).toHaveLength(10);
  expect(a.logprobs[0].top).toEqual([]);
  const seeded = () => whole(client.Chat({ ...HOTEL, options: { max_tokens: 10, sampling: { temperature: 1, seed: 7 } } }));
  expect((await seeded()).text).toBe((await seeded()).text);
});

test("tokens, embeddings, experts and model facts are the same as over HTTP", async () => {
  const running = await startGrpcHere();
  const { client, url, server } = running;
  const http = async (path: string, body: object) =>
    (await (await post(url, path, { model: "default", ...body })).json()) as Record<string, never>;
  const text = "Hotel in 伦敦";
  const tokenized = await ask(client, "Tokenize", { model: "default", text });
  const { tokens, pieces } = await http("/tokenize", { text });
  expect(tokenized).toEqual({ tokens, pieces });
  expect(await ask(client, "Detokenize", { model: "default", tokens })).toEqual({ text });
  const embedded = (await ask(client, "Embed", { model: "default", inputs: [{ text }, { tokens: { ids: tokens } }] })) as {
    embeddings: { values: number[] }[];
    prompt_tokens: number;
  };
  const { data, usage } = await http("/v1/embeddings", { input: text });
  expect(embedded.embeddings[0].values).toEqual((data as { embedding: number[] }[])[0].embedding);
  expect(embedded.embeddings[1]).toEqual(embedded.embeddings[0]);
  expect(embedded.prompt_tokens).toBe(2 * (usage as { prompt_tokens: number }).prompt_tokens);
  const { events } = await whole(client.Route({ model: "default", text }));
  const routed = (await http("/v1/routing", { text })) as unknown as { tokens: object[]; layers: { layer: number; experts: number[][] }[] };
  expect(events.map(({ id, text }) => ({ id, text }))).toEqual(routed.tokens);
  for (const [t, event] of events.entries())
    expect((event["layers"] as { layer: number; experts: number[] }[]).map(({ layer, experts }) => ({ layer, experts }))).toEqual(
      routed.layers.map(({ layer, experts }) => ({ layer, experts: experts[t] })),
    );
  const talk = await whole(client.Route({ model: "default", conversation: { messages: HOTEL.messages } }));
  expect(talk.events.length).toBeGreaterThan(5);
  const { model, release } = await server.catalog.use("default");
  release();
  const { config } = model;
  expect(await ask(client, "GetModel", { model: "default" })).toMatchObject({
    layers: config.layers,
    experts: config.moe?.experts,
    experts_per_token: config.moe?.chosen,
    vocabulary_size: config.vocabSize,
    context_length: config.maxPositions,
    dtype: "int8",
    kv_cache_dtype: "int8",
  });
  expect(await ask(client, "ListModels", {})).toMatchObject({ models: [{ name: "default", loaded: true }] });
});

test("a deadline or a cancelled call ends the generation and frees what it held", async () => {
  const running = await startGrpcHere();
  const { client, server } = running;
  const engine = await engineOf(running);
  const freed = async () => {
    await expect.poll(() => [engine.stats().running, server.gate.admission.running]).toEqual([0, 0]);
    expect(engine.cache.free).toBe(engine.cache.count);
  };
  const late = await failure(whole(client.Chat(ENDLESS, new Metadata(), { deadline: Date.now() + 300 })));
  expect(late.code).toBe(status.DEADLINE_EXCEEDED);
  await freed();
  const call = client.Chat(ENDLESS);
  const cancelled = failure(
    (async () => {
      let pieces = 0;
      for await (const _ of call) if (++pieces === 3) call.cancel();
    })(),
  );
  expect((await cancelled).code).toBe(status.CANCELLED);
  await freed();
  const steps = engine.stats().generatedTokens;
  expect(steps).toBeLessThan(2000); // neither went on to its 4,000
});

test("invalid input is INVALID_ARGUMENT and names the field as the .proto does", async () => {
  const { client } = await startGrpcHere();
  const chat = (more: object) => failure(whole(client.Chat({ ...HOTEL, ...more })));
  const refused: [Promise<{ code: number; of(name: string): unknown }>, string][] = [
    [chat({ options: { sampling: { temperature: 9 } } }), "options.sampling.temperature"],
    [chat({ options: { sampling: { top_p: Number.NaN } } }), "options.sampling.top_p"],
    [chat({ options: { sampling: { seed: "9223372036854775807" } } }), "options.sampling.seed"],
    [chat({ options: { sampling: { logit_bias: bias({ 5: 101 }) } } }), "options.sampling.logit_bias[5]"],
    [chat({ options: { max_tokens: 0 } }), "options.max_tokens"],
    [chat({ options: { logprobs: 21 } }), "options.logprobs"],
    [chat({ options: { stop: ["a", "b", "c", "d", "e"] } }), "options.stop"],
    [chat({ options: { response_format: { json_schema: "{" } } }), "options.response_format.json_schema"],
    [chat({ options: { response_format: { json_schema: "" } } }), "options.response_format.json_schema"],
    [chat({ options: { response_format: { json_schema: "[]" } } }), "options.response_format.json_schema"],
    [
      chat({ options: { response_format: { json_schema: `${'{"not":'.repeat(200)}{}${"}".repeat(200)}` } } }),
      "options.response_format.json_schema",
    ],
    [chat({ messages: [] }), "messages"],
    [chat({ messages: [{ content: "Hello" }] }), "messages[0].role"],
    [chat({ tools: [{ name: "no spaces" }] }), "tools[0].name"],
    [chat({ tools: [{ name: "a", parameters: "nonsense" }] }), "tools[0].parameters"],
    [chat({ tools: [{ name: "a" }], tool_choice: { tool: "b" } }), "tool_choice"],
    [chat({ template_variables: "3" }), "template_variables"],
    [failure(whole(client.Generate({ model: "default" }))), "prompt"],
    [failure(whole(client.Generate({ model: "default", tokens: { ids: [4_000_000] } }))), "prompt"],
    [failure(whole(client.Route({ model: "default", conversation: {} }))), "conversation.messages"],
    [failure(ask(client, "Embed", { model: "default" })), "inputs"],
    [failure(ask(client, "Embed", { model: "default", inputs: [{ text: "a" }, {}] })), "inputs[1]"],
    [failure(ask(client, "Detokenize", { model: "default", tokens: [1, 4_000_000] })), "tokens[1]"],
  ];
  for (const [call, field] of refused) {
    const { code, of } = await call;
    expect([code, of("mixtape-code"), of("mixtape-field")]).toEqual([status.INVALID_ARGUMENT, "invalid_request", field]);
  }
  const long = await failure(whole(client.Generate({ model: "default", tokens: { ids: new Array(40_000).fill(5) } })));
  expect([long.code, long.of("mixtape-code")]).toEqual([status.INVALID_ARGUMENT, "context_length_exceeded"]);
  const unknown = await failure(whole(client.Chat({ ...HOTEL, model: "\ud800 nope" })));
  expect([unknown.code, unknown.of("mixtape-field")]).toEqual([status.NOT_FOUND, "model"]);
});

test("200 concurrent streams complete, each as it would alone", async () => {
  const { client } = await startGrpcHere({ maxInProgress: 200 });
  const request = (i: number) => ({ model: "default", text: `Hotel number ${i % 10}`, options: greedy(8) });
  const alone: Awaited<ReturnType<typeof whole>>[] = [];
  for (let i = 0; i < 10; i++) alone.push(await whole(client.Generate(request(i))));
  const together = await Promise.all(Array.from({ length: 200 }, (_, i) => whole(client.Generate(request(i)))));
  expect(together.map(({ text }) => text)).toEqual(together.map((_, i) => alone[i % 10].text));
  expect(together.every(({ end }) => end !== undefined)).toBe(true);
}, 60_000);

test("the same keys as over HTTP, checked before a message is read; rates and capacity", async () => {
  const { file, secret } = await keyFile({ requestsPerMinute: 3, models: ["default"] });
  const lines: string[] = [];
  const { client, server } = await startGrpcHere({ keys: file, maxInProgress: 1 }, (line) => lines.push(line));
  const short = { ...HOTEL, options: greedy(2) };
  for (const metadata of [new Metadata(), bearer("mxt_wrong")]) {
    const { code, of } = await failure(whole(client.Chat(short, metadata)));
    expect([code, of("mixtape-code")]).toEqual([status.UNAUTHENTICATED, "invalid_api_key"]);
  }
  const mine = bearer(secret);
  mine.set("x-request-id", "trace-1");
  const running = client.Chat(ENDLESS, mine);
  await new Promise((resolve) => running.once("data", resolve));
  const full = await failure(whole(client.Chat(short, mine)));
  expect([full.code, full.of("mixtape-code"), full.of("x-request-id")]).toEqual([status.RESOURCE_EXHAUSTED, "overloaded", "trace-1"]);
  expect(Number(full.of("retry-after"))).toBeGreaterThanOrEqual(1);
  running.on("error", () => {});
  running.cancel();
  await expect.poll(() => server.gate.admission.running).toBe(0);
  for (let i = 0; i < 2; i++) await whole(client.Chat(short, mine));
  const over = await failure(whole(client.Chat(short, mine)));
  expect([over.code, over.of("mixtape-code")]).toEqual([status.RESOURCE_EXHAUSTED, "rate_limit_exceeded"]);
  expect(Number(over.of("retry-after"))).toBeGreaterThan(1);
  expect((await failure(ask(client, "GetModel", { model: "other" }, mine))).of("mixtape-code")).toBe("rate_limit_exceeded");
  await ask(client, "ListModels", {}, mine); // takes neither room nor rate
  const answered = lines.map((line) => JSON.parse(line)).filter(({ path }) => path === "/mixtape.v1.Mixtape/Chat");
  expect(answered.map(({ outcome }) => outcome).sort()).toEqual(
    ["cancelled", "invalid_api_key", "invalid_api_key", "ok", "ok", "overloaded", "rate_limit_exceeded"].sort(),
  );
  expect(lines.join("")).not.toMatch(/hotel|mxt_/i);
  expect(await server.app.inject("/metrics").then(({ body }) => body)).toMatch(/invalid_api_key|401/);
});

test("health: SERVING once models are loaded; watchers are told of the shutdown, and running calls complete", async () => {
  const { client, server, address } = await startGrpcHere({ drainTimeoutSeconds: 10 });
  const Health = makeGenericClientConstructor(healthService, "Health");
  const health = new Health(address, credentials.createInsecure()) as unknown as Client & {
    check(request: object, done: (error: unknown, reply: { status: string }) => void): void;
    watch(request: object): AsyncIterable<{ status: string }>;
  };
  const check = (service: string) =>
    new Promise((resolve, reject) => health.check({ service }, (error, reply) => (error ? reject(error) : resolve(reply.status))));
  expect(await Promise.all(["", "mixtape.v1.Mixtape"].map(check))).toEqual(["SERVING", "SERVING"]);
  expect((await failure(check("nope"))).code).toBe(status.NOT_FOUND);
  const seen: string[] = [];
  const watching = (async () => {
    for await (const { status: now } of health.watch({ service: "mixtape.v1.Mixtape" })) seen.push(now);
  })().catch(() => {});
  await expect.poll(() => seen).toEqual(["SERVING"]);
  const answer = whole(client.Chat({ ...HOTEL, options: { ...ENDLESS.options, max_tokens: 200 } }));
  await expect.poll(() => server.gate.admission.running).toBe(1);
  const stopping = server.stop();
  await expect.poll(() => seen).toEqual(["SERVING", "NOT_SERVING"]);
  expect((await failure(whole(client.Chat({ ...HOTEL, options: greedy(2) })))).code).toBe(status.UNAVAILABLE);
  expect((await answer).end).toMatchObject({ reason: "FINISH_REASON_LENGTH", usage: { completion_tokens: 200 } });
  await stopping;
  await watching;
  health.close();
});

test("an answer that outlasts the drain is cut off, and says so", async () => {
  const { client, server } = await startGrpcHere({ drainTimeoutSeconds: 0.3 });
  const answer = failure(whole(client.Chat(ENDLESS)));
  await expect.poll(() => server.gate.admission.running).toBe(1);
  await server.stop();
  const { code, of } = await answer;
  expect([code, of("mixtape-code"), of("retry-after")]).toEqual([status.UNAVAILABLE, "not_ready", "1"]);
});

test("TLS, with a certificate that is renewed without a restart", async () => {
  const folder = temporary();
  const [cert, key] = ["cert.pem", "key.pem"].map((name) => join(folder, name));
  const certify = () =>
    execFileSync(
      "openssl",
      [
        ..."req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost".split(" "),
        ..."-addext subjectAltName=DNS:localhost,IP:127.0.0.1".split(" "),
        ...["-keyout", key, "-out", cert],
      ],
      { stdio: "ignore" },
    );
  certify();
  const { grpcPort, server } = await startHere({ grpcPort: 0, tls: { cert, key } });
  const trusting = () => credentials.createSsl(readFileSync(cert));
  const connect = (creds: ReturnType<typeof trusting>) =>
    reflected(`localhost:${grpcPort}`, creds, { "grpc.use_local_subchannel_pool": 1 });
  const before = trusting();
  const first = await connect(before);
  expect((await whole(first.Chat({ ...HOTEL, options: greedy(2) }))).end.usage["completion_tokens"]).toBe(2);
  certify();
  server.reload();
  const second = await connect(trusting());
  expect((await whole(second.Chat({ ...HOTEL, options: greedy(2) }))).end.usage["completion_tokens"]).toBe(2);
  const old = new Client(`localhost:${grpcPort}`, before, { "grpc.use_local_subchannel_pool": 1 });
  await expect(
    new Promise((resolve, reject) => old.waitForReady(Date.now() + 500, (error) => (error ? reject(error) : resolve(null)))),
  ).rejects.toThrow();
  old.close();
});
