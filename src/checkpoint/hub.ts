/**
 * Resolves the name of a model or an adapter to a local folder: a folder stands for itself, and a hub id is downloaded into the Hugging Face
 * cache, which other tools share. Decides which files it needs; `download.ts` downloads one, `remote.ts` talks to the hub.
 */
import { randomUUID } from "node:crypto";
import { copyFile, mkdir, readFile, rename, rm, stat, symlink, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative } from "node:path";
import { ADAPTER_CONFIG, ADAPTER_WEIGHTS } from "./adapter.ts";
import { CONFIG, exists, fileInstead, INDEX, missingFile, readShardNames, WEIGHTS } from "./checkpoint.ts";
import { download, type RemoteFile } from "./download.ts";
import { CheckpointError, errorCode, errorText } from "./error.ts";
import { ggufFile } from "./gguf/locate.ts";
import { ATTEMPTS, type Remote, remoteFetch, retrying, Unavailable } from "./remote.ts";

/** Progress of downloading one file. */
export interface DownloadProgress {
  readonly file: string;
  readonly loadedBytes: number;
  readonly totalBytes: number;
  /** `done` counts complete files, including cached ones; `total` is known once the index of shards is read. */
  readonly files: { readonly done: number; readonly total: number };
}

export interface ResolveOptions {
  /** Branch, tag or commit. Default "main". */
  readonly revision?: string;
  /** Default: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `HF_HOME`/hub, else ~/.cache/huggingface/hub. */
  readonly cache_dir?: string;
  /** Default: `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else the file `HF_HOME`/token, else none. */
  readonly token?: string;
  /** Use only what is in the cache. Default: whether `HF_HUB_OFFLINE` is set to 1, true, yes or on. */
  readonly local_files_only?: boolean;
  /** What the repository has to be: `adapter` takes the adapter's files; `model`, the default, a model's, or an adapter's where there is no model. */
  readonly kind?: "model" | "adapter";
  /** False omits the weights: only config and tokenizer. Default true. */
  readonly withWeights?: boolean;
  /** Called at the start and end of each download, and at most ten times a second in between. */
  readonly onProgress?: (progress: DownloadProgress) => void;
  /** Called when the hub can't be reached and the cached copy is used. Default: `process.emitWarning`. */
  readonly onWarning?: (message: string) => void;
  /** Called before the hub is tried again, with the reason and the wait. Default: nothing. */
  readonly onRetry?: (message: string) => void;
  /** Aborts the download; the part received is kept for the next time. */
  readonly signal?: AbortSignal;
  /** Delay before the second attempt, doubled for each further one. Default 1000. */
  readonly retryDelayMs?: number;
}

const SMALL_FILE =
  /^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json$|^tokenizer\.model$|^chat_template[\w.-]*$/;
/** System errors of a cache that may not be written. */
const READ_ONLY: ReadonlySet<string> = new Set(["EACCES", "EPERM", "EROFS"]);
const COMMIT = /^[0-9a-f]{40}$/;

/**
 * Finds the local folder of a model, downloading it if needed. `HF_ENDPOINT` sets a hub other than huggingface.co.
 * @param idOrFolder a folder, or a hub id: `org/name` or `name`
 * @returns the folder as given, or the snapshot's folder in the cache
 * @throws CheckpointError, in one line, or the reason of the signal
 */
