/** Models by name: loaded on first use, shared by all requests, unloaded when idle or when memory is needed. Knows no request. */
import { readBranches } from "../api/adapters.ts";
import { loadClassifier } from "../api/classifier.ts";
import { endTokenIds, type GenerationDefaults } from "../api/defaults.ts";
import { isBundled, resolveAdapter, resolveWhole } from "../api/find.ts";
import { holdsHead } from "../api/head.ts";
import { KV_DTYPES } from "../api/kv.ts";
import { type LoadedModel, type LoadOptions, loadModel } from "../api/load.ts";
import { openTokenizer } from "../api/tokenizer.ts";
import { openCheckpoint } from "../checkpoint/checkpoint.ts";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import { type Engine, kvBytesPerToken } from "../engine/engine.ts";
import { Grammars } from "../grammar/grammars.ts";
import { Turns } from "../grammar/turns.ts";
import type { ErnieConfig } from "../model/config.ts";
import { ernie } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import { measure } from "../model/size.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { adapterName, ServedAdapters } from "./adapters.ts";
import { Encoder } from "./completion/encoder.ts";
import type { ModelConfig } from "./config.ts";
import { ServerError } from "./errors.ts";

/** A loaded model under the name that clients know. */
export interface NamedModel {
  readonly name: string;
  /** When the server listed it, in seconds since 1970. */
  readonly created: number;
  readonly config: ErnieConfig;
  readonly tokenizer: Tokenizer;
  readonly engine: Engine;
  /** Format that most of the weights have in memory: `fp32`, `bf16`, `int8` and so on. */
  readonly dtype: string;
  readonly encoder: Encoder;
  readonly grammars: Grammars;
  /** Of generation_config.json. */
  readonly defaults: GenerationDefaults;
  /** The engine's name of the adapter that this name means; absent: the base model. */
  readonly adapter?: string;
}

/** The most names in an error. */
const MOST_LISTED = 50;

export interface CatalogOptions {
  readonly idleUnloadSeconds: number;
  /** Bytes of all weights and KV caches together; null: no budget. */
  readonly memoryBudgetBytes: number | null;
  /** Never contact the hub. */
  readonly offline: boolean;
  /** Called when a model's state changes, for the log. */
  readonly onEvent: (
    what: "loading" | "loaded" | "settled" | "unloaded" | "failed",
    name: string,
    detail: Readonly<Record<string, unknown>>,
  ) => void;
}

interface Entry {
  readonly config: ModelConfig;
  readonly created: number;
  /** While the model is loaded. */
  adapters: ServedAdapters | null;
  loading: Promise<NamedModel> | null;
  model: NamedModel | null;
  /** Memory in use: an estimate while it loads, 0 when not loaded. */
  bytes: number;
  users: number;
  usedAt: number;
}

export class Catalog {
  readonly #entries = new Map<string, Entry>();
  readonly #options: CatalogOptions;
  readonly #idle: NodeJS.Timeout;
  /** Shared by all models: their work on the event loop takes turns. */
  readonly #turns = new Turns();
  #turn: Promise<unknown> = Promise.resolve();
  #closed = false;

  constructor(models: readonly ModelConfig[], options: CatalogOptions) {
    this.#options = options;
    const created = Math.floor(Date.now() / 1000);
    for (const config of models)
      this.#entries.set(config.name, { config, created, adapters: null, loading: null, model: null, bytes: 0, users: 0, usedAt: 0 });
    this.#idle = setInterval(() => this.#unloadIdle(), Math.min(30, options.idleUnloadSeconds) * 1000);
    this.#idle.unref();
  }

