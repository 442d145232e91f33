/** Puts the server together: HTTP, who may come in, models, routes, and how it starts and goes down. Knows no route's content. */
import { readFileSync } from "node:fs";
import type { AddressInfo } from "node:net";
import type { FastifyInstance } from "fastify";
import { ModelCatalog } from "./catalog.ts";
import { type Config, checkExposure, isLoopback } from "./config.ts";
import { ServerError } from "./errors.ts";
import { Gate } from "./gate.ts";
import { createHttp, guard } from "./http.ts";
import { createLogger, type Logger } from "./logs.ts";
import { Metrics } from "./metrics.ts";
import { registerOperations, type State } from "./operations.ts";
import { registerPage } from "./page.ts";
import { Responses } from "./responses.ts";
import { Certificate } from "./tls.ts";

const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as { version: string };

/** A server from its assembly to its end. */
export interface Server {
  /** For tests: `inject` asks without a network. */
  readonly app: FastifyInstance;
  readonly catalog: ModelCatalog;
  readonly gate: Gate;
  /** Listens, then loads the models that it is not ready without. Rejects, and is closed, when either fails. */
  listen(): Promise<void>;
  /** `http://127.0.0.1:8000`; empty before `listen`. */
  readonly url: string;
  /** Reads keys of TLS again. */
  reload(): void;
  /** Stops accepting, lets running requests end, and closes; those that last longer than `drainTimeoutSeconds` are cut off. */
  drain(): Promise<void>;
  /** Cuts everything off and frees all. */
  close(): Promise<void>;
}

/** Throws ServerConfigError or KeyFileError when the settings can't work. `log`: default JSON lines on standard output. */
export async function createServer(config: Config, log: Logger = createLogger(config.logLevel)): Promise<Server> {
  checkExposure(config);
  const metrics = new Metrics();
  const certificate = config.tlsCert === null || config.tlsKey === null ? null : new Certificate(config.tlsCert, config.tlsKey, log);
  const gate = await Gate.open({
    keyFile: config.keyFile,
    usageFile: config.usageFile,
    limits: {
      running: config.maxRunning,
      queued: config.maxQueued,
      perOwner: config.maxPerKey,
      queueSeconds: config.queueTimeoutSeconds,
    },
    log,
  });
  const catalog = new ModelCatalog({
    models: config.models,
    memoryBudgetBytes: config.memoryBudgetBytes ?? null,
    idleUnloadSeconds: config.idleUnloadSeconds,
    offline: config.offline,
    log,
    onLoad: (model) => metrics.attach(model),
  });
  metrics.sources = { inProgress: () => gate.admission, models: () => catalog.loaded() };
  const responses = new Responses(config.stallTimeoutSeconds, () => log.warn("cut off a client that took nothing of its answer"));
  const app = await createHttp({ config, log, metrics, responses, certificate, version });
  const state: State = { phase: "starting" };
  await registerOperations(app, { state, config, gate, metrics });
  await app.register(async (scope) => {
    scope.addHook("onRequest", async (_request, reply) => {
      if (state.phase !== "draining") return;
      reply.header("connection", "close");
      throw new ServerError("not_ready", "the server is going down; another may answer", { retryAfterSeconds: 1 });
    });
    guard(scope, gate, metrics);
  });
  if (config.web && !(await registerPage(app))) log.warn("the web page is not built, so it is not served");
  if (certificate)
    certificate.onChange = (pair) => (app.server as unknown as { setSecureContext(pair: object): void }).setSecureContext(pair);

  let closing: Promise<void> | null = null;
  const close = (): Promise<void> => {
    closing ??= (async () => {
      state.phase = "draining";
      app.server.closeAllConnections();
      await app.close();
      responses.close();
      certificate?.close();
      await gate.close();
      await catalog.close();
    })();
    return closing;
  };
  return {
    app,
    catalog,
    gate,
    get url() {
      const address = app.server.address() as AddressInfo | null;
      if (address === null) return "";
      const host = address.family === "IPv6" ? `[${address.address}]` : address.address;
      return `${certificate ? "https" : "http"}://${host}:${address.port}`;
    },
    async listen() {
      try {
        await app.listen({ host: config.host, port: config.port });
        if (config.keyFile === null && !isLoopback(config.host)) log.warn("anybody who reaches this address may use the server");
        await catalog.preload();
        if (state.phase === "starting") state.phase = "ready";
      } catch (error) {
        await close();
        throw error;
      }
    },
    reload: () => certificate?.reload(),
    async drain() {
      if (state.phase !== "draining") {
        state.phase = "draining";
        log.info({ running: responses.count }, "draining");
        gate.admission.close();
        app.server.close();
        app.server.closeIdleConnections();
        const cut = await responses.drain(config.drainTimeoutSeconds);
        log[cut ? "warn" : "info"]({ cut }, "drained");
      }
      await close();
    },
    close,
  };
}
