/** Routes for those who run the server: is it alive, is it ready, what are its numbers. */
import { createHash, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";
import type { FastifyInstance } from "fastify";
import { type Config, ServerConfigError } from "./config.ts";
import { ServerError } from "./errors.ts";
import { bearerToken, type Gate } from "./gate.ts";
import type { Metrics } from "./metrics.ts";

/** Where the server is in its life. */
export interface State {
  phase: "starting" | "ready" | "draining";
}

export interface OperationsParts {
  readonly state: State;
  readonly config: Config;
  readonly gate: Gate;
  readonly metrics: Metrics;
}

export async function registerOperations(app: FastifyInstance, { state, config, gate, metrics }: OperationsParts): Promise<void> {
  app.get("/health", { schema: { summary: "Whether the process lives", tags: ["operations"], security: [] } }, async () => ({
    status: "ok",
  }));
  app.get("/ready", { schema: { summary: "Whether requests may be sent here", tags: ["operations"], security: [] } }, async () => {
    if (state.phase === "ready") return { status: "ready" };
    const why = state.phase === "starting" ? "models are being loaded" : "the server is going down";
    throw new ServerError("not_ready", why, { retryAfterSeconds: 1 });
  });
  if (!config.metrics || config.metricsPort !== null) return;
  const check = metricsCheck(config, gate);
  app.get("/metrics", { schema: { summary: "Numbers for Prometheus", tags: ["operations"] } }, async (request, reply) => {
    check(request.headers.authorization);
    return reply.type(metrics.contentType).send(await metrics.text());
  });
}

/** Who may see the numbers: with a token of their own its holders; else whoever has a key, where there are keys. */
export function metricsCheck({ metricsTokenFile }: Config, gate: Gate | null): (authorization: string | undefined) => void {
  if (metricsTokenFile === null) return (authorization) => void gate?.authenticate(bearerToken(authorization));
  const expected = digest(readToken(metricsTokenFile));
  return (authorization) => {
    if (!timingSafeEqual(digest(bearerToken(authorization) ?? ""), expected))
      throw new ServerError("invalid_api_key", "the metrics need their own token: send the header 'Authorization: Bearer …'");
  };
}

function readToken(file: string): string {
  let token: string;
  try {
    token = readFileSync(file, "utf8").trim();
  } catch (cause) {
    throw new ServerConfigError(`${file}: the metrics' token can't be read (${(cause as Error).message})`, { cause });
  }
  if (token.length < 16) throw new ServerConfigError(`${file}: the metrics' token has ${token.length} characters; it needs at least 16`);
  return token;
}

function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}
