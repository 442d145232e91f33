/** The gRPC service with a client that knows it by reflection alone, and what goes wrong on the way. */

import { createRequire } from "node:module";
import { join } from "node:path";
import {
  type Client,
  credentials,
  type GrpcObject,
  loadPackageDefinition,
  Metadata,
  type ServiceClientConstructor,
  status,
} from "@grpc/grpc-js";
import { loadFileDescriptorSetFromObject, loadSync } from "@grpc/proto-loader";
import { afterAll, beforeAll, expect, test } from "vitest";
import { checkServeConfig } from "../../src/server/config.ts";
import { createKey } from "../../src/server/keys.ts";
import { createServer, type Server } from "../../src/server/server.ts";
import { temporary } from "../cli/run.ts";
import { post } from "./start.ts";

type Call = AsyncIterable<Record<string, unknown>> & { cancel(): void };
type Mixtape = Client & {
  Generate(request: object, metadata?: Metadata, options?: object): Call;
  Chat(request: object, metadata?: Metadata, options?: object): Call;
  GetModel(request: object, metadata: Metadata, done: (error: unknown, reply: object) => void): void;
  Tokenize(request: object, metadata: Metadata, done: (error: unknown, reply: { tokens: number[] }) => void): void;
};

async function serve(config: object = {}): Promise<{ server: Server; url: string; address: string }> {
  const models = [{ name: "default", path: "default", kvCacheTokens: 32768 }];
  const server = await createServer(
    checkServeConfig({ port: 0, grpcPort: 0, logLevel: "silent", drainTimeoutSeconds: 2, models, ...config }),
  );
  const { url, grpcPort } = await server.start();
  return { server, url, address: `127.0.0.1:${grpcPort}` };
}

/** A client built from what the server says of itself. */
async function reflected(address: string): Promise<Mixtape> {
  const proto = join(createRequire(import.meta.url).resolve("@grpc/reflection"), "../../proto/grpc/reflection/v1/reflection.proto");
  const { grpc } = loadPackageDefinition(loadSync(proto, { keepCase: true })) as { grpc: GrpcObject };
  const Reflection = ((grpc["reflection"] as GrpcObject)["v1"] as GrpcObject)["ServerReflection"] as ServiceClientConstructor;
  const client = new Reflection(address, credentials.createInsecure()) as unknown as Client & {
    ServerReflectionInfo(): NodeJS.EventEmitter & { write(r: object): void; end(): void };
  };
  const call = client.ServerReflectionInfo();
  const reply = await new Promise<{ file_descriptor_response: { file_descriptor_proto: Buffer[] } }>((resolve, reject) => {
    call.on("data", resolve).on("error", reject);
    call.write({ host: "", file_containing_symbol: "mixtape.v1.Mixtape" });
  });
  call.end();
  client.close();
  // Of the same copy of protobufjs that the loader has.
  const ofLoader = createRequire(createRequire(import.meta.url).resolve("@grpc/proto-loader"));
  const { FileDescriptorProto: decoder } = ofLoader("protobufjs/ext/descriptor") as { FileDescriptorProto: { decode(b: Buffer): unknown } };
  const file = reply.file_descriptor_response.file_descriptor_proto.map((bytes) => decoder.decode(bytes));
  const loaded = loadPackageDefinition(
    loadFileDescriptorSetFromObject({ file }, { keepCase: true, longs: String, enums: String, oneofs: true, defaults: true }),
  );
  const Service = ((loaded["mixtape"] as GrpcObject)["v1"] as GrpcObject)["Mixtape"] as ServiceClientConstructor;
  return new Service(address, credentials.createInsecure()) as unknown as Mixtape;
}

async function all(
  call: Call,
): Promise<{ text: string; end: { reason: string; usage: Record<string, number> } | null; events: Record<string, unknown>[] }> {
  const events: Record<string, unknown>[] = [];
  for await (const event of call) events.push(event);
  const text = events.flatMap((e) => (e["text"] ? [(e["text"] as { text: string }).text] : [])).join("");
  return { text, end: (events.at(-1)?.["end"] as never) ?? null, events };
}

