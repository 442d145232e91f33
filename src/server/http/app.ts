/** The HTTP layer: timeouts, size limits, headers, request ids, errors and logs, the same for every route. Knows no route's content. */
import { type IncomingMessage, STATUS_CODES } from "node:http";
import type { Socket } from "node:net";
import cors from "@fastify/cors";
import helmet from "@fastify/helmet";
import swagger from "@fastify/swagger";
import swaggerUi from "@fastify/swagger-ui";
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest, LogController } from "fastify";
import { jsonSchemaTransform, serializerCompiler } from "fastify-type-provider-zod";
import { Turns } from "../../grammar/turns.ts";
import type { Caller } from "../access/gate.ts";
import { bearerToken, type Gate } from "../access/gate.ts";
import { isLoopback, type ServeConfig } from "../config.ts";
import { ERRORS, ServerError } from "../errors.ts";
import { type Logger, requestId } from "../logs.ts";
import type { Metrics } from "../metrics.ts";
import type { Reader } from "../reading/reader.ts";
import type { Certificate } from "../tls.ts";
import { errorBody } from "./error.ts";
import type { InFlight } from "./inflight.ts";
import { receive, whole } from "./receive.ts";

declare module "fastify" {
  interface FastifyRequest {
    /** The authenticated client. Set before the handlers of routes inside `guard`. */
    caller: Caller;
  }
}

export interface HttpParts {
  readonly reader: Reader;
  readonly config: ServeConfig;
  readonly log: Logger;
  readonly metrics: Metrics;
  readonly inFlight: InFlight;
  readonly certificate: Certificate | null;
  readonly version: string;
}

/** A Fastify instance without routes. */
export async function createHttp({ reader, config, log, metrics, inFlight, certificate, version }: HttpParts): Promise<FastifyInstance> {
  const http = {
    maxHeaderSize: config.maxHeaderBytes,
    headersTimeout: Math.min(config.headersTimeoutSeconds, config.requestTimeoutSeconds) * 1000,
    // How often Node looks for requests that are overdue: often enough for the timeout to mean something.
    connectionsCheckingInterval: Math.min(1000, config.requestTimeoutSeconds * 500),
    handshakeTimeout: config.headersTimeoutSeconds * 1000,
  };
  const app = Fastify({
    loggerInstance: log,
    logController: new LogController({ disableRequestLogging: true }), // the hooks below log requests, without private data
    genReqId: (request: IncomingMessage) => requestId(request.headers["x-request-id"]),
    bodyLimit: config.maxBodyBytes,
    requestTimeout: config.requestTimeoutSeconds * 1000,
    keepAliveTimeout: config.keepAliveTimeoutSeconds * 1000,
    trustProxy: config.trustProxy,
    forceCloseConnections: "idle",
    return503OnClosing: false, // while draining, a hook answers in our error format
    clientErrorHandler: answerBroken,
    frameworkErrors: answerWith(inFlight),
    ...(certificate ? { https: { ...http, ...certificate.current, minVersion: "TLSv1.2" } } : { http }),
  } as Parameters<typeof Fastify>[0]) as unknown as FastifyInstance;
  app.setValidatorCompiler(whole);
  app.setSerializerCompiler(serializerCompiler);
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", (request: FastifyRequest, payload: IncomingMessage) =>
    receive(request, payload, reader, config),
  );
  app.setErrorHandler(answerWith(inFlight));
  app.decorateRequest("caller");

  const knownHosts = config.keys === undefined && isLoopback(config.host) ? config.allowedHosts : null;
  app.addHook("onRequest", async (request, reply) => {
    inFlight.add(reply.raw, (status) => {
      const route = request.routeOptions.url ?? "unknown";
      metrics.request(route, status, reply.elapsedTime / 1000);
      const what = { req: request, res: { status }, ms: Math.round(reply.elapsedTime), caller: request.caller?.id, ip: request.ip };
      const quiet = route === "/health" || route === "/ready" || route === "/metrics";
      request.log[quiet ? "debug" : "info"](what, status === ERRORS.cancelled.status ? "the client left" : "answered");
    });
    reply.header("x-request-id", request.id);
    refuseAmbiguous(request);
    if (knownHosts) checkHost(request, knownHosts);
  });
  if (config.logContent)
    app.addHook("preHandler", async (request) => {
      if (request.body !== undefined) request.log.info({ body: request.body }, "asked");
    });

  await app.register(helmet, {
    // No foreign origins and no inline scripts: text from a model can't run in the page.
    contentSecurityPolicy: {
      useDefaults: false,
      directives: {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "manifest-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
      },
    },
    strictTransportSecurity: certificate ? { maxAge: 31_536_000 } : false,
    referrerPolicy: { policy: "no-referrer" },
    xFrameOptions: { action: "deny" },
  });
  if (config.corsOrigins.length > 0)
    await app.register(cors, {
      origin: config.corsOrigins,
      exposedHeaders: ["x-request-id", "retry-after", "x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"],
      maxAge: 600,
    });
  if (config.docs) {
    await app.register(swagger, {
      openapi: {
        openapi: "3.1.0",
        info: { title: "mixtape", version, description: "Language models behind OpenAI's API." },
        components: { securitySchemes: { key: { type: "http", scheme: "bearer" } } },
        ...(config.keys === undefined ? {} : { security: [{ key: [] }] }),
      },
      transform: jsonSchemaTransform,
    });
    const ownScripts =
      "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:";
    await app.register(swaggerUi, {
      routePrefix: "/docs",
      staticCSP: `${ownScripts}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`,
    });
  }
  answerUnknownRoutes(app);
  return app;
}

