/** Routes for those who run the server: is it alive, is it ready, what are its numbers. */
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

/** Where the server is in its life. */
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
  app.get("/health", described("The process lives"), async () => ({ status: "ok" }));
  app.get("/ready", described("Its models are loaded, and it takes requests"), async (_request, reply) => {
    const ready = state.phase === "ready" && catalog.ready;
    reply.code(ready ? 200 : 503);
    return { status: ready ? "ready" : state.phase === "draining" ? "draining" : "loading" };
  });
  if (!config.metrics || config.metricsPort !== null) return;
  const check = metricsCheck(config.metricsToken, gate);
  app.get("/metrics", described("Numbers for Prometheus"), async (request, reply) => {
    check(request.headers.authorization);
    return reply.type(metrics.registry.contentType).send(await metrics.registry.metrics());
  });
}

/** Serves the numbers on a port of their own. */
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

/** Who may see the numbers: with a token of their own its holders; else whoever has a key, where there are keys. */
export function metricsCheck(token: string | undefined, gate: Gate): (authorization: string | undefined) => void {
  if (token === undefined) return (authorization) => void gate.authenticate(bearerToken(authorization));
  const expected = digest(token);
  return (authorization) => {
    if (!timingSafeEqual(digest(bearerToken(authorization) ?? ""), expected))
      throw new ServerError("invalid_api_key", "the metrics need their own token: send the header 'Authorization: Bearer …'");
  };
}

function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}
