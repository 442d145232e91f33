/** Models by name: loaded when first asked for, shared by all who use them, unloaded when idle or when room is needed. */
import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { endTokenIds } from "../api/generation.ts";
import { loadModel } from "../api/load.ts";
import { resolvePretrained } from "../api/model.ts";
import { openTokenizer } from "../api/tokenizer.ts";
import type { ModelConfig } from "./config.ts";
import { ServerError } from "./errors.ts";
import { Grammars } from "./grammar.ts";
import type { Catalog, ServedModel } from "./served.ts";

export interface CatalogOptions {
  readonly idleUnloadSeconds: number;
  /** Bytes of all weights together; null: no budget. */
  readonly memoryBudgetBytes: number | null;
  /** Told of what happens to models: for the log. */
  readonly onEvent: (what: "loading" | "loaded" | "unloaded" | "failed", name: string, detail: Readonly<Record<string, unknown>>) => void;
}

interface Entry {
  readonly config: ModelConfig;
  readonly created: number;
  loading: Promise<ServedModel> | null;
  model: ServedModel | null;
  bytes: number;
  users: number;
  usedAt: number;
}

export class ModelCatalog implements Catalog {
  readonly #entries = new Map<string, Entry>();
  readonly #options: CatalogOptions;
  readonly #idle: NodeJS.Timeout;
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
      if (model) await model.engine.dispose();
      entry.model = null;
    }
  }

  async #load(entry: Entry): Promise<ServedModel> {
    const { name, path, dtype, threads, kvCacheDtype, kvCacheTokens } = entry.config;
    const { onEvent } = this.#options;
    onEvent("loading", name, { path });
    const start = performance.now();
    try {
      const folder = await resolvePretrained(path);
      entry.bytes = await weightBytes(folder);
      await this.#makeRoom(entry);
      const tokenizer = await openTokenizer(folder);
      const { config, checkpoint, engine } = await loadModel(folder, {
        dtype,
        threads,
        kv_cache_dtype: kvCacheDtype,
        kv_cache_tokens: kvCacheTokens,
        warning_callback: (warning) => onEvent("loading", name, { warning }),
      });
      const generationConfig = checkpoint.generationConfig ?? {};
      entry.model = {
        name,
        created: entry.created,
        config,
        tokenizer,
        engine,
        generationConfig,
        grammars: new Grammars(tokenizer, config.vocabSize, endTokenIds(generationConfig, config)),
      };
      onEvent("loaded", name, { seconds: (performance.now() - start) / 1000, bytes: entry.bytes });
      return entry.model;
    } catch (cause) {
      onEvent("failed", name, { reason: cause instanceof Error ? cause.message : String(cause) });
      if (cause instanceof ServerError) throw cause;
      throw new ServerError("not_ready", `the model '${name}' could not be loaded; the server's log says why`, {
        cause,
        retryAfterSeconds: 30,
      });
    }
  }

  async #makeRoom(wanted: Entry): Promise<void> {
    const { memoryBudgetBytes: budget } = this.#options;
    if (budget === null) return;
    if (wanted.bytes > budget) throw new Error(`its weights take ${wanted.bytes} bytes, and the budget is ${budget}`);
    const held = () => [...this.#entries.values()].filter((e) => e !== wanted && e.loading !== null);
    while (held().reduce((sum, e) => sum + e.bytes, wanted.bytes) > budget) {
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
    await model.engine.dispose();
    this.#options.onEvent("unloaded", entry.config.name, { bytes: entry.bytes });
  }
}

/** Bytes of the files that hold a model's weights. */
async function weightBytes(folder: string): Promise<number> {
  const found = await stat(folder);
  if (!found.isDirectory()) return found.size;
  let bytes = 0;
  for (const name of await readdir(folder)) if (/\.(safetensors|gguf)$/.test(name)) bytes += (await stat(join(folder, name))).size;
  return bytes;
}
