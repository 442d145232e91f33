/** What `mixtape serve` can be told: one schema for the config file and the flags. */
import { readFile } from "node:fs/promises";
import { parse } from "yaml";
import { z } from "zod";

const model = z.strictObject({
  name: z.string().min(1).describe("What clients call it."),
  path: z.string().min(1).describe("A folder, a GGUF file, a hub id, or default."),
  dtype: z.enum(["auto", "fp32", "fp16", "bf16", "int8", "int4"]).default("auto").describe("Format of the weights in memory."),
  threads: z.number().int().min(1).optional().describe("Threads that compute. Default: one a physical core."),
  kvCacheDtype: z.enum(["fp32", "fp16", "int8"]).optional().describe("Format of cached keys and values. Default: by the weights."),
  kvCacheTokens: z.number().int().min(1).optional().describe("Tokens that the cache has room for. Default: by the free memory."),
  preload: z.boolean().default(true).describe("Load it at the start and keep it; otherwise when it is first asked for."),
});

export const ServeConfig = z.strictObject({
  host: z.string().default("127.0.0.1").describe("Address to listen on. Other than loopback needs keys."),
  port: z.number().int().min(0).max(65535).default(8080).describe("0: any free port."),
  grpcPort: z.number().int().min(0).max(65535).nullable().default(null).describe("Port of the gRPC service; null: none, 0: any free port."),
  models: z
    .array(model)
    .min(1)
    .default([{ name: "default", path: "default", dtype: "auto", preload: true }]),
  keys: z.string().optional().describe("File of API keys, made by `mixtape keys create`. Without it everyone may ask."),
  insecureNoAuth: z.boolean().default(false).describe("Listen beyond loopback without keys."),
  tls: z.strictObject({ cert: z.string(), key: z.string() }).optional().describe("PEM files. Read again on SIGHUP."),
  trustProxy: z.boolean().default(false).describe("Believe X-Forwarded-For, behind a proxy of one's own."),
  corsOrigins: z.array(z.string()).default([]).describe("Origins of web pages that may ask. Default: none but the server's own."),
  maxInProgress: z.number().int().min(1).default(256).describe("Requests that are answered or wait at the same time; others get 429."),
  maxInProgressPerKey: z.number().int().min(1).default(128).describe("The same of one key."),
  maxTokens: z.number().int().min(1).nullable().default(null).describe("Tokens of an answer at most; null: as the model allows."),
  maxBodyBytes: z
    .number()
    .int()
    .min(1024)
    .default(4 * 2 ** 20),
  requestTimeoutSeconds: z.number().positive().default(30).describe("For a request to arrive whole."),
  drainTimeoutSeconds: z.number().positive().default(30).describe("For answers to end after SIGTERM."),
  idleUnloadSeconds: z.number().positive().default(600).describe("Models without `preload` are unloaded after so long without a request."),
  memoryBudgetBytes: z.number().int().positive().nullable().default(null).describe("Of all models' weights together; null: no budget."),
  metricsToken: z.string().min(16).optional().describe("Bearer token for /metrics. Default: open to whoever reaches the port."),
  logLevel: z.enum(["silent", "error", "warn", "info", "debug"]).default("info"),
});
export type ServeConfig = z.infer<typeof ServeConfig>;
export type ModelConfig = ServeConfig["models"][number];

/** Reads a config file (JSON or YAML). Throws a one-line error that names file and field. */
export async function readServeConfig(file: string): Promise<z.input<typeof ServeConfig>> {
  const text = await readFile(file, "utf8").catch((cause) => {
    throw new Error(`${file}: cannot be read: ${(cause as Error).message}`, { cause });
  });
  let value: unknown;
  try {
    value = file.endsWith(".json") ? JSON.parse(text) : parse(text);
  } catch (cause) {
    throw new Error(`${file}: ${(cause as Error).message.split("\n")[0]}`, { cause });
  }
  return (value ?? {}) as z.input<typeof ServeConfig>;
}

/** Checks a whole config and fills in defaults. Throws a one-line error that names the field. */
export function checkServeConfig(value: unknown, source = "config"): ServeConfig {
  const parsed = ServeConfig.safeParse(value);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    const keys = issue.code === "unrecognized_keys" ? issue.keys.slice(0, 1) : [];
    const at = [...issue.path, ...keys].join(".");
    throw new Error(`${source}: ${at ? `${at}: ` : ""}${keys.length ? "there is no such option" : issue.message}`);
  }
  const config = parsed.data;
  const names = config.models.map((m) => m.name);
  if (new Set(names).size < names.length) throw new Error(`${source}: models: two have the same name`);
  const loopback = ["127.0.0.1", "::1", "localhost"].includes(config.host);
  if (!loopback && !config.keys && !config.insecureNoAuth)
    throw new Error(
      `${config.host} can be reached from other machines, and there are no keys: make some with 'mixtape keys create' and pass --keys, or say --insecure-no-auth`,
    );
  return config;
}
