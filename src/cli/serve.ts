/** `mixtape serve`: a private service that OpenAI's clients work against. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { DTYPES, examples, KV_CACHE_DTYPES, real, whole } from "./options.ts";
import { notice } from "./terminal.ts";

interface ServeFlags {
  readonly config?: string;
  readonly printConfigSchema?: boolean;
  readonly model?: readonly { name: string; path: string }[];
  readonly dtype?: string;
  readonly threads?: number;
  readonly kvCacheDtype?: string;
  readonly kvCacheTokens?: number;
  readonly tlsCert?: string;
  readonly tlsKey?: string;
  readonly corsOrigin?: readonly string[];
  readonly [flag: string]: unknown;
}

/** Flags that are fields of the config under the same name. */
const FIELDS = [
  "host",
  "port",
  "grpcPort",
  "keys",
  "insecureNoAuth",
  "trustProxy",
  "maxInProgress",
  "maxInProgressPerKey",
  "maxTokens",
  "maxBodyBytes",
  "requestTimeoutSeconds",
  "drainTimeoutSeconds",
  "idleUnloadSeconds",
  "memoryBudgetBytes",
  "metricsToken",
  "logLevel",
] as const;

export function addServe(program: Command): void {
  program
    .command("serve")
    .description("Serve models over HTTP, for OpenAI's clients. Listens on this machine alone unless told otherwise.")
    .optionsGroup("Models:")
    .option("-m, --model <name=path>", "a model, and the name that clients know it by (repeatable; default: default)", collectModel)
    .addOption(new Option("--dtype <format>", "format of the weights in memory").choices(DTYPES))
    .option("--threads <n>", "threads that compute (default: one a physical core)", whole(1))
    .addOption(new Option("--kv-cache-dtype <format>", "format of cached keys and values").choices(KV_CACHE_DTYPES))
    .option("--kv-cache-tokens <n>", "tokens that the cache has room for", whole(1))
    .option("--idle-unload-seconds <s>", "models without preload are unloaded after so long (default: 600)", real(0))
    .option("--memory-budget-bytes <n>", "of all models' weights together", whole(1))
    .optionsGroup("Network:")
    .option("--host <address>", "address to listen on (default: 127.0.0.1)")
    .option("--port <n>", "0 is any free port (default: 8080)", whole(0))
    .option("--grpc-port <n>", "serve gRPC too, on this port (proto/mixtape.proto)", whole(0))
    .option("--tls-cert <file>", "PEM certificate")
    .option("--tls-key <file>", "PEM key")
    .option("--cors-origin <origin>", "web pages of this origin may ask (repeatable)", (v: string, all: string[] = []) => [...all, v])
    .option("--trust-proxy", "believe X-Forwarded-For")
    .optionsGroup("Who may ask, and how much:")
    .option("--keys <file>", "API keys, made by 'mixtape keys create'")
    .option("--insecure-no-auth", "listen beyond this machine without keys")
    .option("--max-in-progress <n>", "requests at the same time; others get 429 (default: 256)", whole(1))
    .option("--max-in-progress-per-key <n>", "the same of one key (default: 128)", whole(1))
    .option("--max-tokens <n>", "tokens of an answer at most", whole(1))
    .option("--max-body-bytes <n>", "size of a request (default: 4 MiB)", whole(1024))
    .option("--request-timeout-seconds <s>", "for a request to arrive whole (default: 30)", real(0))
    .optionsGroup("Operations:")
    .option("--config <file>", "all of this in a file, JSON or YAML; flags go before it")
    .option("--print-config-schema", "print the file's JSON schema, and end")
    .option("--drain-timeout-seconds <s>", "for answers to end after SIGTERM (default: 30)", real(0))
    .option("--metrics-token <token>", "bearer token for /metrics")
    .addOption(new Option("--log-level <level>", "how much is logged").choices(["silent", "error", "warn", "info", "debug"]))
    .addHelpText(
      "after",
      examples(
        ["mixtape serve", "the model that comes along, on http://127.0.0.1:8080"],
        ["mixtape serve -m ernie=./ernie-int4 --port 9000", "a model of your own"],
        ["mixtape keys create keys.json --name team && mixtape serve --host 0.0.0.0 --keys keys.json", "for others too"],
        ["curl localhost:8080/v1/models", "which models there are"],
      ),
    )
    .action(serve);
}

async function serve(flags: ServeFlags): Promise<void> {
  const { checkServeConfig, readServeConfig, ServeConfig } = await import("../server/config.ts");
  if (flags.printConfigSchema) {
    const { z } = await import("zod");
    process.stdout.write(`${JSON.stringify(z.toJSONSchema(ServeConfig, { io: "input" }), null, 2)}\n`);
    return;
  }
  const file = flags.config === undefined ? {} : await readServeConfig(flags.config);
  const given = Object.fromEntries(FIELDS.flatMap((name) => (flags[name] === undefined ? [] : [[name, flags[name]]])));
  const models = (flags.model ?? file.models ?? [{ name: "default", path: "default" }]).map((m) => {
    const own = { dtype: flags.dtype, threads: flags.threads, kvCacheDtype: flags.kvCacheDtype, kvCacheTokens: flags.kvCacheTokens };
    return { ...m, ...Object.fromEntries(Object.entries(own).filter(([, value]) => value !== undefined)) };
  });
  if ((flags.tlsCert === undefined) !== (flags.tlsKey === undefined)) throw new Error("--tls-cert and --tls-key go together");
  const tls = flags.tlsCert === undefined ? {} : { tls: { cert: flags.tlsCert, key: flags.tlsKey } };
  const cors = flags.corsOrigin === undefined ? {} : { corsOrigins: flags.corsOrigin };
  const config = checkServeConfig({ ...file, ...given, ...tls, ...cors, models }, flags.config ?? "serve");

  const { createServer, readTls } = await import("../server/server.ts");
  const server = await createServer(config);
  let stopping = false;
  const stop = (signal: NodeJS.Signals) => {
    if (stopping) process.exit(1); // asked twice: at once
    stopping = true;
    server.stop().then(
      () => process.exit(0),
      (error: unknown) => {
        server.app.log.error({ err: error, signal }, "could not stop in order");
        process.exit(1);
      },
    );
  };
  process.on("SIGTERM", stop).on("SIGINT", stop);
  process.on("SIGHUP", () => {
    if (config.tls) (server.app.server as unknown as { setSecureContext(o: object): void }).setSecureContext(readTls(config.tls));
  });
  const { url, grpcPort } = await server.start();
  const names = config.models.map((m) => m.name).join(", ");
  notice(
    `mixtape serves ${names} at ${url} (${config.keys ? "keys needed" : "open to this machine, no keys"}); API at ${url}/docs${grpcPort === null ? "" : `, gRPC on port ${grpcPort}`}`,
  );
}

function collectModel(text: string, before: readonly { name: string; path: string }[] = []): { name: string; path: string }[] {
  const at = text.indexOf("=");
  if (at === 0 || text === "") throw new InvalidArgumentError("It must be like name=folder, or a folder.");
  const model =
    at < 0
      ? { name: text.replace(/\/+$/, "").split("/").at(-1) ?? text, path: text }
      : { name: text.slice(0, at), path: text.slice(at + 1) };
  return [...before, model];
}
