/** Routes for operators: liveness, readiness and metrics. Knows no model. */
import { createHash, timingSafeEqual } from "node:crypto";
import type { FastifyInstance } from "fastify";
import { bearerToken, type Gate } from "../access/gate.ts";
import type { Catalog } from "../catalog.ts";
import type { ServeConfig } from "../config.ts";
import { ServerError } from "../errors.ts";
import type { Metrics } from "../metrics.ts";

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
    const { keysFault } = gate;
    const loading = state.phase === "draining" ? "draining" : state.phase === "ready" && catalog.ready ? null : "loading";
    reply.code(loading === null && keysFault === null ? 200 : 503);
    if (loading !== null || keysFault === null) return { status: loading ?? "ready" };
    return { status: keysFault.refusing ? "refusing keys" : "keys not readable", reason: keysFault.reason };
  });
  if (config.metrics && config.metricsPort === null) registerMetrics(app, { config, gate, metrics });
}

/** The only route of the metrics' own port. */
export function registerMetrics(
  app: FastifyInstance,
  { config, gate, metrics }: Pick<OperationsParts, "config" | "gate" | "metrics">,
): void {
  const check = metricsCheck(config.metricsToken, gate);
  app.get("/metrics", { schema: { tags: ["operations"], summary: "Metrics for Prometheus" } }, async (request, reply) => {
    check(request.headers.authorization);
    return reply.type(metrics.registry.contentType).send(await metrics.registry.metrics());
  });
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
