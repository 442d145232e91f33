/** The server's settings: each field with its default, check and description. Both flags and the file are validated here. Starts nothing. */
import { readFile } from "node:fs/promises";
import { parse as parseYaml, YAMLParseError } from "yaml";
import { z } from "zod";
import { DEVICES, isDevice } from "../api/device.ts";
import { KV_CACHE_DTYPES } from "../api/kv.ts";
import { RESIDENCES } from "../api/residence.ts";
import { PROBLEMS } from "../model/config.ts";
import { suggestion } from "../tokenizer/nearest.ts";

const count = (least: number) => z.int().min(least);
const seconds = z.number().positive().max(86_400);
const port = z.int().min(0).max(65_535);

const modelSchema = z.strictObject({
  name: z
    .string()
    .regex(/^[\w.:/@-]{1,200}$/, "may contain only letters, digits and . : / @ _ -")
    .describe("Name that clients use"),
  path: z.string().min(1).describe("A folder, a GGUF file, a hub id, or 'default', the bundled model; of an adapter, its base with it"),
  dtype: z.enum(["auto", "fp32", "fp16", "bf16", "fp8", "int8", "int4"]).default("auto").describe("Format of the weights in memory"),
  threads: count(1).max(1024).optional().describe("Compute threads; default: one per physical core"),
  device: z
    .string()
    .refine(isDevice, { error: `known devices are ${DEVICES}` })
    .default("auto")
    .describe(`Where to compute: ${DEVICES}`),
  kvCacheDtype: z.enum(KV_CACHE_DTYPES).optional().describe("Format of the KV cache; default: chosen by the format of the weights"),
  kvCacheTokens: count(32)
    .optional()
    .describe(
      "Capacity of the KV cache in tokens; default: 16 full sequences, or as many as fit half of the free memory that the weights leave (of the control group's memory limit, if there is one) or a quarter of memoryBudgetBytes",
    ),
  weights: z
    .enum(RESIDENCES)
    .default("auto")
    .describe(
      "Where weights are kept: in huge pages, filled before the model is ready (resident), in the file's pages, which processes share (mapped), or first there and then moved while it answers (auto)",
    ),
  adapters: z
    .record(z.string().regex(/^[\w.@-]{1,200}$/, "names of adapters may contain only letters, digits and . @ _ -"), z.string().min(1))
    .default({})
    .describe(
      "LoRA adapters in PEFT's format: folders or hub ids (user/repo@revision) by name; clients ask for model:name, and requests of all of them share steps",
    ),
  classifier: z
    .string()
    .min(1)
    .optional()
    .describe(
      "Folder or hub id of a LoRA adapter with a head 'score': serves the model as a classifier. Checkpoints of classifiers need none",
    ),
  labels: z
    .array(z.string().min(1).max(1000))
    .min(1)
    .max(65_536)
    .optional()
    .describe("A classifier's classes; default: those of config.json"),
  problemType: z
    .enum(PROBLEMS)
    .optional()
    .describe("What a classifier's scores are; default: that of config.json, else by the number of classes"),
  maxLoraRank: count(1).max(4096).default(256).describe("Largest rank of an adapter"),
  chunkSize: count(1).max(65_536).optional().describe("Maximum rows per step; default: 512, on a GPU 8192"),
  preload: z
    .boolean()
    .default(true)
    .describe("Load the model before the server is ready, and keep it loaded; otherwise load it on first use"),
});

/** What the engine calls the adapter of `classifier`. */
const CLASSIFIER = "default";
/** The most adapters of one model. */
const MOST_ADAPTERS = 1024;

/** One model to serve. */
export type ModelConfig = z.infer<typeof modelSchema>;