const HOTEL = { model: "default", messages: [{ role: "user", content: "Find me a hotel in London." }] };
const greedy = (max_tokens: number) => ({ sampling: { temperature: 0 }, max_tokens });

let running: Awaited<ReturnType<typeof serve>>;
let client: Mixtape;
beforeAll(async () => {
  running = await serve();
  client = await reflected(running.address);
});
afterAll(async () => {
  client.close();
  await running.server.stop();
});
const engine = async () => {
  const { model, release } = await running.server.catalog.use("default");
  release();
  return model.engine;
};

test("a conversation is answered as over HTTP", async () => {
  const { text, end } = await all(client.Chat({ ...HOTEL, options: greedy(20) }));
  const http = (await (await post(running.url, "/v1/chat/completions", { ...HOTEL, temperature: 0, max_tokens: 20 })).json()) as {
    choices: { message: { content: string } }[];
    usage: { completion_tokens: number };
  };
  expect(text).toBe(http.choices[0].message.content);
  expect(end?.usage["completion_tokens"]).toBe(http.usage.completion_tokens);
});

test("text and ids, log-probabilities, experts, a schema, a tool", async () => {
  const tokens = await new Promise<number[]>((resolve, reject) => {
    client.Tokenize({ model: "default", text: "Hello" }, new Metadata(), (error, reply) => (error ? reject(error) : resolve(reply.tokens)));
  });
  const options = { ...greedy(5), logprobs: 2, routing: true };
  const [byText, byIds] = await Promise.all([
    all(client.Generate({ model: "default", text: "Hello", options })),
    all(client.Generate({ model: "default", tokens: { ids: tokens }, options })),
  ]);
  expect(byIds.text).toBe(byText.text);
  expect(byText.events.filter((e) => e["logprob"])).toHaveLength(5);
  const routing = byText.events.find((e) => e["routing"])?.["routing"] as { layers: { experts: number[] }[] };
  expect(routing.layers.map((l) => l.experts.length)).toEqual([4, 4, 4, 4, 4, 4, 4]);
  const schema = JSON.stringify({
    type: "object",
    properties: { yes: { type: "boolean" } },
    required: ["yes"],
    additionalProperties: false,
  });
  expect(typeof JSON.parse((await all(client.Chat({ ...HOTEL, options: { max_tokens: 50, json_schema: schema } }))).text).yes).toBe(
    "boolean",
  );
  const tools = [
    {
      name: "book",
      parameters: JSON.stringify({ type: "object", properties: { n: { enum: [1, 2] } }, required: ["n"], additionalProperties: false }),
    },
  ];
  const called = await all(client.Chat({ ...HOTEL, tools, tool_choice: "book", options: { max_tokens: 100 } }));
  expect(called.end?.reason).toBe("TOOL_CALLS");
  const calls = called.events.flatMap((e) => (e["tool_call"] ? [e["tool_call"] as { name: string; arguments: string }] : []));
  expect(calls[0].name).toBe("book");
  expect([1, 2]).toContain(JSON.parse(calls.map((c) => c.arguments).join("")).n);
});

test("what a model is", async () => {
  const info = await new Promise((resolve, reject) => {
    client.GetModel({ model: "default" }, new Metadata(), (error, reply) => (error ? reject(error) : resolve(reply)));
  });
  expect(info).toMatchObject({
    architecture: "Ernie4_5_MoeForCausalLM",
    context_length: 4096,
    layers: 8,
    experts: 32,
    experts_per_token: 4,
  });
});

