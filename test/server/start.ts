/** A server with the bundled model on a free port, and functions for sending it requests. */
import OpenAI from "openai";
import { onTestFinished } from "vitest";
import { checkServeConfig } from "../../src/server/config.ts";
import { createServer, type Server } from "../../src/server/server.ts";

export interface Running {
  readonly server: Server;
  readonly url: string;
  /** Of gRPC; null if `grpcPort` was not set. */
  readonly grpcPort: number | null;
  readonly client: OpenAI;
}

/** Starts one; `log` gets every log line. */
export async function start(config: object = {}, log?: (line: string) => void): Promise<Running> {
  const checked = checkServeConfig({
    port: 0,
    logLevel: log ? "info" : "silent",
    // One thread: the server is tested here, and teams of threads slow each other down where test files run side by side.
    models: [{ name: "default", path: "default", kvCacheTokens: 32768, threads: 1 }],
    ...config,
  });
  const server = await createServer(checked, log && { write: log });
  const { url, grpcPort } = await server.start();
  return { server, url, grpcPort, client: new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 }) };
}

/** Starts one that ends with the test. */
export async function startHere(config: object = {}, log?: (line: string) => void): Promise<Running> {
  const running = await start({ drainTimeoutSeconds: 2, ...config }, log);
  onTestFinished(() => running.server.stop());
  return running;
}

/** The engine of the bundled model, to check that nothing is left behind. */
export async function engineOf({ server }: Pick<Running, "server">) {
  const { model, release } = await server.catalog.use("default");
  release();
  return model.engine;
}

export async function post(url: string, path: string, body: unknown, headers: Record<string, string> = {}): Promise<Response> {
  return fetch(`${url}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: typeof body === "string" ? body : JSON.stringify(body),
  });
}
