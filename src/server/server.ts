/**
 * Puts the server together: Fastify with its plugins, who may ask and how much at once, the routes, and how it ends. The life
 * of a request: key, rate, room, body, schema, route; docs/serving.md draws it.
 */
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import cors from "@fastify/cors";
import helmet from "@fastify/helmet";
import swagger from "@fastify/swagger";
import swaggerUi from "@fastify/swagger-ui";
import Fastify, { type FastifyInstance, type FastifyRequest } from "fastify";
import { jsonSchemaTransform, serializerCompiler, validatorCompiler } from "fastify-type-provider-zod";
import type { DestinationStream } from "pino";
import { ModelCatalog } from "./catalog.ts";
import type { ServeConfig } from "./config.ts";
import { ServerError } from "./errors.ts";
import { registerInspection } from "./inspect.ts";
import { KeyRing, type StoredKey } from "./keys.ts";
import { Metrics } from "./metrics.ts";
import { registerOpenAi } from "./openai.ts";
import { errorBody } from "./replies.ts";
import type { Caller } from "./served.ts";
import type { Services } from "./services.ts";

const ANYONE: Caller = { id: "anonymous", models: null };
/** Open to whoever reaches the port: probes, and the description of the API. */
const OPEN = /^\/(health|ready|docs)(\/|$|\?)/;

export interface Server {
  readonly app: FastifyInstance;
  readonly catalog: ModelCatalog;
  /** Loads models and listens. */
  start(): Promise<{ url: string }>;
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

  const callers = new WeakMap<FastifyRequest, Caller>();
  const callerOf = (request: FastifyRequest) => callers.get(request) ?? ANYONE;
  const inProgress = new Map<string, number>();
  let [total, draining] = [0, false];

  app.addHook("onRequest", async (request, reply) => {
    reply.header("x-request-id", request.id);
    if (OPEN.test(request.url) || request.method === "OPTIONS") return;
    if (request.url.split("?")[0] === "/metrics") return authorizeMetrics(request, config.metricsToken);
    let key: StoredKey | null = null;
    if (ring) {
      const found = ring.authenticate(bearer(request));
      callers.set(request, found.caller);
      key = found.key;
    }
    if (request.method !== "POST") return;
    if (draining) throw new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 5 });
    const { id } = callerOf(request);
    const own = inProgress.get(id) ?? 0;
    if (total >= config.maxInProgress || own >= config.maxInProgressPerKey) {
      reply.header("connection", "close"); // a body may still be on its way: it is not waited for
      const limit = total >= config.maxInProgress ? config.maxInProgress : config.maxInProgressPerKey;
      throw new ServerError("overloaded", `${limit} requests are in progress, which is as many as are taken; try again soon`, {
        retryAfterSeconds: 1 + Math.random() * 4,
      });
    }
    if (ring && key) reply.headers(ring.admit(key));
    total++;
    inProgress.set(id, own + 1);
    metrics.inProgress(total);
    reply.raw.once("close", () => {
      total--;
      const left = (inProgress.get(id) ?? 1) - 1;
      if (left > 0) inProgress.set(id, left);
      else inProgress.delete(id);
      metrics.inProgress(total);
    });
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
    const ready = catalog.ready && !draining;
    reply.code(ready ? 200 : 503);
    return { status: ready ? "ready" : draining ? "draining" : "loading", models: catalog.list() };
  });
  app.get("/metrics", { schema: { tags: ["operations"], summary: "Figures for Prometheus" } }, async (_request, reply) => {
    reply.type(metrics.registry.contentType);
    return metrics.registry.metrics();
  });
  registerOpenAi(app, services, callerOf);
  registerInspection(app, services, callerOf);

  return {
    app,
    catalog,
    async start() {
      await app.listen({ host: config.host, port: config.port });
      const { address, port, family } = app.server.address() as AddressInfo;
      const url = `http${config.tls ? "s" : ""}://${family === "IPv6" ? `[${address}]` : address}:${port}`;
      await catalog.preload();
      return { url };
    },
    async stop() {
      if (draining) return;
      draining = true;
      app.log.info({ inProgress: total }, "draining");
      const until = performance.now() + config.drainTimeoutSeconds * 1000;
      while (total > 0 && performance.now() < until) await new Promise((resolve) => setTimeout(resolve, 20));
      if (total > 0) app.log.warn({ inProgress: total }, "answers are cut off");
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
