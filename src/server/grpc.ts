/**
 * The gRPC service: proto/mixtape.proto on the same models, keys and limits as HTTP, with the standard health and reflection
 * services. Requests become the bodies of the HTTP routes, so that one schema checks both.
 */
import { fileURLToPath } from "node:url";
import {
  Metadata,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServerWritableStream,
  type ServiceDefinition,
  type sendUnaryData,
  status,
} from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { ReflectionService } from "@grpc/reflection";
import { HealthImplementation } from "grpc-health-check";
import type { z } from "zod";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import { ERRORS, ServerError } from "./errors.ts";
import { serverError } from "./replies.ts";
import { ChatBody, CompletionBody, chatRequest, completionRequest, promptsOf } from "./schemas.ts";
import type { Caller, CompletionEvent, CompletionRequest, ServedModel } from "./served.ts";
import { answer, type Services, withModel } from "./services.ts";

const PROTO = fileURLToPath(new URL("../../proto/mixtape.proto", import.meta.url));
const SERVICE = "mixtape.v1.Mixtape";

export interface GrpcDeps {
  readonly services: Services;
  /** Who has this key, and that there is room for the request. Throws ServerError. `release` when it is over. */
  admit(secret: string | null): { caller: Caller; release(): void };
  /** Told of failures that clients get no text of. */
  onError(error: unknown): void;
  readonly tls?: { readonly cert: Buffer; readonly key: Buffer };
  readonly maxMessageBytes: number;
}

export interface Grpc {
  readonly port: number;
  /** Says NOT_SERVING, lets calls under way end, then closes. */
  close(drainMs: number): Promise<void>;
}

/** What the loader makes of the messages of the .proto; every field is there, `optional` ones only where they are set. */
interface Options {
  readonly sampling?: Record<string, unknown> & { readonly logit_bias?: Record<string, number>; readonly seed?: string };
  readonly max_tokens?: number;
  readonly stop: string[];
  readonly logprobs?: number;
  readonly routing: boolean;
  readonly json_schema: string;
}
interface GenerateRequest {
  readonly model: string;
  readonly text?: string;
  readonly tokens?: { readonly ids: number[] };
  readonly options?: Options;
}
interface ChatRequest {
  readonly model: string;
  readonly messages: {
    role: string;
    content: string;
    tool_calls: { id: string; name: string; arguments: string }[];
    tool_call_id: string;
  }[];
  readonly tools: { name: string; description: string; parameters: string }[];
  readonly tool_choice: string;
  readonly options?: Options;
}

