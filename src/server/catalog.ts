/**
 * The models of a server by name: loaded when first asked for, unloaded when idle or when another needs the memory, never
 * while somebody uses them. Knows what they weigh, not what they are asked.
 */
import { totalmem } from "node:os";
import { loadModel } from "../api/load.ts";
import { resolvePretrained } from "../api/model.ts";
import { openTokenizer } from "../api/tokenizer.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { readConfig as readModelConfig } from "../model/config.ts";
import { measure } from "../model/size.ts";
import type { ModelConfig } from "./config.ts";
import { ServerError } from "./errors.ts";
import type { Logger } from "./logs.ts";
import type { Catalog, ServedModel } from "./served.ts";

export interface CatalogOptions {
  readonly models: readonly ModelConfig[];
  /** Bytes of weights and KV caches together; null: four fifths of the machine's or container's memory. */
  readonly memoryBudgetBytes: number | null;
  /** Null: never unloaded for being idle. */
  readonly idleUnloadSeconds: number | null;
  /** Never ask the hub. */
  readonly offline: boolean;
  readonly log: Logger;
  /** Told of each model that is loaded. */
  readonly onLoad?: (model: ServedModel) => void;
}

interface Entry {
  readonly config: ModelConfig;
  readonly created: number;
  /** Bytes that it takes, or will take while it loads; 0 where it is not in memory. */
  bytes: number;
  users: number;
  /** When the last user left, by the monotonic clock. */
  lastUsed: number;
  loading: Promise<ServedModel> | null;
  model: ServedModel | null;
  idleTimer: NodeJS.Timeout | null;
}

export class ModelCatalog implements Catalog {
  readonly #entries: ReadonlyMap<string, Entry>;
  readonly #options: CatalogOptions;
  readonly #budget: number;
  /** Loads happen one after the other, so that each knows what the memory holds. */
  #turn: Promise<unknown> = Promise.resolve();
  #closed = false;

