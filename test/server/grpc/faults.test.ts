/** Clients that violate the gRPC service's .proto: it answers or disconnects, leaks nothing, and keeps running. */

import { once } from "node:events";
import { type ClientHttp2Stream, connect, type IncomingHttpHeaders } from "node:http2";
import { connect as netConnect } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { Client, credentials, Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import fc from "fast-check";
import { expect, onTestFinished, test } from "vitest";
import { engineOf } from "../start.ts";
import { failure, reflected, startGrpcHere, whole } from "./reflected.ts";

const SERVICE = "/mixtape.v1.Mixtape";
const HELLO = { model: "default", messages: [{ role: "ROLE_USER", content: "Hello" }] };
const ENDLESS = { sampling: { logit_bias: { 2: -100, 5: -100 } }, max_tokens: 4000 };

/** The bytes of messages as the .proto describes them. */
const METHODS = (() => {
  const definition = loadSync(fileURLToPath(new URL("../../../proto/mixtape/v1/mixtape.proto", import.meta.url)), {
    keepCase: true,
    oneofs: true,
  });
  return definition["mixtape.v1.Mixtape"] as unknown as Record<
    string,
    { requestSerialize(value: object): Buffer; responseStream: boolean }
  >;
})();

/** A message as gRPC frames it. */
function framed(message: Uint8Array, compressed = 0): Buffer {
  const head = Buffer.alloc(5);
  head.writeUInt8(compressed, 0);
  head.writeUInt32BE(message.length, 1);
  return Buffer.concat([head, message]);
}

/** HTTP/2 without a gRPC library. */
function http2(address: string) {
  const socket = netConnect({ host: "127.0.0.1", port: Number(address.split(":").at(-1)) });
  const session = connect(`http://${address}`, { createConnection: () => socket, maxOutstandingPings: 1000 });
  session.on("error", () => {});
  onTestFinished(() => session.destroy());
  const open = (path: string, headers: object = {}) => {
    const stream = session.request(
      { ":method": "POST", ":path": path, "content-type": "application/grpc", te: "trailers", ...headers },
      { endStream: false },
    );
    stream.on("error", () => {});
    return stream;
  };
  return { socket, session, open };
}

/** The grpc-status of a call, from its head or its trailers; null where the stream was reset. */
function outcome(stream: ClientHttp2Stream): Promise<string | null> {
  return new Promise((resolve) => {
    let found: string | null = null;
    const look = (headers: IncomingHttpHeaders) => {
      found ??= (headers["grpc-status"] as string | undefined) ?? null;
      if (found !== null) resolve(found);
    };
    stream
      .on("response", look)
      .on("trailers", look)
      .on("close", () => resolve(found));
    stream.resume();
  });
}

async function nothingLeft({ server }: Pick<Awaited<ReturnType<typeof startGrpcHere>>, "server">) {
  const engine = await engineOf({ server });
  await expect.poll(() => [server.gate.admission.running, engine.stats().running, engine.stats().waiting]).toEqual([0, 0, 0]);
  expect(engine.cache.free).toBe(engine.cache.count);
}

test("three thousand fuzzed messages: never INTERNAL, and the service keeps running", async () => {
  const running = await startGrpcHere({ maxTokens: 3 });
  const right: Record<string, object> = {
    Chat: {
      ...HELLO,
      tools: [{ name: "a", parameters: '{"type": "object"}' }],
      options: { max_tokens: 2, logprobs: 1, routing: true, stop: ["x"], sampling: { temperature: 1, seed: 5, logit_bias: { 7: 1 } } },
      template_variables: "{}",
    },
    Generate: { model: "default", tokens: { ids: [5, 6, 7] }, options: { response_format: { json_schema: '{"type": "object"}' } } },
    Tokenize: { model: "default", text: "Hotel in 伦敦" },
    Detokenize: { model: "default", tokens: [5, 6, 7] },
    GetModel: { model: "default" },
    Embed: { model: "default", inputs: [{ text: "Hello" }, { tokens: { ids: [5, 6] } }] },
    Route: { model: "default", conversation: { messages: HELLO.messages } },
    ListModels: {},
  };
  const bytes = fc.uint8Array({ maxLength: 40 });
  const message = fc.constantFrom(...Object.keys(right)).chain((method) => {
    const good = METHODS[method].requestSerialize(right[method]);
    const changed = fc.array(fc.tuple(fc.nat(Math.max(0, good.length - 1)), fc.nat(255)), { minLength: 1, maxLength: 4 }).map((changes) => {
      const copy = Buffer.from(good);
      for (const [at, value] of changes) copy[at] = value;
      return copy;
    });
    const cut = fc.nat(good.length).map((length) => good.subarray(0, length));
    const longer = bytes.map((more) => Buffer.concat([good, more]));
    return fc.tuple(fc.constant(method), fc.oneof({ weight: 4, arbitrary: changed }, cut, longer, bytes));
  });
  const client = new Client(running.address, credentials.createInsecure());
  onTestFinished(() => client.close());
  const [write, read] = [(value: Uint8Array) => Buffer.from(value), (value: Buffer) => value];
  const send = (method: string, body: Uint8Array) =>
    new Promise<status>((resolve) => {
      const path = `${SERVICE}/${method}`;
      if (!METHODS[method].responseStream)
        client.makeUnaryRequest(path, write, read, body, new Metadata(), {}, (error) => resolve(error?.code ?? status.OK));
      else
        client
          .makeServerStreamRequest(path, write, read, body)
          .on("data", () => {})
          .on("error", (error: ServiceError) => resolve(error.code))
          .on("end", () => resolve(status.OK));
    });
  const codes = new Map<status, number>();
  const bad: unknown[] = [];
  const samples = fc.sample(message, { numRuns: 3000, seed: 1 });
  for (let i = 0; i < samples.length; i += 100)
    await Promise.all(
      samples.slice(i, i + 100).map(async ([method, body]) => {
        const code = await send(method, body);
        codes.set(code, (codes.get(code) ?? 0) + 1);
        if (![status.OK, status.INVALID_ARGUMENT, status.NOT_FOUND].includes(code))
          bad.push([method, status[code], Buffer.from(body).toString("hex")]);
      }),
    );
  expect(bad).toEqual([]);
  for (const code of [status.OK, status.INVALID_ARGUMENT, status.NOT_FOUND]) expect(codes.get(code)).toBeGreaterThan(100);
  await nothingLeft(running);
}, 180_000);

test("malformed messages to the health and reflection services, an unknown method, an unknown content type", async () => {
  const { address, client } = await startGrpcHere();
  const { open } = http2(address);
  const ask = (path: string, body: Uint8Array, headers: object = {}) => {
    const stream = open(path, headers);
    stream.end(body);
    return outcome(stream);
  };
  const broken = framed(Buffer.from([0x0a, 0xff]));
  expect(await ask("/grpc.health.v1.Health/Check", broken)).toBe(String(status.INVALID_ARGUMENT));
  expect(await ask("/grpc.health.v1.Health/Watch", broken)).toBe(String(status.INVALID_ARGUMENT));
  expect(await ask("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", broken)).toBe(String(status.OK)); // the answer says what is wrong
  expect(await ask(`${SERVICE}/Nothing`, broken)).toBe(String(status.UNIMPLEMENTED));
  expect(await ask(`${SERVICE}/Chat`, Buffer.alloc(0))).toBe(String(status.UNIMPLEMENTED)); // no message at all
  expect(await ask("/\u00e9\u0001%zz", broken)).toBeOneOf([String(status.UNIMPLEMENTED), null]);
  expect(await ask(`${SERVICE}/Chat`, framed(gzipSync(Buffer.alloc(64 * 2 ** 20)), 1), { "grpc-encoding": "gzip" })).toBe(
    String(status.RESOURCE_EXHAUSTED),
  );
  const web = open(`${SERVICE}/Chat`, { "content-type": "text/html" });
  web.end();
  expect(await new Promise((resolve) => web.on("response", (headers) => resolve(headers[":status"])))).toBe(415);
  expect((await failure(whole(client.Chat({ ...HELLO, model: "\ud800".repeat(900) })))).code).toBe(status.NOT_FOUND);
  expect((await whole(client.Chat({ ...HELLO, options: { max_tokens: 2 } }))).end).toBeDefined();
});

test("messages that are too large, requests that do not arrive, connections beyond the limit", async () => {
  const running = await startGrpcHere({ maxBodyBytes: 64 * 1024, requestTimeoutSeconds: 0.3, maxConnections: 3 });
  const { address, client } = running;
  const large = { ...HELLO, messages: [{ role: "ROLE_USER", content: "x".repeat(100_000) }] };
  expect((await failure(whole(client.Chat(large)))).code).toBe(status.RESOURCE_EXHAUSTED);
  const { open } = http2(address);
  const half = open(`${SERVICE}/Chat`);
  half.write(framed(METHODS["Chat"].requestSerialize(HELLO)).subarray(0, 10));
  expect(await outcome(half)).toBe(String(status.DEADLINE_EXCEEDED));
  const more = Array.from({ length: 6 }, () => connect(`http://${address}`).on("error", () => {}));
  await expect.poll(() => more.filter(({ destroyed }) => destroyed).length).toBeGreaterThanOrEqual(3);
  for (const session of more) session.destroy();
  await nothingLeft(running);
}, 25_000); // less than the 30 s that a request has by default

test("a call whose deadline passes before it has fully arrived computes nothing", async () => {
  const running = await startGrpcHere();
  const { open } = http2(running.address);
  const stream = open(`${SERVICE}/Generate`, { "grpc-timeout": "50m" });
  stream.write(framed(METHODS["Generate"].requestSerialize({ model: "default", text: "Hello", options: { max_tokens: 4000 } })));
  await sleep(200);
  stream.end();
  expect(await outcome(stream)).toBeOneOf([String(status.DEADLINE_EXCEEDED), null]);
  await sleep(100);
  const engine = await engineOf(running);
  expect([running.server.gate.admission.running, engine.stats().generatedTokens]).toEqual([0, 0]);
});

test("a client that reads nothing is disconnected, and little is buffered for it", async () => {
  const lines: string[] = [];
  const running = await startGrpcHere({ stallTimeoutSeconds: 0.5 }, (line) => lines.push(line));
  const { open } = http2(running.address);
  const stream = open(`${SERVICE}/Generate`);
  stream.pause();
  stream.end(framed(METHODS["Generate"].requestSerialize({ model: "default", text: "Hello", options: { ...ENDLESS, routing: true } })));
  await expect.poll(() => running.server.gate.admission.running).toBe(1);
  await expect.poll(() => lines.filter((line) => line.includes('"outcome":')).join(""), { timeout: 60_000 }).toMatch(/"outcome":"timeout"/);
  await nothingLeft(running); // though the client is still there
  let bytes = 0;
  stream.on("data", (piece) => (bytes += piece.length));
  expect(await outcome(stream)).toBe(String(status.DEADLINE_EXCEEDED));
  expect(bytes).toBeGreaterThan(10_000);
  expect(bytes).toBeLessThan(200_000); // of about 800,000
}, 90_000);

test("the server stops reading requests whose responses are not read", async () => {
  const { address } = await startGrpcHere();
  const { open } = http2(address);
  const stream = open("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
  stream.pause();
  const question = framed(Buffer.from([0x3a, 0x01, 0x2a])); // list_services: "*"
  stream.write(Buffer.concat(new Array(500_000).fill(question)));
  await sleep(1000);
  expect(stream.bufferSize).toBeGreaterThan(2 ** 20); // most of it is still here
  stream.destroy();
});

test("a flood of pings closes its connection, a few do not, and other connections are not disturbed", async () => {
  const lines: string[] = [];
  const { address, client } = await startGrpcHere({}, (line) => lines.push(line));
  const { session } = http2(address);
  await once(session, "connect");
  const ping = () => new Promise<Error | null>((resolve) => void session.ping((error) => resolve(error)));
  const goneAway = new Promise<number>((resolve) => session.on("goaway", resolve));
  for (let i = 0; i < 50; i++) expect(await ping()).toBeNull();
  const flood = Array.from({ length: 100 }, ping);
  expect(await goneAway).toBe(11); // ENHANCE_YOUR_CALM
  await expect.poll(() => session.destroyed).toBe(true);
  await Promise.all(flood);
  expect(lines.join("")).toMatch(/too many pings/);
  expect((await whole(client.Chat({ ...HELLO, options: { max_tokens: 2 } }))).end).toBeDefined();
});

test("two hundred connections that break mid-answer leave nothing behind", async () => {
  const running = await startGrpcHere();
  const vanish = async () => {
    const { socket, open } = http2(running.address);
    const stream = open(`${SERVICE}/Generate`);
    stream.end(
      framed(
        METHODS["Generate"].requestSerialize({
          model: "default",
          text: "Hello",
          options: ENDLESS,
        }),
      ),
    );
    await new Promise((resolve) => stream.once("data", resolve));
    socket.destroy();
  };
  for (let i = 0; i < 10; i++) await Promise.all(Array.from({ length: 20 }, vanish));
  await nothingLeft(running);
  expect((await whole((await reflected(running.address)).Chat({ ...HELLO, options: { max_tokens: 2 } }))).end).toBeDefined();
}, 120_000);