export async function startGrpc(host: string, port: number, deps: GrpcDeps): Promise<Grpc> {
  const definition = loadSync(PROTO, { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true });
  const server = new Server({
    "grpc.max_receive_message_length": deps.maxMessageBytes,
    "grpc.max_concurrent_streams": 1000,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.http2.min_ping_interval_without_data_ms": 30_000, // whoever pings more often is sent away
  } as object);
  const { services, onError } = deps;

  const unary =
    <Q extends { model: string }, R>(act: (model: ServedModel, request: Q) => R) =>
    (call: ServerUnaryCall<Q, R>, done: sendUnaryData<R>) => {
      void served(call, async (caller) =>
        done(null, await withModel(services, caller, call.request.model, async (model) => act(model, call.request))),
      ).catch((error) => done(failure(error, onError)));
    };
  const streaming =
    <Q extends { model: string }>(
      wanted: (model: ServedModel, request: Q, who: Pick<CompletionRequest, "owner" | "signal">) => CompletionRequest,
    ) =>
    (call: ServerWritableStream<Q, object>) => {
      const gone = new AbortController();
      call.on("cancelled", () => gone.abort(new Error("the client has gone"))); // also when its deadline is over
      served(call, (caller) =>
        withModel(services, caller, call.request.model, async (model) => {
          const request = wanted(model, call.request, { owner: caller.id, signal: gone.signal });
          for await (const event of answer(services, caller, model, request)) if (!call.write(wire(event))) await drained(call);
        }),
      ).then(
        () => call.end(),
        (error) => call.cancelled || call.emit("error", failure(error, onError)),
      );
    };

  async function served<T>(call: { metadata: Metadata }, act: (caller: Caller) => Promise<T>): Promise<T> {
    const [header] = call.metadata.get("authorization");
    const { caller, release } = deps.admit(/^Bearer\s+(\S+)$/i.exec(String(header ?? ""))?.[1] ?? null);
    try {
      return await act(caller);
    } finally {
      release();
    }
  }

  server.addService(definition[SERVICE] as ServiceDefinition, {
    Generate: streaming<GenerateRequest>((model, { text, tokens, options }, who) => {
      const body = parsed(CompletionBody, { model: model.name, prompt: tokens ? tokens.ids : (text ?? ""), ...fields(options) });
      const request = completionRequest(body, promptsOf(body.prompt)[0], model.generationConfig, who);
      return { ...request, maxTokens: body.max_tokens ?? null, ...formatOf(options) };
    }),
    Chat: streaming<ChatRequest>((model, request, who) => {
      const { logprobs, ...rest } = fields(request.options);
      const body = parsed(ChatBody, {
        model: model.name,
        messages: request.messages.map(({ role, content, tool_calls, tool_call_id }) => ({
          role,
          content,
          ...(tool_calls.length
            ? { tool_calls: tool_calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } })) }
            : {}),
          ...(role === "tool" ? { tool_call_id } : {}),
        })),
        ...(request.tools.length
          ? {
              tools: request.tools.map(({ name, description, parameters }) => ({
                type: "function",
                function: { name, description, ...(parameters ? { parameters: json(parameters, "tools.parameters") } : {}) },
              })),
            }
          : {}),
        ...(request.tool_choice
          ? {
              tool_choice: ["auto", "none", "required"].includes(request.tool_choice)
                ? request.tool_choice
                : { type: "function", function: { name: request.tool_choice } },
            }
          : {}),
        ...rest,
        ...(logprobs === undefined ? {} : { logprobs: true, top_logprobs: logprobs }),
      });
      return { ...chatRequest(body, model.generationConfig, who), ...formatOf(request.options) };
    }),
    Tokenize: unary(({ tokenizer }, { text }: { model: string; text: string }) => ({ tokens: tokenizer.encode(text) })),
    Detokenize: unary(({ tokenizer, config }, { tokens }: { model: string; tokens: number[] }) => {
      const wrong = tokens.find((id) => id >= config.vocabSize);
      if (wrong !== undefined)
        throw new ServerError("invalid_request", `token id ${wrong} is outside the vocabulary of ${config.vocabSize}`, { param: "tokens" });
      return { text: tokenizer.decode(tokens) };
    }),
    GetModel: unary(({ name, config, engine }) => ({
      name,
      architecture: config.architecture,
      context_length: Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS),
      vocabulary: config.vocabSize,
      layers: config.layers,
      hidden: config.hiddenSize,
      experts: config.moe?.experts ?? 0,
      experts_per_token: config.moe?.chosen ?? 0,
      shared_experts: config.moe?.sharedExperts ?? 0,
    })),
    ListModels: (call: ServerUnaryCall<object, object>, done: sendUnaryData<object>) => {
      void served(call, async ({ models }) =>
        done(null, { models: services.catalog.list().filter((m) => models?.includes(m.name) ?? true) }),
      ).catch((error) => done(failure(error, onError)));
    },
  });
  const health = new HealthImplementation({ "": "SERVING", [SERVICE]: "SERVING" });
  health.addToServer(server);
  new ReflectionService(definition).addToServer(server);
  const credentials = deps.tls
    ? ServerCredentials.createSsl(null, [{ cert_chain: deps.tls.cert, private_key: deps.tls.key }])
    : ServerCredentials.createInsecure();
  const bound = await new Promise<number>((resolve, reject) => {
    server.bindAsync(`${host}:${port}`, credentials, (error, at) => (error ? reject(error) : resolve(at)));
  });
  return {
    port: bound,
    close: (drainMs) =>
      new Promise((resolve) => {
        health.setStatus("", "NOT_SERVING");
        health.setStatus(SERVICE, "NOT_SERVING");
        const timer = setTimeout(() => server.forceShutdown(), drainMs);
        server.tryShutdown(() => {
          clearTimeout(timer);
          resolve();
        });
      }),
  };
}