export async function resolveModel(idOrFolder: string, options: ResolveOptions = {}): Promise<string> {
  if (await isLocal(idOrFolder)) return idOrFolder;
  const { revision = "main", withWeights = true } = options;
  if (!/^[\w.-]+(\/[\w.-]+)?$/.test(idOrFolder) || /\.\.|--|^\.|^\//.test(idOrFolder)) {
    throw new CheckpointError(idOrFolder, "no such folder, and not a hub id either (org/name)");
  }
  if (!/^[\w.+-]+(\/[\w.+-]+)*$/.test(revision) || revision.includes("..")) {
    throw new CheckpointError(idOrFolder, `${JSON.stringify(revision)} is not a revision: it must be a branch, tag or commit`);
  }
  const { getHFHubCachePath, getRepoFolderName, HUB_URL } = await import("@huggingface/hub");
  const cache = options.cache_dir ?? getHFHubCachePath();
  const repo = join(cache, getRepoFolderName({ type: "model", name: idOrFolder }));
  const { folder, fault } = await cached(repo, revision, withWeights, options.kind);
  if (options.local_files_only ?? offline()) {
    if (folder) return folder;
    throw new CheckpointError(
      idOrFolder,
      `no local folder has this name, and ${fault}; run once online (offline now: HF_HUB_OFFLINE or local_files_only)`,
    );
  }
  const endpoint = (process.env["HF_ENDPOINT"] || HUB_URL).replace(/\/+$/, "");
  if (!URL.canParse(endpoint)) throw new CheckpointError(idOrFolder, `HF_ENDPOINT is ${endpoint}: not a URL`);
  const remote: Remote = {
    endpoint,
    id: idOrFolder,
    revision,
    token: options.token ?? (await findToken()),
    signal: options.signal,
    retryDelayMs: options.retryDelayMs ?? 1000,
    onRetry: options.onRetry,
  };
  options.signal?.throwIfAborted();
  let listing: Listing;
  try {
    listing = await retrying(remote, folder ? 1 : ATTEMPTS, () => list(remote));
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error;
    if (!folder)
      throw new CheckpointError(
        idOrFolder,
        `no local folder has this name; ${error.message}, and ${fault}; check the name and the network`,
        {
          cause: error,
        },
      );
    (options.onWarning ?? process.emitWarning)(`${idOrFolder}: ${error.message}; using the cached ${folder}`);
    return folder;
  }
  try {
    return await fetchSnapshot(remote, listing, repo, options);
  } catch (error) {
    // A cache that others fill, mounted read-only: what is complete in it can be used, if not the newest.
    if (!folder || !(error instanceof CheckpointError) || !READ_ONLY.has(errorCode(error.cause) ?? "")) throw error;
    (options.onWarning ?? process.emitWarning)(`${error.message}; using the cached ${folder}`);
    return folder;
  }
}

/** A commit and the files at its root. */
interface Listing {
  readonly commit: string;
  readonly files: ReadonlyMap<string, RemoteFile>;
}

async function list(remote: Remote): Promise<Listing> {
  const { listFiles, modelInfo } = await import("@huggingface/hub");
  const { endpoint, id, revision } = remote;
  const hub = { hubUrl: endpoint, fetch: remoteFetch(remote) };
  const { sha } = await modelInfo({ ...hub, name: id, revision, additionalFields: ["sha"] });
  if (typeof sha !== "string" || !COMMIT.test(sha)) throw new CheckpointError(id, `${endpoint} names the commit ${sha}; not a hub`);
  const files = new Map<string, RemoteFile>();
  for await (const { type, path, size, oid, lfs } of listFiles({ ...hub, repo: { type: "model", name: id }, revision: sha })) {
    const [etag, bytes] = [lfs?.oid ?? oid ?? "", lfs?.size ?? size];
    if (type !== "file") continue;
    if (!/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(etag) || !Number.isSafeInteger(bytes)) {
      throw new CheckpointError(id, `${endpoint} lists ${path} with ${bytes} bytes and the hash ${JSON.stringify(etag)}; not a hub`);
    }
    files.set(path, { path, url: `${endpoint}/${id}/resolve/${sha}/${encodeURIComponent(path)}`, bytes, etag });
  }
  return { commit: sha, files };
}

/** Downloads the files of a commit that the cache lacks, then points the revision's ref at it. */
async function fetchSnapshot(remote: Remote, { commit, files }: Listing, repo: string, options: ResolveOptions): Promise<string> {
  const folder = join(repo, "snapshots", commit);
  const blobs = join(repo, "blobs");
  let [done, total] = [0, 0];
  const get = async (name: string) => {
    const file = files.get(name);
    if (!file) throw new CheckpointError(remote.id, `the repository has no ${name}${instead(files)}`);
    const link = join(folder, name);
    const blob = join(blobs, file.etag);
    // Whatever the cache holds needs no write: it may be read-only.
    if (!(await isFile(link))) {
      await atCache(repo, async () => {
        await mkdir(blobs, { recursive: true });
        await mkdir(folder, { recursive: true });
      });
      if (!(await isFile(blob))) {
        await download(remote, file, blob, (loadedBytes) => {
          const whole = loadedBytes === file.bytes ? 1 : 0;
          options.onProgress?.({ file: name, loadedBytes, totalBytes: file.bytes, files: { done: done + whole, total } });
        });
      }
      await atCache(link, () => linkTo(blob, link));
    }
    done++;
  };

  const adapts = options.kind === "adapter" || (!files.has(CONFIG) && files.has(ADAPTER_CONFIG));
  const small = [...files.keys()].filter((name) => SMALL_FILE.test(name) && name !== CONFIG);
  let weights: string[];
  total = small.length + (options.withWeights === false ? 1 : 2);
  await get(adapts ? ADAPTER_CONFIG : CONFIG);
  if (options.withWeights === false) weights = [];
  else if (adapts) weights = [ADAPTER_WEIGHTS];
  else if (files.has(WEIGHTS) || !files.has(INDEX)) weights = [WEIGHTS];
  else {
    await get(INDEX);
    weights = await readShardNames(join(folder, INDEX));
    total += weights.length;
  }
  for (const name of [...small, ...weights]) await get(name);
  const ref = join(repo, "refs", remote.revision);
  if (remote.revision !== commit && (await readText(ref)) !== commit) {
    await atCache(repo, () => writeRef(ref, commit)).catch((error: unknown) => {
      if (!(error instanceof CheckpointError) || !READ_ONLY.has(errorCode(error.cause) ?? "")) throw error; // only offline use needs it
    });
  }
  return folder;
}

