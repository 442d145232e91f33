/** Assembles the server from access control, models, HTTP and gRPC; starts it and shuts it down. Knows no route's content. */
import { lookup } from "node:dns/promises";
import { readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import type { FastifyInstance } from "fastify";
import type { DestinationStream } from "pino";
import { Gate } from "./access/gate.ts";
import { Catalog } from "./catalog.ts";
import { isLoopback, type ServeConfig } from "./config.ts";
import { type ConnectionLimits, Connections } from "./connections.ts";
import type { ServerContext } from "./context.ts";
import { ERRORS, ServerError, serverError } from "./errors.ts";
import { type Grpc, startGrpc } from "./grpc/grpc.ts";
import { createHttp, guard } from "./http/app.ts";
import { followRequests } from "./http/arrivals.ts";
import { InFlight } from "./http/inflight.ts";
import { registerInspection } from "./http/inspect.ts";
import { registerOpenAi } from "./http/openai/routes.ts";
import { registerMetrics, registerOperations, type State } from "./http/ops.ts";
import { registerPage } from "./http/page.ts";
import { createLogger, type Logger } from "./logs.ts";
import { Meter } from "./meter.ts";
import { Metrics } from "./metrics.ts";
import { type LogOutput, standardOutput } from "./output.ts";
import { Reader } from "./reading/reader.ts";
import { Certificate, type KeyPair } from "./tls.ts";

const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as { version: string };

/** Calls that a gRPC connection may have beyond the admission limits, so that excess calls get an error and health probes succeed. */
const SPARE_STREAMS = 100;

/** Time for the last log lines to be written. */
const FLUSH_MS = 1000;

/** A server, from assembly to shutdown. */
export interface Server {
  /** For tests: `inject` sends requests without a network. */
  readonly app: FastifyInstance;
  readonly catalog: Catalog;
  readonly gate: Gate;
  /** Port of the metrics; null where they have no own one, or before the start. */
  readonly metricsPort: number | null;
  /** Listens, then loads the preloaded models. If either fails, the server is closed and the promise rejects. */
  start(): Promise<{ readonly url: string; readonly grpcPort: number | null }>;
  /** Reloads the TLS files and the adapters. */
  reload(): void;
  /** Stops accepting requests, waits up to `drainTimeoutSeconds` for running ones, cuts off the rest, and closes. */
  stop(): Promise<void>;
}

/**
 * Rejects with ServerConfigError, KeyFileError or similar when the settings can't work.
 * @param logTo where log lines go; default: standard output
 */
export async function createServer(config: ServeConfig, logTo?: DestinationStream): Promise<Server> {
  const output = logTo === undefined ? standardOutput() : null;
  const log = createLogger(config.logLevel, logTo ?? (output as LogOutput));
  const certificate = config.tls ? new Certificate(config.tls, log) : null;
  const gate = await Gate.open({
    keyFile: config.keys ?? null,
    graceSeconds: config.keysGraceSeconds,
    usageFile: config.usageFile ?? null,
    limits: {
      running: config.maxInProgress,
      queued: config.maxQueued,
      perOwner: config.keys === undefined ? null : config.maxInProgressPerKey,
      queueSeconds: config.queueTimeoutSeconds,
    },
    log,
  });
  const catalog = new Catalog(config.models, {
    idleUnloadSeconds: config.idleUnloadSeconds,
    memoryBudgetBytes: config.memoryBudgetBytes,
    offline: config.offline,
    onEvent: (what, name, detail) => {
      log[what === "failed" ? "error" : "info"]({ model: name, ...detail }, what === "settled" ? "weights settled" : `model ${what}`);
      if (what === "loaded") for (const model of catalog.loaded()) metrics.watch(model);
    },
  });
  const limits = {
    maxConnections: config.maxConnections,
    arrivalMs: config.requestTimeoutSeconds * 1000,
    idleMs: config.keepAliveTimeoutSeconds * 1000,
  };
  const connections = new Connections(limits);
  const metrics = new Metrics({
    models: () => catalog.loaded(),
    admission: gate.admission,
    connections: () => ({
      http: connections.count,
      ...(grpc ? { grpc: grpc.connections() } : {}),
      ...(metricsPort ? { metrics: metricsPort.connections.count } : {}),
    }),
    logLinesDropped: () => output?.dropped ?? 0,
    keysUnreadableSeconds: () => gate.keysFault?.seconds ?? 0,
  });
  const context: ServerContext = {
    catalog,
    observer: metrics,
    maxTokens: config.maxTokens,
    maxPromptTokens: config.maxPromptTokens,
    meter: (caller, { name }) =>
      new Meter((kind, tokens) => {
        if (kind !== "cached") gate.charge(caller.id, tokens); // cached tokens are part of the prompt
        metrics.used(name, kind, tokens);
      }),
  };
  const inFlight = new InFlight(config.stallTimeoutSeconds, () => log.warn("disconnected a client that stopped reading its response"));
  const reader = new Reader({ maxBytes: config.maxBodyBytes, maxJsonDepth: config.maxJsonDepth });
  const app = await createHttp({ reader, config, log, metrics, inFlight, certificate, version });
  followRequests(app.server, connections);
  const state: State = { phase: "starting" };
  await registerOperations(app, { state, config, gate, catalog, metrics });
  await app.register(async (scope) => {
    scope.addHook("onRequest", async (_request, reply) => {
      if (state.phase !== "draining") return;
      reply.header("connection", "close");
      throw new ServerError("not_ready", "the server is shutting down; another instance may answer", { retryAfterSeconds: 1 });
    });
    guard(scope, gate, metrics);
    registerOpenAi(scope, context, ({ caller }) => caller);
    registerInspection(scope, context, ({ caller }) => caller);
  });
  if (config.web && !(await registerPage(app))) log.debug("the web page is not built and is not served");
  if (certificate)
    certificate.onChange = (pair) => {
      (app.server as unknown as SecureServer).setSecureContext(pair);
      grpc?.renew(pair);
    };

  let metricsPort: MetricsPort | null = null;
  let grpc: Grpc | null = null;
  const close = async (): Promise<void> => {
    state.phase = "draining";
    await grpc?.close(0);
    grpc = null;
    await metricsPort?.close();
    const closed = app.close(); // it waits for the connections
    await connections.close(0);
    await closed;
    inFlight.close();
    certificate?.close();
    await gate.close();
    await reader.close();
    await catalog.close();
    await output?.close(FLUSH_MS);
  };
  let stopping: Promise<void> | null = null;
  return {
    app,
    catalog,
    gate,
    get metricsPort() {
      return metricsPort?.port ?? null;
    },
    async start() {
      try {
        await app.listen({ host: await addressOf(config.host), port: config.port });
        if (config.keys === undefined && !isLoopback(config.host)) log.warn("anyone who can reach this address may use the server");
        if (config.metrics && config.metricsPort !== null)
          metricsPort = await openMetrics(config, config.metricsPort, limits, { gate, metrics, log, reader });
        if (config.grpcPort !== null)
          grpc = await openGrpc(config, config.grpcPort, certificate?.current ?? null, { context, gate, metrics, log, reader });
        await catalog.preload();
        if (state.phase === "starting") {
          state.phase = "ready";
          const tell = (unreadable: boolean) => grpc?.[unreadable ? "pause" : "ready"]();
          gate.onFault = tell;
          tell(gate.keysFault !== null);
        }
        return { url: urlOf(app, certificate !== null), grpcPort: grpc?.address.port ?? null };
      } catch (error) {
        stopping ??= close();
        await stopping;
        throw error;
      }
    },
    reload() {
      certificate?.reload();
      void catalog.reload();
    },
    stop() {
      stopping ??= (async () => {
        state.phase = "draining";
        log.info({ responses: inFlight.count }, "draining");
        gate.admission.close();
        app.server.close(); // no new connections; open ones close after their response
        app.server.closeIdleConnections();
        const calls = grpc?.close(config.drainTimeoutSeconds * 1000);
        const cut = (await inFlight.drain(config.drainTimeoutSeconds)) + ((await calls) ?? 0);
        grpc = null;
        log[cut ? "warn" : "info"]({ cut }, "drained");
        await close();
      })();
      return stopping;
    },
  };
}

interface GrpcParts {
  readonly reader: Reader;
  readonly context: ServerContext;
  readonly gate: Gate;
  readonly metrics: Metrics;
  readonly log: Logger;
}

/** Serves gRPC behind the same gate as HTTP, with its limits, log and metrics. */
function openGrpc(
  config: ServeConfig,
  port: number,
  tls: KeyPair | null,
  { context, gate, metrics, log, reader }: GrpcParts,
): Promise<Grpc> {
  return startGrpc({
    host: config.grpcHost ?? config.host,
    port,
    tls,
    context,
    authenticate: (secret) => gate.authenticate(secret),
    enter: async (caller, signal) => {
      try {
        const place = await gate.enter(caller, signal);
        metrics.queued(place.queuedSeconds);
        return place;
      } catch (error) {
        const { code } = serverError(error);
        if (code !== "cancelled") metrics.refused(code);
        throw error;
      }
    },
    read: (method, message, owner, signal) => reader.read({ kind: "message", method }, message, owner, signal),
    limits: {
      maxMessageBytes: config.maxBodyBytes,
      maxConcurrentStreams: config.maxInProgress + config.maxQueued + SPARE_STREAMS,
      maxConnections: config.maxConnections,
      requestTimeoutSeconds: config.requestTimeoutSeconds,
      idleTimeoutSeconds: config.keepAliveTimeoutSeconds,
      stallTimeoutSeconds: config.stallTimeoutSeconds,
    },
    onEnd: ({ requestId, path, callerId, outcome, seconds, error }) => {
      metrics.request(path, outcome === "ok" ? 200 : ERRORS[outcome].status, seconds);
      if (outcome === "internal") log.error({ reqId: requestId, err: error }, "a call failed");
      log.info({ reqId: requestId, path, outcome, ms: Math.round(seconds * 1000), caller: callerId }, "answered");
    },
    onFlood: () => log.warn("disconnected a gRPC client that sent too many pings"),
  });
}

/** The metrics' own port. */
interface MetricsPort {
  readonly port: number;
  readonly connections: Connections;
  close(): Promise<void>;
}

/** Serves the metrics, and nothing else, behind the same checks as the API. Plain HTTP. */
async function openMetrics(
  config: ServeConfig,
  port: number,
  limits: ConnectionLimits,
  { gate, metrics, log, reader }: Omit<GrpcParts, "context">,
): Promise<MetricsPort> {
  const connections = new Connections(limits);
  const inFlight = new InFlight(config.stallTimeoutSeconds, () => {});
  const own: ServeConfig = { ...config, host: config.metricsHost, docs: false, web: false, corsOrigins: [] };
  const app = await createHttp({ reader, config: own, log, metrics, inFlight, certificate: null, version });
  followRequests(app.server, connections);
  registerMetrics(app, { config, gate, metrics });
  const close = async () => {
    const closed = app.close();
    await connections.close(0);
    await closed;
    inFlight.close();
  };
  try {
    await app.listen({ host: await addressOf(config.metricsHost), port });
  } catch (error) {
    await close();
    throw error;
  }
  return { port: (app.server.address() as AddressInfo).port, connections, close };
}

/** The TLS part of an HTTP server. */
interface SecureServer {
  setSecureContext(pair: KeyPair): void;
}

/** One address: for `localhost`, Fastify would open a second server, which has neither our limits nor new certificates. */
async function addressOf(host: string): Promise<string> {
  return (await lookup(host, { verbatim: false })).address;
}

function urlOf(app: FastifyInstance, secure: boolean): string {
  const { address, port, family } = app.server.address() as AddressInfo;
  return `http${secure ? "s" : ""}://${family === "IPv6" ? `[${address}]` : address}:${port}`;
}
