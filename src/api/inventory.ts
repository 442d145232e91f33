/**
 * The models and adapters on this machine: the bundled one, those in the Hugging Face cache, and those in folders. Reads configs and the headers of
 * weights, and removes what is asked. Downloads nothing and runs nothing.
 */
import { lstat, readdir, readFile, realpath, rm } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { ADAPTER_CONFIG, ADAPTER_WEIGHTS, openAdapter } from "../checkpoint/adapter.ts";
import { CONFIG, exists, missingFile, openCheckpoint, readJson, totalsByDtype } from "../checkpoint/checkpoint.ts";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { readConfig } from "../model/config.ts";
import { DEFAULT_MODEL } from "./find.ts";

/** A model or an adapter. */
export interface Item {
  /** What `-m` or `--adapter` takes: `default`, a hub id, or a path. */
  readonly name: string;
  readonly kind: "model" | "classifier" | "adapter";
  readonly place: "bundled" | "cache" | "folder";
  /** The folder with its files; of the cache, the newest snapshot's. */
  readonly folder: string;
  /** What it takes on disk; in the cache, with all revisions and parts of downloads. */
  readonly bytes: number;
  /** Format of most of the weights: `bf16`, `int8`, `q8_0`, ...; null: not known. */
  readonly format: string | null;
  /** Of the cache: the revisions that have a name, and their commits. */
  readonly revisions: Readonly<Record<string, string>>;
  /** An adapter's base, by its config. */
  readonly base: string | null;
  /** Why it cannot be used as it is: a file that is missing, a broken header. */
  readonly fault: string | null;
}

export interface InventoryOptions {
  /** Folders in which to look, and in their folders. Default: none. */
  readonly folders?: readonly string[];
  /** Default: the Hugging Face cache. */
  readonly cache_dir?: string;
}

/** How deep folders are searched: `models/mine`, `runs/shop/final`. */
const DEPTH = 3;
/** Folders that hold no models, however deep. */
const SKIPPED = /^(node_modules|\.git|dist|build|__pycache__)$/;
/** Files that a model's or an adapter's folder may have; another one keeps the folder from being removed. */
const OWN =
  /^((config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|adapter_config|checksums|preprocessor_config)\.json|merges\.txt|tokenizer\.model|chat_template[\w.-]*|(README|LICENSE|NOTICE)[\w.-]*|\.gitattributes|(model|adapter_model)[\w.-]*\.safetensors(\.index\.json|\.partial)?|[\w.-]+\.gguf)$/;

/** Everything there is, bundled first, then the cache, then folders. Broken ones are listed with what is wrong. */
export async function inventory(options: InventoryOptions = {}): Promise<{ items: Item[]; others: number }> {
  const items: Item[] = [await described({ name: "default", place: "bundled", folder: DEFAULT_MODEL })];
  const cache = await cacheFolder(options.cache_dir);
  let others = 0;
  for (const repo of (await names(cache)).filter((each) => each.startsWith(REPO)).sort()) {
    const found = await cachedItem(join(cache, repo));
    if (found) items.push(found);
    else others++;
  }
  const seen = new Set([await realpath(DEFAULT_MODEL).catch(() => DEFAULT_MODEL)]);
  for (const folder of options.folders ?? []) {
    for (const path of await holders(folder, DEPTH)) {
      const real = await realpath(path);
      if (seen.has(real)) continue;
      seen.add(real);
      items.push(await described({ name: path, place: "folder", folder: path }));
    }
  }
  return { items, others };
}

/** One of them by name: `default`, a hub id in the cache, or a folder. Null: there is none. */
export async function findItem(name: string, options: Pick<InventoryOptions, "cache_dir"> = {}): Promise<Item | null> {
  if (name === "default") return described({ name, place: "bundled", folder: DEFAULT_MODEL });
  if (await holdsItem(name)) return described({ name, place: "folder", folder: name });
  if (!/^[\w.-]+(\/[\w.-]+)?$/.test(name) || /\.\.|--/.test(name)) return null;
  return cachedItem(join(await cacheFolder(options.cache_dir), `${REPO}${name.replace("/", "--")}`));
}

/** The files of an item, with their sizes on disk. */
export async function filesOf({ folder }: Item): Promise<{ readonly name: string; readonly bytes: number }[]> {
  const found = await lstat(folder);
  if (found.isFile()) return [{ name: basename(folder), bytes: found.size }];
  const all = await names(folder);
  const each = await Promise.all(
    all.sort().map(async (name) => {
      const path = await realpath(join(folder, name)).catch(() => null);
      const file = path === null ? null : await lstat(path);
      return file?.isFile() ? [{ name, bytes: file.size }] : [];
    }),
  );
  return each.flat();
}

/**
 * Deletes an item: a repository with all its revisions, or a folder. Throws an Error, and deletes nothing, for the bundled model and for a folder
 * that holds anything else.
 */
export async function remove(item: Item): Promise<void> {
  if (item.place === "bundled") throw new Error("the bundled model belongs to the package; it is removed with it");
  const path = item.place === "cache" ? resolve(item.folder, "..", "..") : resolve(item.folder);
  if (item.place === "cache" && !basename(path).startsWith(REPO)) throw new Error(`internal: ${path} is no repository of the cache`);
  const found = await lstat(path);
  if (found.isSymbolicLink()) throw new Error(`${path}: a link; remove the link, or name the folder that it leads to`);
  if (item.place === "folder" && found.isDirectory()) {
    const other = (await readdir(path, { withFileTypes: true })).find((entry) => !entry.isFile() || !OWN.test(entry.name));
    if (other) throw new Error(`${path}: holds ${other.name}, which is no part of a model; remove the folder by hand`);
  }
  await rm(path, { recursive: true });
}