/** The fields of the HTTP bodies. */
function fields(options: Options | undefined) {
  const { logit_bias = {}, seed, ...sampling } = options?.sampling ?? {};
  const set = Object.fromEntries(Object.entries(sampling).filter(([name, value]) => !name.startsWith("_") && value !== undefined));
  return {
    ...set,
    ...(Object.keys(logit_bias).length ? { logit_bias } : {}),
    ...(seed === undefined ? {} : { seed: Number(seed) }),
    ...(options?.max_tokens === undefined ? {} : { max_tokens: options.max_tokens }),
    ...(options?.stop.length ? { stop: options.stop } : {}),
    ...(options?.logprobs === undefined ? {} : { logprobs: options.logprobs }),
    routing: options?.routing ?? false,
  };
}

function formatOf(options: Options | undefined): Partial<Pick<CompletionRequest, "format">> {
  if (!options?.json_schema) return {};
  return { format: { kind: "schema", schema: json(options.json_schema, "options.json_schema") } };
}

function json(text: string, param: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch {
    // told below
  }
  throw new ServerError("invalid_request", `${param} is no JSON object`, { param });
}

function parsed<T extends z.ZodType>(schema: T, value: unknown): z.infer<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  const param = issue.path.join(".");
  throw new ServerError("invalid_request", `${param}: ${issue.message}`, { param });
}

function wire(event: CompletionEvent): object {
  switch (event.kind) {
    case "text":
      return { text: { text: event.text, reasoning: event.channel === "reasoning" } };
    case "logprob":
      return { logprob: { ...event.token, top: event.top } };
    case "routing": {
      const { id, text, layers, experts, weights } = event.token;
      const k = layers.length ? experts.length / layers.length : 0;
      const row = (l: number) => ({
        experts: [...experts.subarray(l * k, (l + 1) * k)],
        weights: [...weights.subarray(l * k, (l + 1) * k)],
      });
      return { routing: { token: id, text, layers: layers.map((layer, l) => ({ layer, ...row(l) })) } };
    }
    case "toolCall":
      return { tool_call: { index: event.index, id: event.id ?? "", name: event.name ?? "", arguments: event.arguments } };
    case "end": {
      const { promptTokens, cachedTokens, completionTokens, reasoningTokens } = event.usage;
      const reason = { stop: "STOP", length: "LENGTH", toolCalls: "TOOL_CALLS" }[event.reason];
      return {
        end: {
          reason,
          usage: {
            prompt_tokens: promptTokens,
            cached_tokens: cachedTokens,
            completion_tokens: completionTokens,
            reasoning_tokens: reasoningTokens,
          },
        },
      };
    }
    default:
      return event satisfies never;
  }
}

function drained(call: ServerWritableStream<unknown, object>): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      call.off("drain", done);
      call.off("cancelled", done);
      resolve();
    };
    call.on("drain", done).on("cancelled", done);
    if (call.cancelled) done();
  });
}

function failure(error: unknown, onError: (error: unknown) => void) {
  const known = serverError(error);
  if (known.code === "internal") onError(error);
  const metadata = new Metadata();
  metadata.set("mixtape-code", known.code);
  if (known.param) metadata.set("mixtape-field", known.param.replaceAll(/[^\x20-\x7e]/g, "?"));
  if (known.retryAfterSeconds !== null) metadata.set("retry-after", String(Math.max(1, Math.ceil(known.retryAfterSeconds))));
  return { code: status[ERRORS[known.code].grpc], details: known.message, metadata };
}