/** The cached snapshot of a revision, or why there is none. */
async function cached(
  repo: string,
  revision: string,
  weights: boolean,
  kind: ResolveOptions["kind"],
): Promise<{ folder?: string; fault?: string }> {
  const commit = COMMIT.test(revision) ? revision : await readText(join(repo, "refs", revision));
  if (!commit) return { fault: `the cache has no revision ${revision} in ${repo}` };
  const folder = join(repo, "snapshots", commit);
  const adapts = kind === "adapter" || (!(await exists(join(folder, CONFIG))) && (await exists(join(folder, ADAPTER_CONFIG))));
  const missing = adapts ? await missingPart(folder, weights) : await missingFile(folder, { weights });
  return missing ? { fault: `the cache lacks ${missing} in ${folder}` } : { folder };
}

/** The first file of an adapter that a snapshot lacks. */
async function missingPart(folder: string, weights: boolean): Promise<string | undefined> {
  for (const name of weights ? [ADAPTER_CONFIG, ADAPTER_WEIGHTS] : [ADAPTER_CONFIG]) if (!(await exists(join(folder, name)))) return name;
  return undefined;
}

/** Creates a relative link, so that the cache can be moved; a copy if the system has no links. */
async function linkTo(blob: string, link: string): Promise<void> {
  await rm(link, { force: true });
  try {
    await symlink(relative(dirname(link), blob), link);
  } catch (error) {
    switch (errorCode(error)) {
      case "EEXIST": // another process has just linked the same blob
        return;
      case "EPERM":
      case "ENOSYS":
        return copyFile(blob, link);
      default:
        throw error;
    }
  }
}

async function writeRef(path: string, commit: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const temporary = `${path}.${randomUUID()}.tmp`;
  await writeFile(temporary, commit);
  await rename(temporary, path);
}

/** Runs a change to the cache; system errors become one line that names the path. */
async function atCache<T>(path: string, change: () => Promise<T>): Promise<T> {
  try {
    return await change();
  } catch (cause) {
    if (cause instanceof CheckpointError) throw cause;
    throw new CheckpointError(path, `the cache can't be written (${errorText(cause)}); set HF_HUB_CACHE to another folder`, { cause });
  }
}

async function findToken(): Promise<string | undefined> {
  const token = process.env["HF_TOKEN"]?.trim() || process.env["HUGGING_FACE_HUB_TOKEN"]?.trim();
  if (token) return token;
  const home = process.env["HF_HOME"] ?? join(process.env["XDG_CACHE_HOME"] ?? join(homedir(), ".cache"), "huggingface");
  return (await readText(process.env["HF_TOKEN_PATH"] ?? join(home, "token"))) || undefined;
}

function offline(): boolean {
  return /^(1|true|yes|on)$/i.test(process.env["HF_HUB_OFFLINE"] ?? "");
}

function instead(files: ReadonlyMap<string, RemoteFile>): string {
  const others = [...files.keys()].filter((name) => /\.(safetensors|bin|pt|pth|gguf|pdparams)$/i.test(name)).sort();
  return others.length === 0 ? "" : ` (it has ${others.slice(0, 3).join(", ")}${others.length > 3 ? ", …" : ""})`;
}

async function readText(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, "utf8")).trim();
  } catch (error) {
    if (errorCode(error) === "ENOENT") return undefined;
    throw new CheckpointError(path, `can't be read (${errorText(error)})`, { cause: error });
  }
}

/** Whether the path is a model: a folder, or a GGUF file. */
async function isLocal(path: string): Promise<boolean> {
  const found = await statOrUndefined(path);
  if (found?.isFile() && (await ggufFile(path)) === undefined) throw new CheckpointError(path, await fileInstead(path));
  if (found && !found.isFile() && !found.isDirectory()) throw new CheckpointError(path, "neither a file nor a folder");
  return found !== undefined;
}

async function isFile(path: string): Promise<boolean> {
  return (await statOrUndefined(path)) !== undefined;
}

async function statOrUndefined(path: string) {
  try {
    return await stat(path);
  } catch (error) {
    if (errorCode(error) === "ENOENT" || errorCode(error) === "ENOTDIR") return undefined;
    throw new CheckpointError(path, `can't be read (${errorText(error)})`, { cause: error });
  }
}
