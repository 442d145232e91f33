/** Routes for operators: liveness, readiness and metrics. Knows no model. */
import { createHash, timingSafeEqual } from "node:crypto";
import { once } from "node:events";
import { createServer, type Server } from "node:http";
import type { FastifyInstance } from "fastify";
import { bearerToken, type Gate } from "../access/gate.ts";
import type { Catalog } from "../catalog.ts";
import type { ServeConfig } from "../config.ts";
import { ServerError } from "../errors.ts";
import type { Metrics } from "../metrics.ts";
import { errorBody } from "./error.ts";

/** The server's lifecycle phase. */
export interface State {
  phase: "starting" | "ready" | "draining";
}

export interface OperationsParts {
  readonly state: State;
  readonly config: ServeConfig;
  readonly gate: Gate;
  readonly catalog: Catalog;
  readonly metrics: Metrics;
}

export async function registerOperations(app: FastifyInstance, { state, config, gate, catalog, metrics }: OperationsParts): Promise<void> {
  const described = (summary: string) => ({ schema: { tags: ["operations"], summary } });
  app.get("/health", described("Liveness: the process is running"), async () => ({ status: "ok" }));
  app.get("/ready", described("Readiness: models are loaded and requests are accepted"), async (_request, reply) => {
    const ready = state.phase === "ready" && catalog.ready;
    reply.code(ready ? 200 : 503);
    return { status: ready ? "ready" : state.phase === "draining" ? "draining" : "loading" };
  });
  if (!config.metrics || config.metricsPort !== null) return;
  const check = metricsCheck(config.metricsToken, gate);
  app.get("/metrics", described("Metrics for Prometheus"), async (request, reply) => {
    check(request.headers.authorization);
    return reply.type(metrics.registry.contentType).send(await metrics.registry.metrics());
  });
}

/** Serves the metrics on a separate port. */
export async function serveMetrics(config: ServeConfig & { readonly metricsPort: number }, gate: Gate, metrics: Metrics): Promise<Server> {
  const check = metricsCheck(config.metricsToken, gate);
  const server = createServer((request, response) => {
    const answer = async (): Promise<[status: number, type: string, text: string]> => {
      if (request.url?.split("?", 1)[0] !== "/metrics") throw new ServerError("not_found", "there is only /metrics here");
      check(request.headers.authorization);
      return [200, metrics.registry.contentType, await metrics.registry.metrics()];
    };
    answer()
      .catch((error: unknown): [number, string, string] => {
        const { status, body } = errorBody(error);
        return [status, "application/json", JSON.stringify(body)];
      })
      .then(([status, type, text]) => response.writeHead(status, { "content-type": type }).end(text));
  });
  server.listen(config.metricsPort, config.metricsHost);
  await once(server, "listening");
  return server;
}

/** Who may read the metrics: holders of the metrics token if there is one, else holders of an API key if there are keys, else anyone. */
export function metricsCheck(token: string | undefined, gate: Gate): (authorization: string | undefined) => void {
  if (token === undefined) return (authorization) => void gate.authenticate(bearerToken(authorization));
  const expected = digest(token);
  return (authorization) => {
    if (!timingSafeEqual(digest(bearerToken(authorization) ?? ""), expected))
      throw new ServerError("invalid_api_key", "the metrics need the metrics token: send the header 'Authorization: Bearer …'");
  };
}

function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}