test("a deadline, and a client that cancels, free what the answer held", async () => {
  const endless = {
    ...HOTEL,
    options: { max_tokens: 4000, sampling: { temperature: 1, logit_bias: [2, 5].map((key) => ({ key, value: -100 })) } },
  };
  await expect(all(client.Chat(endless, new Metadata(), { deadline: Date.now() + 300 }))).rejects.toMatchObject({
    code: status.DEADLINE_EXCEEDED,
  });
  const call = client.Chat(endless);
  await expect(
    (async () => {
      let count = 0;
      for await (const _ of call) if (++count === 3) call.cancel();
    })(),
  ).rejects.toMatchObject({ code: status.CANCELLED });
  const e = await engine();
  await expect.poll(() => e.stats().running).toBe(0);
  expect(e.cache.free).toBe(e.cache.count);
});

test("what makes no sense is INVALID_ARGUMENT and names the field; what is not there NOT_FOUND", async () => {
  const refused = async (request: object) => {
    const error = await all(client.Chat(request)).then(
      () => null,
      (e: { code: number; metadata: Metadata }) => e,
    );
    return [error?.code, error?.metadata.get("mixtape-field")[0]];
  };
  expect(await refused({ ...HOTEL, options: { sampling: { temperature: 9 } } })).toEqual([status.INVALID_ARGUMENT, "temperature"]);
  expect(await refused({ model: "default", messages: [] })).toEqual([status.INVALID_ARGUMENT, "messages"]);
  expect(await refused({ ...HOTEL, options: { json_schema: "{" } })).toEqual([status.INVALID_ARGUMENT, "options.json_schema"]);
  expect(await refused({ ...HOTEL, model: "nope" })).toEqual([status.NOT_FOUND, "model"]);
});

test("200 streams at once, each as it is alone", async () => {
  const prompts = Array.from({ length: 200 }, (_, i) => ({
    model: "default",
    messages: [{ role: "user", content: `Hotel number ${i % 10}` }],
    options: greedy(8),
  }));
  const alone = await Promise.all(prompts.slice(0, 10).map((p) => all(client.Chat(p))));
  const together = await Promise.all(prompts.map((p) => all(client.Chat(p))));
  together.forEach((t, i) => {
    expect(t.text).toBe(alone[i % 10].text);
  });
}, 60_000);

test("keys, room, and health", async () => {
  const file = join(temporary(), "keys.json");
  const { secret } = await createKey(file, { name: "a", expires: null, models: null, requestsPerMinute: 1, tokensPerDay: null });
  const guarded = await serve({ keys: file });
  const other = await reflected(guarded.address);
  await expect(all(other.Chat({ ...HOTEL, options: greedy(2) }))).rejects.toMatchObject({ code: status.UNAUTHENTICATED });
  const mine = new Metadata();
  mine.set("authorization", `Bearer ${secret}`);
  expect((await all(other.Chat({ ...HOTEL, options: greedy(2) }, mine))).end?.reason).toBeDefined();
  const over = await all(other.Chat({ ...HOTEL, options: greedy(2) }, mine)).catch((e: { code: number; metadata: Metadata }) => e);
  expect(over).toMatchObject({ code: status.RESOURCE_EXHAUSTED });
  expect(Number((over as { metadata: Metadata }).metadata.get("retry-after")[0])).toBeGreaterThan(1);

  const { service } = await import("grpc-health-check");
  const { makeGenericClientConstructor } = await import("@grpc/grpc-js");
  const Health = makeGenericClientConstructor(service, "Health");
  const health = new Health(guarded.address, credentials.createInsecure()) as unknown as {
    watch(r: object): AsyncIterable<{ status: string }>;
    close(): void;
  };
  const seen: string[] = [];
  const watching = (async () => {
    for await (const { status: now } of health.watch({ service: "mixtape.v1.Mixtape" })) seen.push(now);
  })().catch(() => {});
  await expect.poll(() => seen).toEqual(["SERVING"]);
  const stopping = guarded.server.stop();
  await expect.poll(() => seen, { timeout: 3000 }).toEqual(["SERVING", "NOT_SERVING"]);
  other.close();
  health.close();
  await Promise.all([stopping, watching]);
}, 30_000);
