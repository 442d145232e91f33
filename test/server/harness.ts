// Servers for tests: on loopback, on a free port, closed after the test; their log lines are kept.
import { join } from "node:path";
import { Writable } from "node:stream";
import { onTestFinished } from "vitest";
import { readConfig } from "../../src/server/config.ts";
import { type ApiKey, changeKeys, createKey, type KeyTerms } from "../../src/server/keys.ts";
import { createLogger } from "../../src/server/logs.ts";
import { createServer, type Server } from "../../src/server/server.ts";
import { temporary } from "../cli/run.ts";

export interface TestServer {
  readonly server: Server;
  /** What was logged so far. */
  logs(): string;
}

/** A server of the model that comes along, with a small cache. It listens, and is ready, unless `listen` is false. */
export async function startServer(settings: Readonly<Record<string, unknown>> = {}, { listen = true } = {}): Promise<TestServer> {
  const { log, logs } = keptLog();
  const models = [{ name: "small", path: "default", threads: 1, kvCacheTokens: 8192 }];
  const server = await createServer(readConfig({ port: 0, models, web: false, ...settings }, "test"), log);
  onTestFinished(() => server.close());
  if (listen) await server.listen();
  return { server, logs };
}

/** A log at its most talkative, in memory. */
export function keptLog() {
  const lines: string[] = [];
  const sink = new Writable({
    write(chunk, _encoding, done) {
      lines.push(String(chunk));
      done();
    },
  });
  return { log: createLogger("trace", sink), logs: () => lines.join("") };
}

/** A file with one key, and the key. */
export async function keyFile(terms: Partial<KeyTerms> = {}): Promise<{ file: string; secret: string; key: ApiKey }> {
  const file = join(temporary(), "keys.json");
  const made = createKey({ name: "test", expires: null, models: null, requestsPerMinute: null, tokensPerDay: null, ...terms });
  await changeKeys(file, () => [made.key]);
  return { file, ...made };
}
