/** Flags of `mixtape serve`, derived from the settings' schema, and merging flags with the config file. Starts nothing. */
import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
import { type Command, InvalidArgumentError, Option } from "commander";
import { z } from "zod";
import { KV_CACHE_DTYPES } from "../api/kv.ts";
import type { Residence } from "../api/residence.ts";
import { checkServeConfig, readServeConfig, ServeConfig } from "../server/config.ts";
import { UsageError } from "./failure.ts";
import { DTYPES, deviceOption, residenceOption, whole } from "./options.ts";

export interface ServeFlags extends Readonly<Record<string, unknown>> {
  readonly config?: string;
  readonly printConfigSchema?: boolean;
  readonly model?: readonly { readonly name: string; readonly path: string }[];
  readonly adapter?: readonly { readonly model: string | null; readonly name: string; readonly folder: string }[];
  readonly dtype?: string;
  readonly threads?: number;
  readonly device?: string;
  readonly kvCacheDtype?: string;
  readonly kvCacheTokens?: number;
  readonly weights?: Residence;
  readonly tlsCert?: string;
  readonly tlsKey?: string;
}

/** Settings in the order of the help text. */
const GROUPS: Readonly<Record<string, readonly (keyof ServeConfig & string)[]>> = {
  "Network options:": ["host", "port", "grpcPort", "grpcHost", "corsOrigins", "allowedHosts", "trustProxy"],
  "Key options:": ["keys", "keysGraceSeconds", "usageFile", "insecureNoAuth"],
  "Memory options:": ["memoryBudgetBytes", "idleUnloadSeconds", "offline"],
  "Limits:": [
    "maxInProgress",
    "maxInProgressPerKey",
    "maxQueued",
    "queueTimeoutSeconds",
    "maxBodyBytes",
    "maxJsonDepth",
    "maxHeaderBytes",
    "maxConnections",
    "maxPromptTokens",
    "maxTokens",
  ],
  "Timeouts:": ["headersTimeoutSeconds", "requestTimeoutSeconds", "keepAliveTimeoutSeconds", "stallTimeoutSeconds", "drainTimeoutSeconds"],
  "Other options:": ["web", "docs", "metrics", "metricsPort", "metricsHost", "metricsToken", "logLevel", "logContent"],
};

export function addSettings(command: Command): void {
  command
    .optionsGroup("Options:")
    .option("-c, --config <file>", "config file, YAML or JSON; flags override it")
    .option("--print-config-schema", "print the JSON schema of the config file")
    .optionsGroup("Model options:")
    .addOption(
      new Option("-m, --model <[name=]path>", "a folder, a GGUF file, a hub id, or default (repeatable; default: default)").argParser(
        collectModel,
      ),
    )
    .addOption(
      new Option(
        "--adapter <[model:]name=folder|id>",
        "LoRA adapter in PEFT's format, a folder or a hub id, served as model:name (repeatable)",
      ).argParser(collectAdapter),
    )
    .addOption(new Option("--dtype <format>", "weight format in memory (default: auto)").choices(DTYPES))
    .option("--threads <n>", "compute threads (default: one per core)", whole(1))
    .addOption(deviceOption())
    .addOption(new Option("--kv-cache-dtype <format>", "KV cache format").choices(KV_CACHE_DTYPES))
    .option("--kv-cache-tokens <n>", "KV cache capacity of a model, in tokens", whole(32))
    .addOption(residenceOption());
  for (const [group, fields] of Object.entries(GROUPS)) {
    command.optionsGroup(group);
    for (const field of fields) command.addOption(flagOf(field));
  }
  command
    .optionsGroup("Network options:")
    .option("--tls-cert <file>", "certificate chain, PEM; reloaded when it changes and on SIGHUP")
    .option("--tls-key <file>", "its private key, PEM");
}

