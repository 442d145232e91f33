/**
 * Puts the server together: Fastify with its plugins, who may ask and how much at once, the routes, and how it ends. The life
 * of a request: key, rate, room, body, schema, route; docs/serving.md draws it.
 */
import { randomUUID } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import { fileURLToPath } from "node:url";
import cors from "@fastify/cors";
import helmet from "@fastify/helmet";
import fastifyStatic from "@fastify/static";
import swagger from "@fastify/swagger";
import swaggerUi from "@fastify/swagger-ui";
import Fastify, { type FastifyInstance, type FastifyRequest } from "fastify";
import { jsonSchemaTransform, serializerCompiler, validatorCompiler } from "fastify-type-provider-zod";
import type { DestinationStream } from "pino";
import { Admission } from "./admission.ts";
import { ModelCatalog } from "./catalog.ts";
import type { ServeConfig } from "./config.ts";
import { ServerError } from "./errors.ts";
import { type Grpc, startGrpc } from "./grpc.ts";
import { registerInspection } from "./inspect.ts";
import { KeyRing } from "./keys.ts";
import { Metrics } from "./metrics.ts";
import { registerOpenAi } from "./openai.ts";
import { errorBody } from "./replies.ts";
import type { Caller } from "./served.ts";
import type { Services } from "./services.ts";

/** What needs a key where there are keys; probes, the description of the API and the page are open. */
const GUARDED = /^\/(v1|tokenize|detokenize)(\/|$|\?)/;
const LOCAL_HOST = /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i;
/** The page, as `npm run build` leaves it. */
const PAGE = fileURLToPath(new URL("../../dist/web", import.meta.url));

export interface Server {
  readonly app: FastifyInstance;
  readonly catalog: ModelCatalog;
  /** Loads models and listens. */
  start(): Promise<{ url: string; grpcPort: number | null }>;
  /** Stops taking requests, lets answers end within the drain timeout, then closes all. */
  stop(): Promise<void>;
}