  /** Every name that clients may ask for, loaded or not: models, each followed by its adapters, whose `parent` it is. */
  list(): { name: string; created: number; loaded: boolean; demo: boolean; parent?: string }[] {
    return [...this.#entries.values()].flatMap(({ config, created, model }) => {
      const { name: parent, adapters, path } = config;
      const loaded = model?.engine.adapters.names ?? [];
      return [
        { name: parent, created, loaded: model !== null, demo: isBundled(path) },
        ...Object.keys(adapters).map((adapter) => ({
          name: adapterName(parent, adapter),
          created,
          loaded: loaded.includes(adapter),
          demo: isBundled(path),
          parent,
        })),
      ];
    });
  }

  /** Reads the adapters of loaded models again, from their folders. One that cannot be read stays as it was. */
  async reload(): Promise<void> {
    for (const { adapters } of this.#entries.values()) await adapters?.load();
  }

  /** The models in memory. */
  loaded(): NamedModel[] {
    return [...this.#entries.values()].flatMap(({ model }) => (model ? [model] : []));
  }

  /** True once every preloaded model is loaded. */
  get ready(): boolean {
    return (
      !this.#closed && [...this.#entries.values()].every(({ config, model }) => !config.preload || (model !== null && !model.engine.lost))
    );
  }

  /** Loads the models that are always kept loaded. */
  async preload(): Promise<void> {
    for (const { config } of this.#entries.values()) if (config.preload) (await this.use(config.name)).release();
  }

  /**
   * The model, kept loaded until `release` is called, which is idempotent. Rejects with ServerError `model_not_found`,
   * `overloaded` when the memory budget does not allow it, or `not_ready` when it could not be loaded.
   */
  async use(name: string): Promise<{ model: NamedModel; release(): void }> {
    const found = this.#find(name);
    if (!found) {
      const known = shortList(this.list().map((each) => each.name));
      throw new ServerError("model_not_found", `there is no model '${name}' here; there are ${known}`, { param: "model" });
    }
    const { entry, adapter } = found;
    if (this.#closed) throw new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 5 });
    if (entry.model?.engine.lost) void this.#unload(entry); // its files have changed: load what is there now
    entry.users++; // while it loads too, so that it is not unloaded meanwhile
    try {
      entry.loading ??= this.#load(entry);
      const model = await entry.loading;
      if (adapter !== undefined) await entry.adapters?.need(adapter);
      let released = false;
      return {
        model: adapter === undefined ? model : { ...model, name, adapter },
        release: () => {
          if (released) return;
          released = true;
          entry.users--;
          entry.usedAt = performance.now();
        },
      };
    } catch (error) {
      entry.users--;
      if (!entry.model) entry.loading = null; // the next request tries again
      throw error;
    }
  }

  /** The model of a name, and the adapter if it is the name of one. */
  #find(name: string): { readonly entry: Entry; readonly adapter?: string } | null {
    const entry = this.#entries.get(name);
    if (entry) return { entry };
    for (const base of this.#entries.values()) {
      const adapter = name.startsWith(adapterName(base.config.name, "")) ? name.slice(base.config.name.length + 1) : "";
      if (Object.hasOwn(base.config.adapters, adapter)) return { entry: base, adapter };
    }
    return null;
  }

  /** Unloads everything. Requests still running fail. */
  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#idle);
    for (const entry of this.#entries.values()) {
      const model = entry.model ?? (await entry.loading?.catch(() => null));
      if (model) await Promise.all([model.engine.dispose(), model.encoder.close()]);
      entry.model = null;
    }
  }

  async #load(entry: Entry): Promise<NamedModel> {
    const { name, path, dtype, threads, device, kvCacheDtype, chunkSize, weights: residence, adapters, maxLoraRank } = entry.config;
    const { classifier, labels, problemType: problem_type } = entry.config;
    const { onEvent } = this.#options;
    onEvent("loading", name, { path });
    const start = performance.now();
    try {
      const offline = this.#options.offline || undefined;
      const { folder, adapter: alone } = await resolveWhole(path, { local_files_only: offline });
      const { weightBytes, kvTokens } = await this.#reserve(entry, folder);
      const tokenizer = await openTokenizer(folder);
      const options: LoadOptions = {
        dtype,
        threads,
        kv_cache_dtype: kvCacheDtype,
        kv_cache_tokens: kvTokens,
        device,
        chunk_size: chunkSize,
        weights: residence,
        max_loras: Object.keys(adapters).length + 1, // a classifier may have one of its own
        max_lora_rank: maxLoraRank,
        warning_callback: (warning) => onEvent("loading", name, { warning }),
      };
      const heads = alone !== null && (await holdsHead(alone));
      const classifies = heads || classifier !== undefined || labels !== undefined || problem_type !== undefined;
      const its = classifier === undefined ? alone : await resolveAdapter(classifier, { local_files_only: offline });
      const id2label = labels && Object.fromEntries(labels.entries());
      const loaded = classifies
        ? await loadClassifier(folder, options, { adapter: its, id2label, problem_type })
        : await loadModel(folder, options);
      const { config, defaults, engine, weights } = loaded;
      if (alone !== null && !classifies) await withAdapter(loaded, alone, Object.hasOwn(adapters, OWN));
      const [own] = engine.adapters.names; // of a classifier, or where the path is an adapter's
      entry.adapters = new ServedAdapters({ name, engine, config, folders: adapters, offline, onEvent });
      await entry.adapters.load();
      entry.bytes = weightBytes + engine.cache.count * BLOCK_TOKENS * engine.kvBytesPerToken + engine.adapters.bytes;
      entry.model = {
        name,
        created: entry.created,
        config,
        tokenizer,
        engine,
        dtype: mainFormat(weights),
        defaults,
        ...(own === undefined ? {} : { adapter: own }),
        encoder: new Encoder(folder, tokenizer, this.#turns),
        grammars: new Grammars(tokenizer, config.vocabSize, endTokenIds(defaults, config), this.#turns),
      };
      onEvent("loaded", name, { seconds: (performance.now() - start) / 1000, bytes: entry.bytes, device: loaded.backend.device });
      engine.settled.then(() => {
        if (entry.model?.engine !== engine) return; // unloaded meanwhile
        const { state, movedBytes, why } = engine.placement();
        onEvent("settled", name, {
          weights: state,
          hugeBytes: movedBytes,
          ...(why && { why }),
          seconds: (performance.now() - start) / 1000,
        });
      });
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

  /** Estimates a model's memory and makes room for it within the budget. Loads do this one after the other. */
  #reserve(entry: Entry, folder: string): Promise<Footprint> {
    const run = this.#turn.then(async () => {
      const { memoryBudgetBytes: budget } = this.#options;
      const footprint = await estimate(folder, entry.config, budget);
      await this.#makeRoom(entry, footprint.weightBytes + footprint.kvBytes);
      entry.bytes = footprint.weightBytes + footprint.kvBytes;
      return footprint;
    });
    this.#turn = run.catch(() => {}); // the caller sees a failure
    return run;
  }

  /** Unloads unused models, least recently used first, until `bytes` fit. */
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
    for (const entry of this.#entries.values()) {
      const { model, config, users, usedAt } = entry;
      if (model?.engine.lost && config.preload)
        void this.use(config.name).then(
          ({ release }) => release(),
          () => {},
        ); // the log says why
      else if (model && users === 0 && (model.engine.lost || (!config.preload && usedAt < before))) void this.#unload(entry);
    }
  }

  async #unload(entry: Entry): Promise<void> {
    const { model } = entry;
    entry.model = null;
    entry.adapters = null;
    entry.loading = null;
    if (!model) return;
    await Promise.all([model.engine.dispose(), model.encoder.close()]);
    this.#options.onEvent("unloaded", entry.config.name, { bytes: entry.bytes });
    if (entry.loading === null) entry.bytes = 0; // else it has been requested again meanwhile
  }
}

