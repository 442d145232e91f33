/** A gRPC client built from the server's reflection service: it reads no .proto. */
import { createRequire } from "node:module";
import { join } from "node:path";
import {
  type ChannelCredentials,
  type Client,
  credentials,
  type GrpcObject,
  loadPackageDefinition,
  Metadata,
  type ServiceClientConstructor,
  type ServiceError,
} from "@grpc/grpc-js";
import { loadFileDescriptorSetFromObject, loadSync } from "@grpc/proto-loader";
import { onTestFinished } from "vitest";
import { startHere } from "../start.ts";

type Event = Readonly<Record<string, unknown>>;
export type Stream = AsyncIterable<Event> & NodeJS.EventEmitter & { cancel(): void; pause(): void; resume(): void };
type Streaming = (request: object, metadata?: Metadata, options?: object) => Stream;
type Unary = (request: object, metadata: Metadata, done: (error: ServiceError | null, reply: Event) => void) => void;

export type Mixtape = Client &
  Record<"Generate" | "Chat" | "Route", Streaming> &
  Record<"Tokenize" | "Detokenize" | "ListModels" | "GetModel" | "Embed", Unary>;

const LOADER = { keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true };

/** Asks the reflection service `version` ("v1", "v1alpha"). */
export async function reflect(address: string, question: object, version = "v1", creds = credentials.createInsecure()): Promise<Event> {
  const home = createRequire(import.meta.url).resolve("@grpc/reflection");
  const { grpc } = loadPackageDefinition(loadSync(join(home, `../../proto/grpc/reflection/${version}/reflection.proto`), LOADER)) as {
    grpc: { reflection: Record<string, Record<string, ServiceClientConstructor>> };
  };
  const client = new grpc.reflection[version]["ServerReflection"](address, creds) as unknown as Client & {
    ServerReflectionInfo(): NodeJS.EventEmitter & { write(question: object): void; end(): void };
  };
  const call = client.ServerReflectionInfo();
  try {
    return await new Promise<Event>((resolve, reject) => {
      call.on("data", resolve).on("error", reject);
      call.write(question);
    });
  } finally {
    call.end();
    client.close();
  }
}

/** The client. Closed with the test. */
export async function reflected(
  address: string,
  creds: ChannelCredentials = credentials.createInsecure(),
  options: object = {},
): Promise<Mixtape> {
  const reply = (await reflect(address, { file_containing_symbol: "mixtape.v1.Mixtape" }, "v1", creds)) as {
    file_descriptor_response: { file_descriptor_proto: Buffer[] };
  };
  // Of the same copy of protobufjs that the loader has.
  const ofLoader = createRequire(createRequire(import.meta.url).resolve("@grpc/proto-loader"));
  const { FileDescriptorProto } = ofLoader("protobufjs/ext/descriptor") as { FileDescriptorProto: { decode(bytes: Buffer): unknown } };
  const file = reply.file_descriptor_response.file_descriptor_proto.map((bytes) => FileDescriptorProto.decode(bytes));
  const loaded = loadPackageDefinition(loadFileDescriptorSetFromObject({ file }, LOADER)) as { mixtape: { v1: GrpcObject } };
  const client = new (loaded.mixtape.v1["Mixtape"] as ServiceClientConstructor)(address, creds, options) as unknown as Mixtape;
  onTestFinished(() => client.close());
  return client;
}

/** A server with gRPC that ends with the test, and a client of it. */
export async function startGrpcHere(config: object = {}, log?: (line: string) => void) {
  const running = await startHere({ grpcPort: 0, ...config }, log);
  const address = `127.0.0.1:${running.grpcPort}`;
  return { ...running, address, client: await reflected(address) };
}

/** All of an answer. Rejects with the status of a call that fails. */
export async function whole(stream: Stream) {
  const events: Event[] = [];
  for await (const event of stream) events.push(event);
  const of = <T>(kind: string) => events.flatMap((event) => (event[kind] ? [event[kind] as T] : []));
  const [end] = of<{ reason: string; usage: Record<string, number> }>("end");
  return {
    events,
    text: of<{ text: string }>("text")
      .map((piece) => piece.text)
      .join(""),
    logprobs: of<{ token: { id: number; logprob: number }; top: { id: number; logprob: number }[] }>("logprob"),
    routing: of<{ id: number; layers: { layer: number; experts: number[]; weights: number[] }[] }>("routing"),
    calls: of<{ id: string; name: string; arguments: string }>("tool_call"),
    end,
  };
}

export function ask(
  client: Mixtape,
  method: "Tokenize" | "Detokenize" | "ListModels" | "GetModel" | "Embed",
  request: object,
  metadata = new Metadata(),
) {
  return new Promise<Event>((resolve, reject) => {
    client[method](request, metadata, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

/** How a call fails. */
export async function failure(call: Promise<unknown>): Promise<{ code: number; details: string; of(name: string): unknown }> {
  try {
    await call;
  } catch (error) {
    const { code, details, metadata } = error as ServiceError;
    return { code, details, of: (name) => metadata.get(name)[0] };
  }
  throw new Error("the call went well");
}

export function bearer(secret: string): Metadata {
  const metadata = new Metadata();
  metadata.set("authorization", `Bearer ${secret}`);
  return metadata;
}
