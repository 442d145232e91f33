/**
 * Writes a file atomically: to a temporary name, synced, then renamed. System errors become one line that says what to do.
 * Knows no format.
 */
import { randomUUID } from "node:crypto";
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { CheckpointError, errorCode, errorText } from "./error.ts";

/** Maximum number of bytes per system call. */
export const CHUNK_BYTES = 64 * 2 ** 20;

/**
 * Lets `fill` write a file, then renames it durably. `total` is its size in bytes, for error messages.
 * @param resumable write to `<file>.partial`, which may already exist, and keep it on failure
 * @throws CheckpointError if writing fails; errors of `fill` pass through. An existing file then stays unchanged.
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

/** Yields the results of the makers in order, running up to `concurrency` of them at a time. */
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

/** Runs one operation on the file; system errors become one line that says what to do. */
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

/** Makes the rename itself durable. Windows can't open folders, and doesn't need this. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === "win32") return;
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