/** What the engine calls the adapter that a model's path names, as it calls a classifier's. */
const OWN = "default";

/** Loads that adapter, or frees the model. */
async function withAdapter({ engine, config }: LoadedModel, folder: string, taken: boolean): Promise<void> {
  try {
    if (taken) throw new Error(`one of its adapters is called ${OWN}, which is the name of the path's own; give it another`);
    await engine.loadAdapter(OWN, await readBranches(folder, config, engine.adapters.limits));
  } catch (error) {
    await engine.dispose();
    throw error;
  }
}

/** The first names of a list that may be long. */
function shortList(names: readonly string[]): string {
  return names.length <= MOST_LISTED
    ? names.join(", ")
    : `${names.slice(0, MOST_LISTED).join(", ")} and ${names.length - MOST_LISTED} more`;
}

/** The format of most of the weights, as options name it. */
function mainFormat(weights: LoadedModel["weights"]): string {
  const counts = new Map<string, number>();
  for (const { dtype, shape } of weights) counts.set(dtype, (counts.get(dtype) ?? 0) + shape.reduce((a, b) => a * b, 1));
  const [[main]] = [...counts].sort(([, a], [, b]) => b - a);
  return main.replace(/^f(?=\d)/, "fp");
}

interface Footprint {
  readonly weightBytes: number;
  readonly kvBytes: number;
  /** Capacity of the KV cache in tokens; undefined: the engine decides. */
  readonly kvTokens: number | undefined;
}

/** A model's memory, from its config and the headers of its weights. */
async function estimate(folder: string, model: ModelConfig, budget: number | null): Promise<Footprint> {
  const checkpoint = await openCheckpoint(folder);
  const config = configFor(checkpoint);
  const { memory } = measure(config);
  const stored = [...checkpoint.tensors.values()].reduce((sum, tensor) => sum + tensor.bytes, 0);
  // The CPU reads fp8 as bf16.
  const widened = !model.device.startsWith("cuda") && [...checkpoint.blocks.values()].some(({ dtype }) => dtype === "fp8");
  const weightBytes = { ...memory, auto: widened ? memory.bf16 : stored, fp16: memory.bf16, fp8: memory.int8 }[model.dtype];
  // Where the engine chooses the format, assume the widest that it may choose for such weights.
  const perToken = kvBytesPerToken(ernie(config), KV_DTYPES[model.kvCacheDtype ?? (weightBytes >= memory.fp32 ? "fp32" : "fp16")]);
  const longest = 16 * config.maxPositions;
  const share = budget === null ? undefined : Math.max(BLOCK_TOKENS, Math.min(longest, Math.floor(budget / 4 / perToken)));
  const kvTokens = model.kvCacheTokens ?? share;
  return { weightBytes, kvBytes: (kvTokens ?? longest) * perToken, kvTokens };
}
