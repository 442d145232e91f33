/**
 * Finds the local folders of models and adapters, from the hub if necessary, and the base of an adapter that is given alone. Reads configs, no
 * weights.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { ADAPTER_CONFIG, readBase } from "../checkpoint/adapter.ts";
import { CONFIG } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import type { DownloadProgress, ResolveOptions } from "../checkpoint/hub.ts";

/** Where files come from that are not in a folder. */
export interface HubOptions {
  /** Branch, tag or commit on the hub. Default `main`. */
  readonly revision?: string;
  readonly cache_dir?: string;
  /** For gated and private models. Default: `HF_TOKEN`. */
  readonly token?: string;
  /** Never contact the hub. Default: whether `HF_HUB_OFFLINE` is set. */
  readonly local_files_only?: boolean;
  readonly progress_callback?: (progress: DownloadProgress) => void;
  readonly signal?: AbortSignal;
}

export const HUB_OPTIONS = [
  "revision",
  "cache_dir",
  "token",
  "local_files_only",
  "progress_callback",
  "signal",
] as const satisfies readonly (keyof HubOptions)[];

/** As the command line calls it, whose warnings and retries are shown. */
export type FindOptions = HubOptions & Pick<ResolveOptions, "withWeights" | "onWarning" | "onRetry">;

export const DEFAULT_MODEL = fileURLToPath(new URL("../../models/small-moe", import.meta.url));

/** Whether a name means the bundled model. */
export function isBundled(idOrFolder: string): boolean {
  return idOrFolder === "default";
}

/** The local folder of a model, downloaded from the hub if necessary; it may be an adapter's. */
export async function resolvePretrained(idOrFolder: string, options: FindOptions = {}): Promise<string> {
  if (isBundled(idOrFolder)) return DEFAULT_MODEL;
  const { resolveModel } = await import("../checkpoint/hub.ts"); // the bundled model needs no hub
  return resolveModel(idOrFolder, { ...options, onProgress: options.progress_callback });
}

/** The local folder of an adapter: a folder, a hub id, or a hub id with a revision, `user/repo@v2`, which goes before the option. */
export async function resolveAdapter(idOrFolder: string, options: FindOptions = {}): Promise<string> {
  if (existsSync(idOrFolder)) return idOrFolder;
  const { resolveModel } = await import("../checkpoint/hub.ts");
  const [, id = idOrFolder, revision = options.revision] = /^([^@]+)@(.+)$/.exec(idOrFolder) ?? [];
  return resolveModel(id, { ...options, revision, kind: "adapter", onProgress: options.progress_callback });
}

/** Whether a folder is an adapter's and no model's. */
export function isAdapterFolder(folder: string): boolean {
  return existsSync(join(folder, ADAPTER_CONFIG)) && !existsSync(join(folder, CONFIG));
}

/** A model's folder, and the adapter's if that is what was given. */
export interface Found {
  readonly folder: string;
  readonly adapter: string | null;
}

/** As `resolvePretrained`; of an adapter, its base, which adapter_config.json names. */
export async function resolveWhole(idOrFolder: string, options: FindOptions = {}): Promise<Found> {
  const folder = await resolvePretrained(idOrFolder, options);
  if (!isAdapterFolder(folder)) return { folder, adapter: null };
  return { folder: await resolveBase(folder, options), adapter: folder };
}

/** The folder of an adapter's base. Rejects, naming both, if there is none of this name. */
export async function resolveBase(adapter: string, options: FindOptions = {}): Promise<string> {
  const { name, revision } = await readBase(adapter);
  if (name === null)
    throw new CheckpointError(
      adapter,
      "is an adapter that does not name its base (base_model_name_or_path); give the base, and it as its adapter",
    );
  try {
    return await resolvePretrained(name, { ...options, revision });
  } catch (cause) {
    if (!(cause instanceof CheckpointError)) throw cause;
    throw new CheckpointError(
      adapter,
      `is an adapter of the base '${name}', which was not found: ${cause.message}; give the base by another name or path`,
      {
        cause,
      },
    );
  }
}