const REPO = "models--";

async function cacheFolder(given: string | undefined): Promise<string> {
  const { getHFHubCachePath } = await import("@huggingface/hub");
  return given ?? getHFHubCachePath();
}

/** A repository of the cache; null if it holds nothing of ours. */
async function cachedItem(repo: string): Promise<Item | null> {
  const revisions: Record<string, string> = {};
  for (const name of await refs(join(repo, "refs"))) revisions[name] = (await readFile(join(repo, "refs", name), "utf8")).trim();
  const commits = await names(join(repo, "snapshots"));
  const [newest] = [revisions.main, ...Object.values(revisions), ...commits].filter((each) => each !== undefined && commits.includes(each));
  if (newest === undefined) return null;
  const folder = join(repo, "snapshots", newest);
  if (!(await holdsItem(folder))) return null;
  const name = basename(repo).slice(REPO.length).replace("--", "/");
  return { ...(await described({ name, place: "cache", folder })), bytes: await sizeOf(repo), revisions };
}

/** Names of revisions, which may contain slashes. */
async function refs(folder: string, prefix = ""): Promise<string[]> {
  const entries = await readdir(folder, { withFileTypes: true }).catch(() => []);
  const each = entries.map((entry) =>
    entry.isDirectory() ? refs(join(folder, entry.name), `${prefix}${entry.name}/`) : [`${prefix}${entry.name}`],
  );
  return (await Promise.all(each)).flat();
}

async function described(place: Pick<Item, "name" | "place" | "folder">): Promise<Item> {
  const { folder } = place;
  const rest = { bytes: await sizeOf(folder), revisions: {} };
  try {
    return { ...place, ...rest, ...((await isAdapter(folder)) ? await adapterFacts(folder) : await modelFacts(folder)) };
  } catch (error) {
    const kind = (await isAdapter(folder)) ? "adapter" : "model";
    return { ...place, ...rest, kind, format: null, base: null, fault: (error as Error).message.split("\n")[0] };
  }
}

type Facts = Pick<Item, "kind" | "format" | "base" | "fault">;

async function modelFacts(folder: string): Promise<Facts> {
  const gguf = await ggufFile(folder);
  const missing = gguf === undefined ? await missingFile(folder) : undefined;
  if (missing !== undefined) {
    const { classifier } = readConfig((await readJson(join(folder, CONFIG))) ?? {});
    return { kind: classifier ? "classifier" : "model", format: null, base: null, fault: `${missing} is missing` };
  }
  const checkpoint = await openCheckpoint(folder);
  const [main] = [...totalsByDtype(checkpoint).keys()];
  const { classifier } = readConfig(checkpoint.config);
  return { kind: classifier ? "classifier" : "model", format: main?.toLowerCase() ?? null, base: null, fault: null };
}

async function adapterFacts(folder: string): Promise<Facts> {
  const json = await readJson(join(folder, ADAPTER_CONFIG));
  const base = typeof json?.base_model_name_or_path === "string" ? json.base_model_name_or_path : null;
  if (!(await exists(join(folder, ADAPTER_WEIGHTS))))
    return { kind: "adapter", format: null, base, fault: `${ADAPTER_WEIGHTS} is missing` };
  const { tensors } = await openAdapter(folder);
  const [first] = tensors.values();
  return { kind: "adapter", format: first.dtype.toLowerCase(), base, fault: null };
}

/** The folders and GGUF files at or below a path that hold a model or an adapter. */
async function holders(path: string, depth: number): Promise<string[]> {
  const itself = await holdsItem(path);
  const own = itself ? [path] : [];
  const found = await lstat(path).catch(() => null);
  if (depth === 0 || !found?.isDirectory()) return own;
  const entries = await readdir(path, { withFileTypes: true }).catch(() => []);
  const inner = entries.filter((e) => (e.isDirectory() && !SKIPPED.test(e.name)) || (!itself && e.isFile() && /\.gguf$/i.test(e.name)));
  const each = await Promise.all(inner.map(({ name }) => holders(join(path, name), depth - 1)));
  return [...own, ...each.flat().sort()];
}

/** Whether a path holds something of ours: an adapter, a config of this family of models, or a GGUF file. */
async function holdsItem(path: string): Promise<boolean> {
  const found = await lstat(path).catch(() => null);
  if (found?.isFile()) return /\.gguf$/i.test(path);
  if (!found?.isDirectory()) return false;
  if ((await isAdapter(path)) || (await ggufFile(path)) !== undefined) return true;
  const config = await readJson(join(path, CONFIG)).catch(() => null);
  if (!config) return false;
  try {
    readConfig(config);
    return true;
  } catch {
    // A config of this family that is broken is listed with its fault; others are not ours.
    return /ernie4_5/i.test(`${config.model_type} ${config.architectures}`);
  }
}

async function isAdapter(folder: string): Promise<boolean> {
  return (await exists(join(folder, ADAPTER_CONFIG))) && !(await exists(join(folder, CONFIG)));
}

async function names(folder: string): Promise<string[]> {
  return readdir(folder).catch(() => []);
}

/** Bytes of the files below a path; links count nothing, so that a blob of the cache counts once. */
async function sizeOf(path: string): Promise<number> {
  const found = await lstat(path).catch(() => null);
  if (!found?.isDirectory()) return found?.isFile() ? found.size : 0;
  const each = await Promise.all((await names(path)).map((name) => sizeOf(join(path, name))));
  return each.reduce((sum, bytes) => sum + bytes, 0);
}