/** The file's settings, overridden by flags. */
export async function settings(flags: ServeFlags): Promise<ServeConfig> {
  const {
    config: file,
    model,
    adapter = [],
    dtype,
    threads,
    device,
    kvCacheDtype,
    kvCacheTokens,
    weights,
    tlsCert,
    tlsKey,
    printConfigSchema: _,
    ...rest
  } = flags;
  const inFile = file === undefined ? {} : await readServeConfig(file);
  const fromFlags = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== undefined));
  const how = Object.fromEntries(
    Object.entries({ dtype, threads, device, kvCacheDtype, kvCacheTokens, weights }).filter(([, value]) => value !== undefined),
  );
  const named = model ?? (inFile["models"] === undefined ? [{ name: "default", path: "default" }] : undefined);
  if (named === undefined && (Object.keys(how).length > 0 || adapter.length > 0))
    throw new UsageError(`${file} lists the models, so set their options there, or name the models with --model`);
  if ((tlsCert === undefined) !== (tlsKey === undefined)) throw new UsageError("--tls-cert and --tls-key go together");
  const tls = tlsCert === undefined ? {} : { tls: { cert: tlsCert, key: tlsKey } };
  for (const each of adapter)
    if (each.model === null ? named?.length !== 1 : !named?.some(({ name }) => name === each.model))
      throw new UsageError(
        `--adapter ${each.model === null ? "" : `${each.model}:`}${each.name}: say whose it is, as model:name=folder; the models are ${named?.map(({ name }) => name).join(", ")}`,
      );
  const adaptersOf = (model: string) =>
    Object.fromEntries(adapter.filter((a) => a.model === null || a.model === model).map(({ name, folder }) => [name, folder]));
  const models = named?.map((each) => ({ ...each, ...how, adapters: adaptersOf(each.name) }));
  return checkServeConfig({ ...inFile, ...fromFlags, ...tls, ...(models ? { models } : {}) }, file ?? "serve");
}

/** The flag of a setting: name, type, help and default come from the schema. */
function flagOf(field: keyof ServeConfig & string): Option {
  const schema: z.ZodType = ServeConfig.shape[field];
  const { inner, fallback } = unwrap(schema);
  const name = flagName(field);
  const help = `${helpOf(schema)}${fallback === undefined || fallback === null || typeof fallback === "boolean" || Array.isArray(fallback) ? "" : ` (default: ${fallback})`}`;
  if (inner instanceof z.ZodBoolean && fallback === true) return new Option(`--no-${name}`, `don't ${help}`).default(undefined);
  if (inner instanceof z.ZodBoolean) return new Option(`--${name}`, help);
  if (inner instanceof z.ZodNumber) return new Option(`--${name} <n>`, help).argParser((text) => checked(schema, numeric(text)));
  if (inner instanceof z.ZodEnum) return new Option(`--${name} <name>`, help).choices(inner.options.map(String));
  if (inner instanceof z.ZodArray)
    return new Option(`--${name} <text>`, `${help} (repeatable)`).argParser<readonly unknown[]>(
      (text, before = []) => checked(schema, [...before, text]) as readonly unknown[],
    );
  if (inner instanceof z.ZodUnion)
    return new Option(`--${name} <list>`, help).argParser((text) => checked(schema, text === "true" || text.split(",")));
  return new Option(`--${name} <text>`, help).argParser((text) => checked(schema, text));
}

/** The schema without its default and nullability. */
function unwrap(schema: z.ZodType): { readonly inner: z.ZodType; readonly fallback: unknown } {
  let inner = schema;
  let fallback: unknown;
  for (;;) {
    if (inner instanceof z.ZodDefault) fallback = inner.def.defaultValue;
    else if (!(inner instanceof z.ZodNullable) && !(inner instanceof z.ZodOptional)) return { inner, fallback };
    inner = inner.def.innerType as z.ZodType;
  }
}

function checked(schema: z.ZodType, value: unknown): unknown {
  const result = schema.safeParse(value);
  if (!result.success) throw new InvalidArgumentError(`${result.error.issues[0].message}.`);
  return result.data;
}

function numeric(text: string): number {
  if (!/^\d+(\.\d+)?$/.test(text)) throw new InvalidArgumentError("It must be a number.");
  return Number(text);
}

function collectModel(text: string, before: ServeFlags["model"] = []): ServeFlags["model"] {
  const [, given, path] = /^(?:([^=]+)=)?(.+)$/.exec(text) ?? [];
  if (path === undefined) throw new InvalidArgumentError("It must be like name=path, or a path.");
  const name = given ?? (existsSync(path) ? basename(resolve(path), ".gguf") : path);
  return [...before, { name, path }];
}

function collectAdapter(text: string, before: ServeFlags["adapter"] = []): ServeFlags["adapter"] {
  const [, full, folder] = /^([^=]+)=(.+)$/.exec(text) ?? [];
  if (full === undefined || folder === undefined) throw new InvalidArgumentError("It must be like name=folder, or model:name=folder.");
  const at = full.lastIndexOf(":");
  return [...before, { model: at < 0 ? null : full.slice(0, at), name: full.slice(at + 1), folder }];
}

/** A setting's description as help text: names of other settings become flags. */
function helpOf(schema: z.ZodType): string {
  const text = (schema.description ?? "").replace(/\b[a-z]+([A-Z][a-z]+)+\b/g, (word) =>
    word in ServeConfig.shape ? `--${flagName(word)}` : word,
  );
  return /^[A-Z][a-z ]/.test(text) ? text[0].toLowerCase() + text.slice(1) : text;
}

/** Converts `maxQueued` to `max-queued`. */
function flagName(field: string): string {
  return field.replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`);
}
