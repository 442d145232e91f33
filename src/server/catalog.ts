/** Models by name: loaded when first asked for, shared by all who use them, unloaded when idle or when room is needed. */
import { endTokenIds } from "../api/generation.ts";
import { type LoadedModel, loadModel } from "../api/load.ts";
import { resolvePretrained } from "../api/model.ts";
import { openTokenizer } from "../api/tokenizer.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import { kvBytesPerToken } from "../engine/engine.ts";
import { Grammars } from "../grammar/grammars.ts";
import { Turns } from "../grammar/turns.ts";
import { readConfig } from "../model/config.ts";
import { ernie } from "../model/ernie.ts";
import { measure } from "../model/size.ts";
import { Encoder } from "./completion/encoder.ts";
import type { Catalog, ServedModel } from "./completion/request.ts";
import type { ModelConfig } from "./config.ts";
import { ServerError } from "./errors.ts";

export interface CatalogOptions {
  readonly idleUnloadSeconds: number;
  /** Bytes of all weights and KV caches together; null: no budget. */
  readonly memoryBudgetBytes: number | null;
  /** Never ask the hub. */
  readonly offline: boolean;
  /** Told of what happens to models: for the log. */
  readonly onEvent: (what: "loading" | "loaded" | "unloaded" | "failed", name: string, detail: Readonly<Record<string, unknown>>) => void;
}

interface Entry {
  readonly config: ModelConfig;
  readonly created: number;
  loading: Promise<ServedModel> | null;
  model: ServedModel | null;
  /** What it takes: an estimate while it loads, 0 where it is not in memory. */
  bytes: number;
  users: number;
  usedAt: number;
}

export class ModelCatalog implements Catalog {
  readonly #entries = new Map<string, Entry>();
  readonly #options: CatalogOptions;
  readonly #idle: NodeJS.Timeout;
  /** What all models do on the event loop. */
  readonly #turns = new Turns();
  #turn: Promise<unknown> = Promise.resolve();
  #closed = false;

  constructor(models: readonly ModelConfig[], options: CatalogOptions) {
    this.#options = options;
    const created = Math.floor(Date.now() / 1000);
    for (const config of models)
      this.#entries.set(config.name, { config, created, loading: null, model: null, bytes: 0, users: 0, usedAt: 0 });
    this.#idle = setInterval(() => this.#unloadIdle(), Math.min(30, options.idleUnloadSeconds) * 1000);
    this.#idle.unref();
  }

