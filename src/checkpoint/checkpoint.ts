/**
 * A model on disk: its configs, and every tensor of one or more safetensors files or of one GGUF file. Knows what is stored, not
 * what a model needs (see `names.ts`). Reads headers only, never weights.
 */
import { readdir, readFile, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { type BlockMatrix, readBlockMatrices } from "./blocks.ts";
import { CheckpointError, errorCode, errorText } from "./error.ts";
import { firstBytes, ggufFile } from "./gguf/locate.ts";
import { readHeader, STORED_BITS, type StoredDtype, type TensorEntry } from "./safetensors.ts";

export interface Checkpoint {
  /** Absolute path; for a GGUF file, the folder that contains it. */
  readonly folder: string;
  /** `config.json`, unchanged. */
  readonly config: Record<string, unknown>;
  /** `generation_config.json`, unchanged; null if there is none. */
  readonly generationConfig: Record<string, unknown> | null;
  /** Every stored tensor by name, of all files. */
  readonly tensors: ReadonlyMap<string, TensorEntry>;
  /** `__metadata__` of the files; if shards disagree on a key, the first shard by name wins. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Tensors in one of our block formats or one of GGUF's; empty for other checkpoints. */
  readonly blocks: ReadonlyMap<string, BlockMatrix>;
}

export const CONFIG = "config.json";
const GENERATION_CONFIG = "generation_config.json";
export const WEIGHTS = "model.safetensors";
export const INDEX = "model.safetensors.index.json";

/**
 * Opens a model folder: reads its configs and the headers of its weights, and checks that they agree.
 * @param folder contains config.json, and model.safetensors or model.safetensors.index.json with its shards; or a GGUF file, or
 * a folder whose only weights are one GGUF file
 * @throws CheckpointError for anything that is missing, broken or contradictory
 */
export async function openCheckpoint(folder: string): Promise<Checkpoint> {
  const root = resolve(folder);
  const archive = await ggufFile(root);
  if (archive) return (await import("./gguf/archive.ts")).openArchive(archive);
  await checkFolder(root);
  const config = await readJson(join(root, CONFIG));
  if (!config) throw new CheckpointError(root, `no ${CONFIG} in this folder; a checkpoint in the Hugging Face layout has one`);
  const generationConfig = await readJson(join(root, GENERATION_CONFIG));
  return { folder: root, config, generationConfig, ...(await openWeights(root)) };
}

/** The tensors of one dtype in a checkpoint. */
export interface DtypeTotal {
  readonly tensors: number;
  /** Number of elements; for a block matrix, of its logical shape. */
  readonly elements: number;
  readonly bytes: number;
}

/** Totals by stored dtype, largest first; tensors in block formats count under their format: `int8`, `q4_0`. */
export function totalsByDtype(checkpoint: Checkpoint): Map<StoredDtype | BlockMatrix["dtype"], DtypeTotal> {
  const totals = new Map<StoredDtype | BlockMatrix["dtype"], DtypeTotal>();
  for (const { name, dtype, bytes } of checkpoint.tensors.values()) {
    const block = checkpoint.blocks.get(name);
    const elements = block ? block.shape[0] * block.shape[1] : (bytes * 8) / STORED_BITS[dtype];
    const key = block?.dtype ?? dtype;
    const old = totals.get(key) ?? { tensors: 0, elements: 0, bytes: 0 };
    totals.set(key, { tensors: old.tensors + 1, elements: old.elements + elements, bytes: old.bytes + bytes });
  }
  return new Map([...totals].sort(([, a], [, b]) => b.bytes - a.bytes));
}

/**
 * The first file missing from a model folder, of config, weights and shards; `undefined` if all exist. Checks existence only.
 * `weights: false` checks only the config.
 */
export async function missingFile(folder: string, { weights = true } = {}): Promise<string | undefined> {
  if (!(await exists(join(folder, CONFIG)))) return CONFIG;
  if (!weights || (await exists(join(folder, WEIGHTS)))) return undefined;
  if (!(await exists(join(folder, INDEX)))) return WEIGHTS;
  for (const shard of await readShardNames(join(folder, INDEX))) if (!(await exists(join(folder, shard)))) return shard;
  return undefined;
}

/** The files that an index of shards lists, sorted. */
export async function readShardNames(indexFile: string): Promise<string[]> {
  return shardNames(parseWeightMap((await readJson(indexFile))?.["weight_map"], indexFile));
}

async function openWeights(root: string): Promise<Pick<Checkpoint, "tensors" | "metadata" | "blocks">> {
  const whole = join(root, WEIGHTS);
  if (await exists(whole)) return merge([whole]);
  const indexFile = join(root, INDEX);
  const index = await readJson(indexFile);
  if (!index) throw new CheckpointError(root, `no weights: looked for ${WEIGHTS} and ${INDEX}${await foundInstead(root)}`);

  const shardOf = parseWeightMap(index["weight_map"], indexFile);
  const shards = shardNames(shardOf);
  for (const shard of shards) {
    if (!(await exists(join(root, shard)))) {
      throw new CheckpointError(root, `the shard ${shard} is missing (${shards.length} are listed in ${INDEX}); fetch it again`);
    }
  }
  const weights = await merge(shards.map((shard) => join(root, shard)));
  for (const [name, shard] of shardOf) {
    const entry = weights.tensors.get(name);
    if (entry?.file !== join(root, shard)) {
      const where = entry ? `it is in ${entry.file}` : "no shard holds it";
      throw new CheckpointError(
        indexFile,
        `tensor ${name} is listed in ${shard}, but ${where}; the index and the shards don't belong together`,
      );
    }
  }
  return weights;
}

async function merge(files: readonly string[]): Promise<Pick<Checkpoint, "tensors" | "metadata" | "blocks">> {
  const tensors = new Map<string, TensorEntry>();
  const blocks = new Map<string, BlockMatrix>();
  const metadata: Record<string, string> = Object.create(null);
  for (const file of files) {
    const header = await readHeader(file);
    for (const [name, entry] of header.tensors) {
      const other = tensors.get(name);
      if (other) throw new CheckpointError(file, `tensor ${name} is also in ${other.file}; a tensor may be stored only once`);
      tensors.set(name, entry);
    }
    for (const [name, matrix] of readBlockMatrices(file, header)) blocks.set(name, matrix);
    for (const [key, text] of Object.entries(header.metadata)) metadata[key] ??= text;
  }
  return { tensors, metadata, blocks };
}

function parseWeightMap(weightMap: unknown, file: string): Map<string, string> {
  if (typeof weightMap !== "object" || weightMap === null || Array.isArray(weightMap)) {
    throw new CheckpointError(file, "weight_map is missing or not an object");
  }
  const shardOf = new Map<string, string>();
  for (const [name, shard] of Object.entries(weightMap)) {
    if (typeof shard !== "string" || !/^[^/\\:]+\.safetensors$/.test(shard)) {
      throw new CheckpointError(
        file,
        `the shard of ${name} is ${JSON.stringify(shard)}: not the name of a .safetensors file in this folder`,
      );
    }
    shardOf.set(name, shard);
  }
  if (shardOf.size === 0) throw new CheckpointError(file, "weight_map lists no tensors");
  return shardOf;
}

function shardNames(shardOf: ReadonlyMap<string, string>): string[] {
  return [...new Set(shardOf.values())].sort();
}

async function checkFolder(root: string): Promise<void> {
  try {
    if (!(await stat(root)).isDirectory()) throw new CheckpointError(root, await fileInstead(root));
  } catch (cause) {
    if (cause instanceof CheckpointError) throw cause;
    throw new CheckpointError(root, errorCode(cause) === "ENOENT" ? "no such folder" : `can't be read (${errorText(cause)})`, { cause });
  }
}

/** What to say about a file that is given in place of a model. */
export async function fileInstead(file: string): Promise<string> {
  const start = await firstBytes(file, 9);
  const safetensors = start.length === 9 && start[8] === 0x7b && start.readBigUInt64LE(0) < 2n ** 32n;
  const seen = start.length === 0 ? "an empty file" : safetensors ? "a safetensors file" : "a file that is not GGUF";
  return `${seen}; give the folder that holds config.json${safetensors ? " and the weights" : ""}, a GGUF file, or a hub id`;
}

/** A JSON object from a file, or null if there is no such file. */
export async function readJson(file: string): Promise<Record<string, unknown> | null> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (cause) {
    if (errorCode(cause) === "ENOENT") return null;
    throw new CheckpointError(file, `can't be read (${errorText(cause)})`, { cause });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new CheckpointError(file, `broken JSON (${errorText(cause)})`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new CheckpointError(file, "not a JSON object");
  return value as Record<string, unknown>;
}

export async function exists(file: string): Promise<boolean> {
  try {
    await stat(file);
    return true;
  } catch (cause) {
    if (errorCode(cause) === "ENOENT") return false;
    throw new CheckpointError(file, `can't be read (${errorText(cause)})`, { cause });
  }
}

/** A hint about weights in an unsupported format, or about too many GGUF files. */
async function foundInstead(root: string): Promise<string> {
  const others = (await readdir(root)).filter((name) => /\.(safetensors|bin|pt|pth|gguf|pdparams)$/i.test(name)).sort();
  if (others.length === 0) return "";
  const archives = others.length > 1 && others.every((name) => /\.gguf$/i.test(name));
  return `; found ${others.slice(0, 3).join(", ")}${others.length > 3 ? ", …" : ""}, ${archives ? "name one of them" : "which is not supported"}`;
}
