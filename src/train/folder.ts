/**
 * Checkpoints of a run: folders `checkpoint-N` that are complete whenever they exist. Each is written under a temporary name, synced,
 * and renamed. Knows which files there are, not what a trainer does.
 */
import { mkdir, open, readdir, readFile, rename, rm } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import type { State } from "../backend/backend.ts";
import { CheckpointError, errorCode, errorText } from "../checkpoint/error.ts";
import { readHeader, readTensor } from "../checkpoint/safetensors.ts";
import { writeAll, writeWhole } from "../checkpoint/stream.ts";
import { type TensorData, writeSafetensors } from "../checkpoint/writer.ts";
import { holdsCodes } from "./optimiser.ts";

/** Trained parameters, moments and moving averages, exactly. */
export const STATES_FILE = "trainer_states.safetensors";
/** The trainer's place, log and arguments. */
export const STATE_FILE = "trainer_state.json";

const NAME = /^checkpoint-(\d+)$/;
const TEMPORARY = /^\.checkpoint-\d+\.(new|old)$/;

/** The checkpoints in a folder, by step, oldest first. Empty if there is no such folder. */
export async function listCheckpoints(folder: string): Promise<{ readonly step: number; readonly path: string }[]> {
  const names = await readdir(folder).catch((error) => {
    if (errorCode(error) === "ENOENT") return [];
    throw new CheckpointError(folder, `can't be read (${errorText(error)})`, { cause: error });
  });
  return names
    .flatMap((name) => {
      const step = NAME.exec(name)?.[1];
      return step === undefined ? [] : [{ step: Number(step), path: join(folder, name) }];
    })
    .sort((a, b) => a.step - b.step);
}

/** Removes what a run that was killed left unfinished. */
export async function removeUnfinished(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => []))
    if (TEMPORARY.test(name)) await rm(join(folder, name), { recursive: true, force: true });
}

/**
 * Writes a checkpoint. At any instant, the folder has either the whole of it or nothing of it.
 * @param fill writes files into the temporary folder that it is given
 * @throws what `fill` throws; nothing is left behind, and other checkpoints stay as they are
 */
export async function writeCheckpoint(folder: string, step: number, fill: (temporary: string) => Promise<void>): Promise<string> {
  const path = join(resolve(folder), `checkpoint-${step}`);
  const [fresh, old] = [join(dirname(path), `.${basename(path)}.new`), join(dirname(path), `.${basename(path)}.old`)];
  try {
    await rm(fresh, { recursive: true, force: true });
    await mkdir(fresh, { recursive: true });
    await fill(fresh);
    for (const name of await readdir(fresh)) await sync(join(fresh, name));
    await sync(fresh);
    await rm(old, { recursive: true, force: true });
    await rename(path, old).catch((error) => {
      if (errorCode(error) !== "ENOENT") throw error;
    });
    await rename(fresh, path);
    await sync(dirname(path));
    await rm(old, { recursive: true, force: true });
    return path;
  } catch (error) {
    await rm(fresh, { recursive: true, force: true }).catch(() => {});
    if (error instanceof CheckpointError) throw error;
    throw new CheckpointError(path, `can't be written (${errorText(error)})`, { cause: error });
  }
}

/** Writes a JSON file durably. */
export async function writeJson(path: string, value: unknown): Promise<void> {
  const bytes = Buffer.from(`${JSON.stringify(value, null, 1)}\n`);
  await writeWhole(path, bytes.byteLength, false, (target) => writeAll(target, bytes, path, bytes.byteLength));
}

/** Reads a checkpoint's JSON. */
export async function readState(checkpoint: string): Promise<Record<string, unknown>> {
  const path = join(checkpoint, STATE_FILE);
  try {
    const value = JSON.parse(await readFile(path, "utf8"));
    if (typeof value === "object" && value !== null) return value;
    throw new Error("not an object");
  } catch (cause) {
    if (errorCode(cause) === "ENOENT") throw new CheckpointError(checkpoint, `has no ${STATE_FILE}: not a checkpoint of a run`, { cause });
    throw new CheckpointError(path, `can't be read (${errorText(cause)})`, { cause });
  }
}

function formatOf(state: string): "U8" | "F32" {
  return holdsCodes(state) ? "U8" : "F32";
}

/** Writes states by name, one in memory at a time. */
export async function writeStates(checkpoint: string, states: ReadonlyMap<string, Pick<State, "bytes" | "read">>): Promise<void> {
  const tensors = [...states].map(
    ([name, state]): TensorData => ({
      name,
      dtype: formatOf(name),
      shape: [holdsCodes(name) ? state.bytes : state.bytes / 4],
      data: async () => new Uint8Array(state.read().buffer),
    }),
  );
  await writeSafetensors(join(checkpoint, STATES_FILE), tensors);
}

/** Reads states back. Throws CheckpointError naming the first that differs in name or size, before any is overwritten. */
export async function readStates(checkpoint: string, states: ReadonlyMap<string, Pick<State, "bytes" | "write">>): Promise<void> {
  const path = join(checkpoint, STATES_FILE);
  const { tensors } = await readHeader(path);
  for (const [name, { bytes }] of states) {
    const entry = tensors.get(name);
    if (!entry) throw new CheckpointError(path, `has no '${name}', which this run trains: the run was configured otherwise`);
    if (entry.bytes !== bytes || entry.dtype !== formatOf(name))
      throw new CheckpointError(path, `'${name}' has ${entry.bytes} bytes, this run's has ${bytes}: the run was configured otherwise`);
  }
  const extra = [...tensors.keys()].find((name) => !states.has(name));
  if (extra !== undefined)
    throw new CheckpointError(path, `holds '${extra}', which this run does not train: the run was configured otherwise`);
  for (const [name, state] of states) {
    const bytes = await readTensor(tensors.get(name) as Parameters<typeof readTensor>[0]);
    state.write(new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer));
  }
}

/** Makes a file or a folder's names durable. Windows can't open folders, and doesn't need it. */
async function sync(path: string): Promise<void> {
  if (process.platform === "win32") return;
  const handle = await open(path, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