/** @param logTo where log lines go; default: standard output */
export async function createServer(config: ServeConfig, logTo?: DestinationStream): Promise<Server> {
  const ring = config.keys ? await KeyRing.open(config.keys) : null;
  const app = Fastify({
    // Requests that do not arrive in time are looked for as often as matters to that time.
    [config.tls ? "https" : "http"]: {
      ...(config.tls ? readTls(config.tls) : {}),
      connectionsCheckingInterval: Math.min(5000, config.requestTimeoutSeconds * 500),
      headersTimeout: config.requestTimeoutSeconds * 1000,
    },
    logger: {
      level: config.logLevel,
      // What is said stays between the model and those who ask: neither bodies nor keys are logged.
      serializers: { req: ({ method, url, ip }: FastifyRequest) => ({ method, url: url.split("?")[0], ip }) },
      ...(logTo ? { stream: logTo } : {}),
    },
    genReqId: () => randomUUID(),
    trustProxy: config.trustProxy,
    bodyLimit: config.maxBodyBytes,
    requestTimeout: config.requestTimeoutSeconds * 1000,
    connectionTimeout: 0, // a stream may be silent for long; what does not arrive is ended by the request's timeout
    keepAliveTimeout: 5000,
    forceCloseConnections: "idle",
    onProtoPoisoning: "error",
    onConstructorPoisoning: "error",
  } as object) as FastifyInstance;
  app.setValidatorCompiler(validatorCompiler);
  app.setSerializerCompiler(serializerCompiler);

  const catalog = new ModelCatalog(config.models, {
    idleUnloadSeconds: config.idleUnloadSeconds,
    memoryBudgetBytes: config.memoryBudgetBytes,
    onEvent: (what, name, detail) => {
      app.log[what === "failed" ? "error" : "info"]({ model: name, ...detail }, `model ${what}`);
      if (what === "loaded") for (const model of catalog.loaded()) metrics.watch(model);
    },
  });
  const metrics = new Metrics(() => catalog.loaded());
  const services: Services = {
    catalog,
    observer: metrics,
    maxTokens: config.maxTokens,
    account: (caller, usage) => ring?.account(caller.id, usage),
  };

  await app.register(helmet, {
    contentSecurityPolicy: {
      useDefaults: false,
      directives: {
        defaultSrc: ["'self'"],
        imgSrc: ["'self'", "data:"],
        objectSrc: ["'none'"],
        baseUri: ["'none'"],
        frameAncestors: ["'none'"],
        formAction: ["'self'"],
      },
    },
  });
  await app.register(cors, { origin: config.corsOrigins.length ? config.corsOrigins : false });
  await app.register(swagger, {
    openapi: {
      info: {
        title: "mixtape",
        description: "A private service for ERNIE-4.5 mixture-of-experts models. OpenAI's clients work against it.",
        version: "1",
      },
      components: { securitySchemes: { key: { type: "http", scheme: "bearer" } } },
      security: ring ? [{ key: [] }] : [],
    },
    transform: jsonSchemaTransform,
  });
  await app.register(swaggerUi, { routePrefix: "/docs", staticCSP: true });

  const guardsHost = !ring && !config.insecureNoAuth && !config.trustProxy;
  const callers = new WeakMap<FastifyRequest, Caller>();
  const callerOf = (request: FastifyRequest): Caller => callers.get(request) ?? { id: "anonymous", models: null };
  const admission = new Admission(ring, config.maxInProgress, config.maxInProgressPerKey, (count) => metrics.inProgress(count));

  app.addHook("onRequest", async (request, reply) => {
    reply.header("x-request-id", request.id);
    // Without keys this machine alone may ask: a name that a page of elsewhere has pointed here is not this machine.
    if (guardsHost && !LOCAL_HOST.test(request.headers.host ?? ""))
      throw new ServerError("invalid_request", `the Host is ${request.headers.host}; without keys only localhost is served`);
    if (request.url.split("?")[0] === "/metrics") return authorizeMetrics(request, config.metricsToken);
    if (!GUARDED.test(request.url) || request.method === "OPTIONS") return;
    const visitor = admission.authenticate(bearer(request));
    callers.set(request, visitor.caller);
    if (request.method !== "POST") return;
    try {
      const { headers, release } = admission.enter(visitor);
      reply.headers(headers);
      reply.raw.once("close", release);
    } catch (error) {
      reply.header("connection", "close"); // a body may still be on its way: it is not waited for
      throw error;
    }
  });
  app.addHook("onResponse", async (request, reply) => {
    metrics.request(request.routeOptions.url ?? "none", reply.statusCode);
  });
  app.setErrorHandler((error, request, reply) => {
    const { status, body, headers } = errorBody(error);
    if (status >= 500) request.log.error({ err: error }, "a request failed");
    reply.code(status).headers(headers).send(body);
  });
  app.setNotFoundHandler((request, reply) => {
    const { status, body } = errorBody(
      new ServerError("not_found", `there is no ${request.method} ${request.url.split("?")[0]} here; GET /docs lists what there is`),
    );
    reply.code(status).send(body);
  });

  app.get("/health", { schema: { tags: ["operations"], summary: "The process lives" } }, () => ({ status: "ok" }));
  app.get("/ready", { schema: { tags: ["operations"], summary: "Its models are loaded, and it takes requests" } }, (_request, reply) => {
    const ready = catalog.ready && !admission.draining;
    reply.code(ready ? 200 : 503);
    return { status: ready ? "ready" : admission.draining ? "draining" : "loading", models: catalog.list() };
  });
  app.get("/metrics", { schema: { tags: ["operations"], summary: "Figures for Prometheus" } }, async (_request, reply) => {
    reply.type(metrics.registry.contentType);
    return metrics.registry.metrics();
  });
  if (existsSync(PAGE))
    await app.register(fastifyStatic, {
      root: PAGE,
      cacheControl: false,
      // Names of assets change with what is in them.
      setHeaders: (response, path) =>
        void response.header("cache-control", path.includes("/assets/") ? "public, max-age=31536000, immutable" : "no-cache"),
    });
  registerOpenAi(app, services, callerOf);
  registerInspection(app, services, callerOf);

  let grpc: Grpc | null = null;
  return {
    app,
    catalog,
    async start() {
      await app.listen({ host: config.host, port: config.port });
      const { address, port, family } = app.server.address() as AddressInfo;
      const url = `http${config.tls ? "s" : ""}://${family === "IPv6" ? `[${address}]` : address}:${port}`;
      if (config.grpcPort !== null)
        grpc = await startGrpc(config.host, config.grpcPort, {
          services,
          admit: (secret) => {
            const visitor = admission.authenticate(secret);
            return { caller: visitor.caller, release: admission.enter(visitor).release };
          },
          onError: (err) => app.log.error({ err }, "a call failed"),
          ...(config.tls ? { tls: readTls(config.tls) } : {}),
          maxMessageBytes: config.maxBodyBytes,
        });
      await catalog.preload();
      return { url, grpcPort: grpc?.port ?? null };
    },
    async stop() {
      if (admission.draining) return;
      admission.draining = true;
      app.log.info({ inProgress: admission.inProgress }, "draining");
      const drainMs = config.drainTimeoutSeconds * 1000;
      const until = performance.now() + drainMs;
      const closing = grpc?.close(drainMs);
      while (admission.inProgress > 0 && performance.now() < until) await new Promise((resolve) => setTimeout(resolve, 20));
      if (admission.inProgress > 0) app.log.warn({ inProgress: admission.inProgress }, "answers are cut off");
      await closing;
      app.server.closeAllConnections();
      await app.close();
      await catalog.close();
      await ring?.close();
    },
  };
}

function bearer(request: FastifyRequest): string | null {
  return /^Bearer\s+(\S+)$/i.exec(request.headers.authorization ?? "")?.[1] ?? null;
}

function authorizeMetrics(request: FastifyRequest, token: string | undefined): void {
  if (token !== undefined && bearer(request) !== token)
    throw new ServerError("invalid_api_key", "the metrics need their own token: Authorization: Bearer …");
}

/** The certificate and key in the form in which TLS sockets take them. */
export function readTls({ cert, key }: NonNullable<ServeConfig["tls"]>): { cert: Buffer; key: Buffer } {
  return { cert: readFileSync(cert), key: readFileSync(key) };
}