/**
 * Admits only authorized requests to the routes of `scope`; POST requests also need a compute slot. Requests are rejected before
 * their body is read, so they cost other users almost nothing.
 */
export function guard(scope: FastifyInstance, gate: Gate, metrics: Metrics): void {
  const turns = new Turns();
  scope.addHook("onRequest", async (request, reply) => {
    if (request.method === "POST") await turns.next(); // a burst of requests must not block the event loop
    request.caller = gate.authenticate(bearerToken(request.headers.authorization));
    if (request.method !== "POST") return;
    const gone = new AbortController();
    const leave = () => gone.abort(new ServerError("cancelled", "the client has disconnected"));
    reply.raw.once("close", leave);
    try {
      const place = await gate.enter(request.caller, gone.signal);
      reply.raw.once("close", place.leave);
      if (reply.raw.closed || reply.raw.destroyed) place.leave();
      metrics.queued(place.queuedSeconds);
    } catch (error) {
      const code = error instanceof ServerError ? error.code : "internal";
      if (code !== "cancelled") metrics.refused(code);
      throw error;
    } finally {
      reply.raw.off("close", leave);
      reply.headers(rateHeaders(gate, request.caller));
    }
  });
}

/** OpenAI's rate limit headers. */
function rateHeaders(gate: Gate, caller: Caller): Record<string, string> {
  const headers: Record<string, string> = {};
  for (const [name, left] of Object.entries(gate.allowance(caller) ?? {})) {
    if (!left) continue;
    headers[`x-ratelimit-limit-${name}`] = String(left.limit);
    headers[`x-ratelimit-remaining-${name}`] = String(left.remaining);
    headers[`x-ratelimit-reset-${name}`] = duration(left.resetSeconds);
  }
  return headers;
}

