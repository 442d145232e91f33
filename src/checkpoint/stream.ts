/**
 * A file that comes to be whole or not at all: written to a temporary name, synced, renamed. It knows no format; a system
 * error becomes one line that says what to do.
 */
import { randomUUID } from "node:crypto";
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { CheckpointError, errorCode, errorText } from "./error.ts";

/** Most that one system call reads or writes. */
export const CHUNK_BYTES = 64 * 2 ** 20;

/**
 * Lets `fill` write a file of `total` bytes (for messages), then gives it its name, durably.
 * @param resumable write to `<file>.partial`, which may be there already, and keep it when something goes wrong
 * @throws CheckpointError where the disk fails; errors of `fill` pass through, and a file already there stays as it was
 */
export async function writeWhole(
  file: string,
  total: number,
  resumable: boolean,
  fill: (target: FileHandle) => Promise<void>,
): Promise<void> {
  const temporary = resumable ? `${file}.partial` : `${file}.${randomUUID()}.tmp`;
  let handle: FileHandle | undefined;
  try {
    const target = await atFile(file, total, () => open(temporary, resumable ? "a+" : "wx+"));
    handle = target;
    await fill(target);
    await atFile(file, total, () => target.sync());
    handle = undefined;
    await atFile(file, total, () => target.close());
    await atFile(file, total, () => rename(temporary, file));
  } catch (error) {
    try {
      await handle?.close();
    } finally {
      if (!resumable) await rm(temporary, { force: true });
    }
    throw error;
  }
  await syncFolder(dirname(file));
}

/** What the makers make, in their order, up to `concurrency` of it in the making. */
export async function* produced(makers: readonly (() => Promise<Uint8Array>)[], concurrency: number): AsyncGenerator<Uint8Array> {
  const making: Promise<Uint8Array>[] = [];
  try {
    for (let next = 0, at = 0; at < makers.length; at++) {
      for (; next < makers.length && next < at + concurrency; next++) {
        const made = makers[next]();
        made.catch(() => {}); // thrown below, when its turn comes
        making.push(made);
      }
      yield await making[at];
      delete making[at];
    }
  } finally {
    await Promise.allSettled(making);
  }
}

/** Appends all of `data`. */
export async function writeAll(handle: FileHandle, data: Uint8Array, file: string, total: number): Promise<void> {
  for (let done = 0; done < data.byteLength; ) {
    const { bytesWritten } = await atFile(file, total, () => handle.write(data, done, Math.min(data.byteLength - done, CHUNK_BYTES)));
    done += bytesWritten;
  }
}

/** Runs one operation on the file; a system error becomes one line that says what to do. */
async function atFile<T>(file: string, total: number, operation: () => Promise<T>): Promise<T> {
  try {
    return await operation();
  } catch (cause) {
    switch (errorCode(cause)) {
      case "ENOSPC":
      case "EDQUOT":
        throw new CheckpointError(file, `the disk is full: ${total} bytes are needed in ${dirname(file)}; free some and run again`, {
          cause,
        });
      case "ENOENT":
        throw new CheckpointError(file, `can't be written: no folder ${dirname(file)}`, { cause });
      default:
        throw new CheckpointError(file, `can't be written (${errorText(cause)})`, { cause });
    }
  }
}

/** Makes the rename itself durable. Windows can't open a folder, and needs no such step. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === "win32") return;
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