  list(): { name: string; created: number; loaded: boolean }[] {
    return [...this.#entries.values()].map(({ config, created, model }) => ({ name: config.name, created, loaded: model !== null }));
  }

  /** Those that are in memory. */
  loaded(): ServedModel[] {
    return [...this.#entries.values()].flatMap(({ model }) => (model ? [model] : []));
  }

  /** True once every model that is to be kept is loaded. */
  get ready(): boolean {
    return !this.#closed && [...this.#entries.values()].every(({ config, model }) => !config.preload || model !== null);
  }

  /** Loads what is to be kept. */
  async preload(): Promise<void> {
    for (const { config } of this.#entries.values()) if (config.preload) (await this.use(config.name)).release();
  }

  async use(name: string): Promise<{ model: ServedModel; release(): void }> {
    const entry = this.#entries.get(name);
    if (!entry) {
      const known = [...this.#entries.keys()].join(", ");
      throw new ServerError("model_not_found", `there is no model '${name}' here; there are ${known}`, { param: "model" });
    }
    if (this.#closed) throw new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 5 });
    entry.users++; // also while it loads, so that nobody unloads it meanwhile
    try {
      entry.loading ??= this.#load(entry);
      const model = await entry.loading;
      let released = false;
      return {
        model,
        release: () => {
          if (released) return;
          released = true;
          entry.users--;
          entry.usedAt = performance.now();
        },
      };
    } catch (error) {
      entry.users--;
      entry.loading = null; // the next one tries again
      throw error;
    }
  }

  /** Unloads everything. Requests that still run fail. */
  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#idle);
    for (const entry of this.#entries.values()) {
      const model = entry.model ?? (await entry.loading?.catch(() => null));
      if (model) await Promise.all([model.engine.dispose(), model.encoder.close()]);
      entry.model = null;
    }
  }

  async #load(entry: Entry): Promise<ServedModel> {
    const { name, path, dtype, threads, device, kvCacheDtype, chunkSize } = entry.config;
    const { onEvent } = this.#options;
    onEvent("loading", name, { path });
    const start = performance.now();
    try {
      const folder = await resolvePretrained(path, { local_files_only: this.#options.offline || undefined });
      const { weightBytes, kvTokens } = await this.#reserve(entry, folder);
      const tokenizer = await openTokenizer(folder);
      const { config, checkpoint, engine, weights } = await loadModel(folder, {
        dtype,
        threads,
        kv_cache_dtype: kvCacheDtype,
        kv_cache_tokens: kvTokens,
        device,
        chunk_size: chunkSize,
        warning_callback: (warning) => onEvent("loading", name, { warning }),
      });
      entry.bytes = weightBytes + engine.cache.count * BLOCK_TOKENS * engine.kvBytesPerToken;
      const generationConfig = checkpoint.generationConfig ?? {};
      entry.model = {
        name,
        created: entry.created,
        config,
        tokenizer,
        engine,
        dtype: mainFormat(weights),
        generationConfig,
        encoder: new Encoder(folder, tokenizer, this.#turns),
        grammars: new Grammars(tokenizer, config.vocabSize, endTokenIds(generationConfig, config), this.#turns),
      };
      onEvent("loaded", name, { seconds: (performance.now() - start) / 1000, bytes: entry.bytes });
      return entry.model;
    } catch (cause) {
      entry.bytes = 0;
      onEvent("failed", name, { reason: cause instanceof Error ? cause.message : String(cause) });
      if (cause instanceof ServerError) throw cause;
      throw new ServerError("not_ready", `the model '${name}' could not be loaded; the server's log says why`, {
        cause,
        retryAfterSeconds: 30,
      });
    }
  }

  /** Estimates what a model will take, and makes room for it where there is a budget. Loads ask one after the other. */
  #reserve(entry: Entry, folder: string): Promise<Footprint> {
    const run = this.#turn.then(async () => {
      const { memoryBudgetBytes: budget } = this.#options;
      const footprint = await estimate(folder, entry.config, budget);
      await this.#makeRoom(entry, footprint.weightBytes + footprint.kvBytes);
      entry.bytes = footprint.weightBytes + footprint.kvBytes;
      return footprint;
    });
    this.#turn = run.catch(() => {}); // its caller hears of a failure
    return run;
  }

  /** Unloads those that nobody uses, the one unused for longest first, until `bytes` fit. */
  async #makeRoom(wanted: Entry, bytes: number): Promise<void> {
    const { memoryBudgetBytes: budget } = this.#options;
    if (budget === null) return;
    if (bytes > budget) throw new Error(`it takes ${bytes} bytes with its KV cache, and memoryBudgetBytes is ${budget}`);
    const held = () => [...this.#entries.values()].filter((e) => e !== wanted && e.bytes > 0);
    while (held().reduce((sum, e) => sum + e.bytes, bytes) > budget) {
      const idle = held().filter((e) => e.users === 0 && e.model && !e.config.preload);
      if (idle.length === 0)
        throw new ServerError("overloaded", `there is no room for the model '${wanted.config.name}' while the others are in use`, {
          retryAfterSeconds: 10,
        });
      await this.#unload(idle.reduce((a, b) => (a.usedAt <= b.usedAt ? a : b)));
    }
  }

  #unloadIdle(): void {
    const before = performance.now() - this.#options.idleUnloadSeconds * 1000;
    for (const entry of this.#entries.values())
      if (entry.model && !entry.config.preload && entry.users === 0 && entry.usedAt < before) void this.#unload(entry);
  }

  async #unload(entry: Entry): Promise<void> {
    const { model } = entry;
    entry.model = null;
    entry.loading = null;
    if (!model) return;
    await Promise.all([model.engine.dispose(), model.encoder.close()]);
    this.#options.onEvent("unloaded", entry.config.name, { bytes: entry.bytes });
    if (entry.loading === null) entry.bytes = 0; // else somebody has asked for it meanwhile
  }
}

/** The format that most of the numbers have, as options call it. */
function mainFormat(weights: LoadedModel["weights"]): string {
  const counts = new Map<string, number>();
  for (const { dtype, shape } of weights) counts.set(dtype, (counts.get(dtype) ?? 0) + shape.reduce((a, b) => a * b, 1));
  const [[main]] = [...counts].sort(([, a], [, b]) => b - a);
  return main.replace(/^f(?=\d)/, "fp");
}

interface Footprint {
  readonly weightBytes: number;
  readonly kvBytes: number;
  /** What the cache is to hold; undefined: as the engine finds the memory. */
  readonly kvTokens: number | undefined;
}

/** What a model takes, from its config and the headers of its weights. */
async function estimate(folder: string, model: ModelConfig, budget: number | null): Promise<Footprint> {
  const checkpoint = await openCheckpoint(folder);
  const config = readConfig(checkpoint.config);
  const { memory } = measure(config);
  const stored = [...checkpoint.tensors.values()].reduce((sum, tensor) => sum + tensor.bytes, 0);
  const weightBytes = { auto: stored, ...memory, fp16: memory.bf16 }[model.dtype];
  // Where the format is left to the engine, the widest that it may choose for such weights.
  const kvDtype = { fp32: "f32", fp16: "f16", int8: "int8kv" } as const;
  const perToken = kvBytesPerToken(ernie(config), kvDtype[model.kvCacheDtype ?? (weightBytes >= memory.fp32 ? "fp32" : "fp16")]);
  const longest = 16 * config.maxPositions;
  const share = budget === null ? undefined : Math.max(BLOCK_TOKENS, Math.min(longest, Math.floor(budget / 4 / perToken)));
  const kvTokens = model.kvCacheTokens ?? share;
  return { weightBytes, kvBytes: (kvTokens ?? longest) * perToken, kvTokens };
}