  constructor(options: CatalogOptions) {
    this.#options = options;
    this.#budget = options.memoryBudgetBytes ?? Math.floor(memoryBytes() * 0.8);
    const created = Math.floor(Date.now() / 1000);
    this.#entries = new Map(
      options.models.map((config) => [
        config.name,
        { config, created, bytes: 0, users: 0, lastUsed: 0, loading: null, model: null, idleTimer: null },
      ]),
    );
  }

  list(): readonly { readonly name: string; readonly created: number; readonly loaded: boolean }[] {
    return [...this.#entries.values()].map(({ config, created, model }) => ({ name: config.name, created, loaded: model !== null }));
  }

  /** Those in memory. */
  *loaded(): Generator<ServedModel, void, undefined> {
    for (const { model } of this.#entries.values()) if (model) yield model;
  }

  /** Bytes that loaded models take, by estimate. */
  get bytes(): number {
    return [...this.#entries.values()].reduce((sum, { bytes }) => sum + bytes, 0);
  }

  async use(name: string): Promise<{ readonly model: ServedModel; release(): void }> {
    const entry = this.#entries.get(name);
    if (!entry) throw new ServerError("model_not_found", `there is no model ${JSON.stringify(name.slice(0, 200))}`, { param: "model" });
    if (this.#closed) throw new ServerError("not_ready", "the server is going down", { retryAfterSeconds: 1 });
    entry.users++; // from now on, so that it is not unloaded between loading and use
    if (entry.idleTimer) clearTimeout(entry.idleTimer);
    try {
      const model = entry.model ?? (await (entry.loading ??= this.#load(entry)));
      let released = false;
      return {
        model,
        release: () => {
          if (released) return;
          released = true;
          this.#leave(entry);
        },
      };
    } catch (error) {
      this.#leave(entry);
      throw error;
    }
  }

  /** Loads the models that the server is not ready without. Throws what is wrong with the first that fails. */
  async preload(): Promise<void> {
    for (const [i, { preload, name }] of this.#options.models.entries()) if (preload ?? i === 0) (await this.use(name)).release();
  }

  /** Unloads everything; running requests fail. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#turn.catch(() => {}); // its caller hears of a failure
    for (const entry of this.#entries.values()) await this.#unload(entry, "the server is going down");
  }

  #leave(entry: Entry): void {
    entry.users--;
    entry.lastUsed = performance.now();
    const { idleUnloadSeconds: idle } = this.#options;
    if (idle === null || entry.users > 0 || !entry.model) return;
    const unload = () => {
      if (entry.users === 0) void this.#unload(entry, `unused for ${idle} s`);
    };
    entry.idleTimer = setTimeout(unload, idle * 1000).unref();
  }

  #load(entry: Entry): Promise<ServedModel> {
    const { log } = this.#options;
    const { name } = entry.config;
    const load = async (): Promise<ServedModel> => {
      if (this.#closed) throw new ServerError("not_ready", "the server is going down", { retryAfterSeconds: 1 });
      const since = performance.now();
      const folder = await resolvePretrained(entry.config.path, { local_files_only: this.#options.offline || undefined });
      const { bytes, kvTokens } = await this.#estimate(folder, entry.config);
      await this.#makeRoom(name, bytes);
      entry.bytes = bytes;
      const model = await open(folder, entry.config, entry.created, kvTokens);
      entry.model = model;
      log.info({ model: name, bytes, kvTokens, seconds: Math.round(performance.now() - since) / 1000 }, "model loaded");
      this.#options.onLoad?.(model);
      return model;
    };
    const run = this.#turn.catch(() => {}).then(load); // whoever asked for the one before hears of its failure
    this.#turn = run;
    return run
      .catch((error: unknown) => {
        entry.bytes = 0;
        if (error instanceof ServerError) throw error;
        log.error({ model: name, err: error }, "model could not be loaded");
        throw new ServerError("not_ready", `the model ${name} could not be loaded; the server's logs say why`, {
          cause: error,
          param: "model",
        });
      })
      .finally(() => {
        entry.loading = null; // a failed load is tried again by the next request
      });
  }

  /** Bytes of a model's weights and KV cache before it is loaded, and how many tokens that cache gets. */
  async #estimate(folder: string, model: ModelConfig): Promise<{ bytes: number; kvTokens: number }> {
    const checkpoint = await openCheckpoint(folder);
    const config = readModelConfig(checkpoint.config);
    const { memory } = measure(config);
    const stored = [...checkpoint.tensors.values()].reduce((sum, tensor) => sum + tensor.bytes, 0);
    const bytesOf = { auto: stored, fp32: memory.fp32, fp16: memory.bf16, bf16: memory.bf16, int8: memory.int8, int4: memory.int4 };
    const weights = bytesOf[model.dtype];
    const wide = model.kvCacheDtype === "fp32" || (model.kvCacheDtype === undefined && weights >= memory.fp32);
    const perToken = memory.kv_per_token * (wide ? 2 : 1);
    const kvTokens = model.kvCacheTokens ?? Math.max(32, Math.min(16 * config.maxPositions, Math.floor(this.#budget / 4 / perToken)));
    return { bytes: weights + kvTokens * perToken, kvTokens };
  }

  /** Unloads those that nobody uses, the one unused for longest first, until `bytes` more fit the budget. */
  async #makeRoom(name: string, bytes: number): Promise<void> {
    const gib = (n: number) => `${(n / 2 ** 30).toFixed(2)} GiB`;
    if (bytes > this.#budget)
      throw new Error(
        `the model ${name} needs ${gib(bytes)}, more than the memory budget of ${gib(this.#budget)}; set memoryBudgetBytes or kvCacheTokens`,
      );
    while (this.bytes + bytes > this.#budget) {
      const idle = [...this.#entries.values()].filter((e) => e.model && e.users === 0).sort((a, b) => a.lastUsed - b.lastUsed);
      if (idle.length === 0)
        throw new ServerError("overloaded", `the model ${name} needs memory that other models are using; try again later`, {
          retryAfterSeconds: 10,
          param: "model",
        });
      await this.#unload(idle[0], `${name} needs its memory`);
    }
  }

  async #unload(entry: Entry, reason: string): Promise<void> {
    const { model, config } = entry;
    if (!model) return;
    if (entry.idleTimer) clearTimeout(entry.idleTimer);
    entry.model = null;
    await model.engine.dispose();
    entry.bytes = 0;
    this.#options.log.info({ model: config.name, reason }, "model unloaded");
  }
}

async function open(folder: string, config: ModelConfig, created: number, kvTokens: number): Promise<ServedModel> {
  const tokenizer = await openTokenizer(folder);
  const { engine, checkpoint, ...loaded } = await loadModel(folder, {
    dtype: config.dtype,
    threads: config.threads,
    device: config.device,
    kv_cache_dtype: config.kvCacheDtype,
    kv_cache_tokens: kvTokens,
    chunk_size: config.chunkSize,
  });
  return { name: config.name, created, config: loaded.config, tokenizer, engine, generationConfig: checkpoint.generationConfig ?? {} };
}

/** Of the container where it has a limit, else of the machine. */
function memoryBytes(): number {
  const limit = process.constrainedMemory?.() ?? 0;
  return limit > 0 && limit < totalmem() ? limit : totalmem();
}