/** Seconds as OpenAI writes them: `120ms`, `6m0s`, `1h2m3s`. */
function duration(seconds: number): string {
  if (seconds < 1) return `${Math.ceil(seconds * 1000)}ms`;
  const whole = Math.ceil(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return `${h ? `${h}h` : ""}${h || m ? `${m}m` : ""}${s}s`;
}

/** Against DNS rebinding: a foreign page can point its name at this machine, but its requests still carry that name. */
function checkHost(request: FastifyRequest, allowed: readonly string[]): void {
  // Not X-Forwarded-Host, which a page can set too.
  const name = (request.headers.host ?? "").replace(/:\d+$/, "");
  if (isLoopback(name) || allowed.includes(name)) return;
  throw new ServerError(
    "invalid_request",
    "this server has no keys and answers to localhost only; add the name in the header Host to allowedHosts",
    {
      param: "Host",
    },
  );
}

/** Headers that decide who asks, for what and how. Of two, each program on the way may believe another one. */
const SINGLE = new Set(["host", "authorization", "content-type", "origin"]);

function refuseAmbiguous({ raw: { rawHeaders, url }, headers }: FastifyRequest): void {
  const seen = new Set<string>();
  for (let i = 0; i < rawHeaders.length; i += 2) {
    const name = rawHeaders[i].toLowerCase();
    if (!SINGLE.has(name)) continue;
    if (seen.has(name)) throw new ServerError("invalid_request", `the request has two headers ${name}; send one`, { param: name });
    seen.add(name);
  }
  const [, target] = /^[a-z][a-z\d+.-]*:\/\/([^/?#]*)/i.exec(url ?? "") ?? [];
  if (target !== undefined && target.toLowerCase() !== headers.host?.toLowerCase())
    throw new ServerError("invalid_request", "the request's target and its header host name different hosts", { param: "host" });
}

function answerWith(inFlight: InFlight) {
  return (error: unknown, request: FastifyRequest, reply: FastifyReply): void => {
    const { status, body, headers, code } = errorBody(error);
    const left = code === "cancelled" || request.raw.errored === error;
    if (code === "internal" && !left) request.log.error({ err: error }, "a request failed");
    // Not the message or the field: they may repeat what the user sent.
    else if (!left) request.log.debug({ code }, "a request was rejected");
    if (left || reply.raw.destroyed) return; // nobody is there to read an answer
    if (reply.raw.headersSent) {
      inFlight.cut(reply.raw, status);
      return;
    }
    // Fastify would close the connection while the client is still sending its body, and the client would see a reset instead of
    // the response. Keeping it open discards the body, until the request timeout.
    if (status < 500) reply.removeHeader("connection");
    void reply.code(status).headers(headers).type("application/json; charset=utf-8").serializer(JSON.stringify).send(body);
  };
}

/** Answers unknown paths with 404, and methods that a path does not have with 405. */
function answerUnknownRoutes(app: FastifyInstance): void {
  const methods = new Map<string, { readonly pattern: RegExp; readonly allowed: Set<string> }>();
  app.addHook("onRoute", ({ url, method }) => {
    const pattern = new RegExp(
      `^${url
        .split(/:\w+/)
        .map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"))
        .join("[^/]+")}/?$`,
    );
    const route = methods.get(url) ?? { pattern, allowed: new Set<string>() };
    for (const each of [method].flat()) route.allowed.add(each);
    methods.set(url, route);
  });
  app.setNotFoundHandler((request, reply) => {
    const path = request.url.split("?", 1)[0];
    const allowed = [...methods.values()].filter((route) => route.pattern.test(path)).flatMap((route) => [...route.allowed]);
    if (allowed.length === 0) throw new ServerError("not_found", `there is no ${path.length > 200 ? `${path.slice(0, 200)}…` : path}`);
    reply.header("allow", allowed.join(", "));
    throw new ServerError("method_not_allowed", `${path} supports ${allowed.join(", ")}, not ${request.method}`);
  });
}

/** How long a client may take to read the answer to something that is no request. */
const FAREWELL_MS = 1000;

/**
 * Input that Node cannot parse as a request has no route and no reply object: it is answered on the socket. Other errors, of TLS
 * handshakes among them, leave a socket that can't carry an answer. The socket always ends, whatever its client does.
 */
function answerBroken(error: Error & { code?: string }, socket: Socket): void {
  const parsed = error.code?.startsWith("HPE_") || error.code === "ERR_HTTP_REQUEST_TIMEOUT";
  if (!parsed || socket.destroyed || !socket.writable) {
    socket.destroy();
    return;
  }
  const [status, message] =
    error.code === "HPE_HEADER_OVERFLOW"
      ? [431, "the headers are too large"]
      : error.code === "ERR_HTTP_REQUEST_TIMEOUT"
        ? [408, "timed out waiting for the request"]
        : [400, "this is not an HTTP request"];
  const body = JSON.stringify({ error: { message, type: ERRORS.invalid_request.type, param: null, code: "invalid_request" } });
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
  );
  const late = setTimeout(() => socket.destroy(), FAREWELL_MS);
  socket.once("close", () => clearTimeout(late));
}
