/** The adapters of one loaded model, from the folders and hub ids that the config names: loaded with it, and again when asked. Knows no request. */
import { readBranches } from "../api/adapters.ts";
import { resolveAdapter } from "../api/find.ts";
import type { Engine } from "../engine/engine.ts";
import type { ErnieConfig } from "../model/config.ts";
import { ServerError } from "./errors.ts";

/** What a client names to get an adapter. */
export function adapterName(model: string, adapter: string): string {
  return `${model}:${adapter}`;
}

/** An adapter that could not be loaded is not tried again before this time: each attempt reads files. */
const RETRY_MS = 5000;

export interface AdapterParts {
  /** The model's name. */
  readonly name: string;
  readonly engine: Engine;
  readonly config: ErnieConfig;
  /** By adapter: folders, or hub ids. */
  readonly folders: Readonly<Record<string, string>>;
  /** Never ask the hub. Default: by HF_HUB_OFFLINE. */
  readonly offline?: boolean;
  /** Called with each adapter that was loaded, or the reason why not, for the log. */
  readonly onEvent: (what: "loaded" | "failed", name: string, detail: Readonly<Record<string, unknown>>) => void;
}

export class ServedAdapters {
  readonly #parts: AdapterParts;
  readonly #failedAt = new Map<string, number>();
  readonly #loading = new Map<string, Promise<void>>();

  constructor(parts: AdapterParts) {
    this.#parts = parts;
  }

  /** Loads all of them, again where they are loaded already. One that fails stays as it was; the others are loaded. */
  async load(): Promise<void> {
    for (const name of Object.keys(this.#parts.folders)) await this.#load(name).catch(() => {}); // the log says why
  }

  /** Rejects with ServerError `not_ready` when the adapter could not be loaded. */
  async need(name: string): Promise<void> {
    if (this.#parts.engine.adapters.names.includes(name)) return;
    const since = performance.now() - (this.#failedAt.get(name) ?? Number.NEGATIVE_INFINITY);
    try {
      if (since < RETRY_MS) throw new Error("tried a moment ago");
      await this.#load(name);
    } catch (cause) {
      const full = adapterName(this.#parts.name, name);
      throw new ServerError("not_ready", `the adapter '${full}' could not be loaded; the server's log says why`, {
        cause,
        retryAfterSeconds: 30,
      });
    }
  }

  #load(name: string): Promise<void> {
    const running = this.#loading.get(name) ?? this.#read(name).finally(() => this.#loading.delete(name));
    this.#loading.set(name, running);
    return running;
  }

  async #read(name: string): Promise<void> {
    const { engine, config, folders, offline, onEvent, name: model } = this.#parts;
    const start = performance.now();
    try {
      const folder = await resolveAdapter(folders[name], { local_files_only: offline });
      await engine.loadAdapter(name, await readBranches(folder, config, engine.adapters.limits));
      this.#failedAt.delete(name);
      const seconds = (performance.now() - start) / 1000;
      onEvent("loaded", adapterName(model, name), { folder: folders[name], seconds, adapterBytes: engine.adapters.bytes });
    } catch (cause) {
      this.#failedAt.set(name, performance.now());
      onEvent("failed", adapterName(model, name), { reason: cause instanceof Error ? cause.message : String(cause) });
      throw cause;
    }
  }
}