export const ServeConfig = z.strictObject({
  host: z.string().min(1).default("127.0.0.1").describe("Address to listen on; anything but loopback requires keys"),
  port: port.default(8080).describe("HTTP port; 0: any free port"),
  models: z
    .array(modelSchema)
    .min(1)
    .default([
      { name: "default", path: "default", dtype: "auto", device: "auto", weights: "auto", adapters: {}, maxLoraRank: 256, preload: true },
    ])
    .describe("Models by name"),
  memoryBudgetBytes: count(1).nullable().default(null).describe("Memory for loaded models and their KV caches; default: no limit"),
  idleUnloadSeconds: seconds.default(600).describe("Unload models that are not preloaded after this time without use"),
  offline: z.boolean().default(false).describe("Never download models from the hub"),

  keys: z.string().min(1).optional().describe("File of API keys, created by 'mixtape keys'; without it, no key is required"),
  keysGraceSeconds: z
    .number()
    .min(0)
    .max(86_400)
    .default(60)
    .describe("While the keys file cannot be read: how long the keys last read stay valid; then every key is refused"),
  usageFile: z
    .string()
    .min(1)
    .optional()
    .describe("Where each key's token usage of the day is stored; default: the keys file with .usage added"),
  insecureNoAuth: z.boolean().default(false).describe("Allow any address without keys: anyone who can reach the port can use the server"),
  tls: z
    .strictObject({ cert: z.string().min(1).describe("Certificate chain, PEM"), key: z.string().min(1).describe("Private key, PEM") })
    .optional()
    .describe("TLS certificate files; reloaded when they change, and on SIGHUP"),
  corsOrigins: z
    .array(z.string().regex(/^https?:\/\/[^/\s]+$/, "must be an origin like https://chat.example.com"))
    .default([])
    .describe("Origins of other web pages that may use the API"),
  allowedHosts: z
    .array(z.string().min(1))
    .default([])
    .describe("Host names besides localhost that a server without keys answers to; protects against DNS rebinding"),
  trustProxy: z
    .union([z.boolean(), z.array(z.string().min(1))])
    .default(false)
    .describe("Take the client's address from X-Forwarded-For: true, or the addresses of trusted proxies"),

  maxInProgress: count(1).default(256).describe("Maximum number of requests in progress"),
  maxQueued: count(0).default(0).describe("Maximum number of requests waiting for a place; more are rejected immediately with 429"),
  maxInProgressPerKey: count(1).default(128).describe("Maximum number of requests in progress or waiting per key"),
  queueTimeoutSeconds: seconds.default(10).describe("How long a request may wait before it is rejected with 429"),
  maxBodyBytes: count(1024)
    .default(4 * 2 ** 20)
    .describe("Maximum size of a request body"),
  maxJsonDepth: count(8).max(1000).default(100).describe("Maximum nesting depth of a request's JSON"),
  maxHeaderBytes: count(1024)
    .default(16 * 1024)
    .describe("Maximum size of a request's headers"),
  maxConnections: count(1)
    .default(4096)
    .describe("Maximum number of open connections per port; when there are more, those without a complete request are closed"),
  maxPromptTokens: count(1).nullable().default(null).describe("Maximum prompt length in tokens; default: the model's limit"),
  maxTokens: count(1).nullable().default(null).describe("Maximum answer length in tokens; default: the model's limit"),

  headersTimeoutSeconds: seconds.default(15).describe("Time a client has to send a request's headers"),
  requestTimeoutSeconds: seconds
    .default(30)
    .describe(
      "Time a client has to send a whole request, including time in the queue; the first one from the time of connecting, TLS included",
    ),
  keepAliveTimeoutSeconds: seconds.default(72).describe("How long a connection may be idle between requests"),
  stallTimeoutSeconds: seconds.default(30).describe("Disconnect a client that reads nothing of a waiting response for this long"),
  drainTimeoutSeconds: z.number().min(0).max(86_400).default(30).describe("How long running requests may continue after SIGTERM"),

  logLevel: z.enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"]).default("info").describe("Lowest level that is logged"),
  logContent: z.boolean().default(false).describe("Also log request bodies, including prompts"),
  metrics: z.boolean().default(true).describe("Serve Prometheus metrics at /metrics"),
  metricsPort: port.nullable().default(null).describe("Separate port for /metrics; default: the HTTP port"),
  metricsHost: z
    .string()
    .min(1)
    .default("127.0.0.1")
    .describe("Address of metricsPort; anything but loopback requires keys or metricsToken"),
  metricsToken: z.string().min(16).optional().describe("Bearer token that /metrics requires instead of an API key"),
  grpcPort: port.nullable().default(null).describe("gRPC port; 0: any free port; default: no gRPC"),
  grpcHost: z.string().min(1).nullable().default(null).describe("Address for gRPC; default: the HTTP address"),
  web: z.boolean().default(true).describe("Serve the web page at /"),
  docs: z.boolean().default(true).describe("Serve the API documentation at /docs"),
});

/** All settings, complete and validated. */
export type ServeConfig = z.infer<typeof ServeConfig>;

/** Invalid settings; the message is one line with the field, what was seen and what is allowed. */
export class ServerConfigError extends Error {
  override readonly name = "ServerConfigError";
}

