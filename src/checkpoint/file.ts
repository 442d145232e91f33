/** Reading a file of a checkpoint: opening, reading in full, and errors that name the file. Knows no format. */
import { type FileHandle, open } from "node:fs/promises";
import { CheckpointError, errorCode, errorText } from "./error.ts";

/** Runs `use` on a file opened for reading. System errors become a CheckpointError. */
export async function withFile<T>(file: string, use: (handle: FileHandle) => Promise<T>): Promise<T> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(file, "r");
    return await use(handle);
  } catch (cause) {
    if (cause instanceof CheckpointError) throw cause;
    if (errorCode(cause) === "ENOENT") throw new CheckpointError(file, "no such file", { cause });
    throw new CheckpointError(file, `can't be read (${errorText(cause)})`, { cause });
  } finally {
    await handle?.close();
  }
}

/** Reads `bytes` bytes from `offset`. Throws CheckpointError if the file ends before that. */
export async function readExactly(handle: FileHandle, file: string, offset: number, bytes: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafeSlow(bytes);
  for (let done = 0; done < bytes; ) {
    const { bytesRead } = await handle.read(buffer, done, Math.min(bytes - done, 1 << 30), offset + done);
    if (bytesRead === 0) throw new CheckpointError(file, `truncated: it ended at byte ${offset + done} while being read`);
    done += bytesRead;
  }
  return buffer;
}