/** Validates settings and fills in defaults. `source` names them in errors. Throws ServerConfigError. */
export function checkServeConfig(raw: unknown, source = "config"): ServeConfig {
  const result = ServeConfig.safeParse(raw);
  if (!result.success) throw new ServerConfigError(`${source}: ${result.error.issues.map(describeIssue).join("; ")}`);
  const config = result.data;
  for (const { name, adapters, classifier } of config.models) {
    if (classifier !== undefined && Object.hasOwn(adapters, CLASSIFIER))
      throw new ServerConfigError(
        `${source}: an adapter of ${JSON.stringify(name)} is called ${CLASSIFIER}, which is the classifier's own`,
      );
    const count = Object.keys(adapters).length;
    if (count > MOST_ADAPTERS)
      throw new ServerConfigError(`${source}: ${JSON.stringify(name)} has ${count} adapters; at most ${MOST_ADAPTERS} are supported`);
  }
  const names = config.models.flatMap(({ name, adapters }) => [name, ...Object.keys(adapters).map((each) => `${name}:${each}`)]);
  const twice = names.find((name, i) => names.indexOf(name) !== i);
  if (twice !== undefined) throw new ServerConfigError(`${source}: two models are named ${JSON.stringify(twice)}; names must be unique`);
  checkExposure(config, source);
  return config;
}

/** The settings of a file, not yet validated: JSON for names ending in .json, else YAML. Rejects with ServerConfigError. */
export async function readServeConfig(file: string): Promise<Readonly<Record<string, unknown>>> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (cause) {
    throw new ServerConfigError(`${file}: can't be read (${(cause as Error).message})`, { cause });
  }
  let value: unknown;
  try {
    value = file.endsWith(".json") ? JSON.parse(text) : parseYaml(text);
  } catch (error) {
    // Without the parser's words, which quote the file: it may hold tokens.
    throw new ServerConfigError(`${file}: broken ${file.endsWith(".json") ? "JSON" : "YAML"}${placeOf(error)}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new ServerConfigError(`${file}: must be an object of settings, like {"port": 8080}`);
  return value as Record<string, unknown>;
}

/** Where a parser stopped, as far as it says so. */
function placeOf(error: unknown): string {
  if (error instanceof YAMLParseError && error.linePos) return `, at line ${error.linePos[0].line}, column ${error.linePos[0].col}`;
  const position = /at position (\d+)/.exec((error as Error).message)?.[1];
  return position === undefined ? "" : `, at character ${position}`;
}

/** The JSON schema of the config file, for editors and validators. */
export function configJsonSchema(): object {
  return z.toJSONSchema(ServeConfig, { io: "input", target: "draft-2020-12" });
}

const LOOPBACK = /^(localhost|127(\.\d{1,3}){3}|::1|\[::1\])$/i;

/** True for addresses that only this machine can reach. */
export function isLoopback(host: string): boolean {
  return LOOPBACK.test(host);
}

/** Throws ServerConfigError if the server would be open to other machines without keys. */
function checkExposure(config: ServeConfig, source: string): void {
  if (config.keys !== undefined || config.insecureNoAuth) return;
  const metricsHost = config.metrics && config.metricsPort !== null && config.metricsToken === undefined ? config.metricsHost : null;
  const hosts = [config.host, config.grpcPort === null ? null : config.grpcHost, metricsHost];
  const open = hosts.find((host) => host !== null && !isLoopback(host));
  if (open !== undefined && open !== null && open === metricsHost && isLoopback(config.host))
    throw new ServerConfigError(
      `${source}: metricsHost: ${open} can be reached from other machines: set metricsToken, or keys, or pass --insecure-no-auth`,
    );
  if (open !== undefined)
    throw new ServerConfigError(
      `${source}: ${open} can be reached from other machines, and there are no keys: create some with 'mixtape keys create' and pass --keys, or pass --insecure-no-auth`,
    );
}

function describeIssue(issue: z.core.$ZodIssue): string {
  const at = issue.path.length ? formatPath(issue.path) : "";
  if (issue.code === "unrecognized_keys")
    return issue.keys
      .map((key) => `${formatPath([...issue.path, key])}: there is no such option${suggestion(key, optionsAt(issue.path))}`)
      .join("; ");
  if (issue.code === "invalid_key") return `${at}: ${issue.issues[0].message}`;
  return `${at}: ${issue.message}`;
}

function optionsAt([first]: readonly PropertyKey[]): readonly string[] {
  if (first === undefined) return Object.keys(ServeConfig.shape);
  return first === "models" ? Object.keys(modelSchema.shape) : [];
}

/** A path into JSON as people write it: `messages[2].content`. */
function formatPath(path: readonly PropertyKey[]): string {
  return path.map((part, i) => (typeof part === "number" ? `[${part}]` : i === 0 ? String(part) : `.${String(part)}`)).join("");
}
