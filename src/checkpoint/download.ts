/**
 * Downloads one file from a hub into one blob of the cache: resumes a partial one, checks size and hash, and renames the
 * complete file. Knows neither repositories nor which files a model needs.
 */
import { createHash, type Hash } from "node:crypto";
import { createReadStream } from "node:fs";
import { type FileHandle, open, rename, rm, truncate } from "node:fs/promises";
import { CheckpointError, errorCode, errorText } from "./error.ts";
import { ATTEMPTS, delay, networkText, type Remote, remoteFetch, Unavailable } from "./remote.ts";

/** A file as the hub's listing describes it. */
export interface RemoteFile {
  readonly path: string;
  readonly url: string;
  readonly bytes: number;
  /** Name of the blob: the SHA-256 of a large file, or the git blob's SHA-1 of a small one, in hex. */
  readonly etag: string;
}

const PROGRESS_MS = 100;
/** An attempt that received at least this many bytes does not count as failed. */
const GAIN_BYTES = 2 ** 20;

/**
 * Downloads a file to `blob` by way of `blob` + ".incomplete", which is kept on failure so that the next download resumes it.
 * @param onBytes called with the number of bytes so far, at most ten times a second, and at the end
 * @throws CheckpointError that says what was wrong and how to continue, or the reason of the remote's signal
 */
export async function download(remote: Remote, file: RemoteFile, blob: string, onBytes: (loadedBytes: number) => void): Promise<void> {
  const partial = await Partial.open(remote, file, `${blob}.incomplete`);
  try {
    const resumed = partial.loadedBytes > 0;
    await partial.fill(onBytes);
    if (resumed && !partial.whole()) {
      await partial.restart(); // the partial file may be of another version: start over once
      await partial.fill(onBytes);
    }
    if (!partial.whole()) {
      await partial.restart();
      throw new CheckpointError(
        remote.id,
        `${file.path} is damaged: its hash differs from the ${file.etag} of the hub's listing; it was removed, run again`,
      );
    }
    await partial.finish(blob);
  } finally {
    await partial.close();
  }
}

/** A partially downloaded file, open for appending. */
class Partial {
  loadedBytes = 0;
  private hash: Hash;
  private digest: string | undefined;
  private readonly remote: Remote;
  private readonly file: RemoteFile;
  private readonly path: string;
  private readonly handle: FileHandle;

  private constructor(remote: Remote, file: RemoteFile, path: string, handle: FileHandle) {
    this.remote = remote;
    this.file = file;
    this.path = path;
    this.handle = handle;
    this.hash = newHash(file);
  }

  static async open(remote: Remote, file: RemoteFile, path: string): Promise<Partial> {
    const handle = await open(path, "a").catch((cause) => {
      throw new CheckpointError(path, `can't be written (${errorText(cause)})`, { cause });
    });
    const partial = new Partial(remote, file, path, handle);
    try {
      await partial.takeUp();
    } catch (error) {
      await handle.close();
      throw partial.unwritable(error);
    }
    return partial;
  }

  /** Hashes the part from an earlier run. */
  private async takeUp(): Promise<void> {
    const { size } = await this.handle.stat();
    if (size > this.file.bytes) return this.restart();
    if (size > 0) for await (const chunk of createReadStream(this.path, { highWaterMark: 2 ** 20 })) this.hash.update(chunk);
    this.loadedBytes = size;
  }

  /** Downloads the rest, resuming after a broken connection. */
  async fill(onBytes: (loadedBytes: number) => void): Promise<void> {
    onBytes(this.loadedBytes);
    for (let failures = 0; this.loadedBytes < this.file.bytes; ) {
      const before = this.loadedBytes;
      try {
        await this.fetchRest(onBytes);
      } catch (error) {
        this.remote.signal?.throwIfAborted();
        if (!(error instanceof Unavailable)) throw error;
        failures = this.loadedBytes - before >= GAIN_BYTES ? 1 : failures + 1;
        if (failures >= ATTEMPTS) throw this.stopped(`${error.message}, ${ATTEMPTS} times in a row`, error);
        await delay(this.remote, failures, error);
      }
    }
    onBytes(this.loadedBytes);
  }

  /** Whether the hash matches. Call it after `fill`. */
  whole(): boolean {
    this.digest ??= this.hash.digest("hex");
    return this.digest === this.file.etag;
  }

  async restart(): Promise<void> {
    await truncate(this.path, 0);
    this.loadedBytes = 0;
    this.hash = newHash(this.file);
    this.digest = undefined;
  }

  async finish(blob: string): Promise<void> {
    try {
      await this.handle.sync();
      await rename(this.path, blob);
    } catch (error) {
      throw this.unwritable(error);
    }
  }

  /** Closes the file, and removes it if it is empty. */
  async close(): Promise<void> {
    await this.handle.close();
    if (this.loadedBytes === 0 && this.file.bytes > 0) await rm(this.path, { force: true });
  }

  private async fetchRest(onBytes: (loadedBytes: number) => void): Promise<void> {
    const { file, remote } = this;
    const headers: Record<string, string> = { "accept-encoding": "identity" };
    if (this.loadedBytes > 0) headers["range"] = `bytes=${this.loadedBytes}-`;
    const response = await remoteFetch(remote)(file.url, { headers });
    if (this.loadedBytes > 0 && response.status !== 206) await this.restart(); // a server without ranges sends the whole file
    const range = response.headers.get("content-range");
    if (response.status === 206 && range !== `bytes ${this.loadedBytes}-${file.bytes - 1}/${file.bytes}`) {
      await response.body?.cancel();
      throw this.stopped(`asked for bytes from ${this.loadedBytes} of ${file.bytes}, got "${range}"`);
    }
    let told = performance.now();
    for await (const chunk of this.chunks(response)) {
      if (this.loadedBytes + chunk.byteLength > file.bytes) {
        await this.restart();
        throw new CheckpointError(
          remote.id,
          `${file.path} is longer than the ${file.bytes} bytes of the hub's listing; it was removed, run again`,
        );
      }
      await this.append(chunk);
      if (performance.now() - told < PROGRESS_MS) continue;
      told = performance.now();
      onBytes(this.loadedBytes);
    }
    if (this.loadedBytes < file.bytes) throw new Unavailable("the connection was cut");
  }

  /** The body's chunks; a broken connection becomes `Unavailable`. */
  private async *chunks(response: Response): AsyncGenerator<Uint8Array> {
    if (!response.body) return;
    const reader = response.body.getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read().catch((cause) => {
          this.remote.signal?.throwIfAborted();
          throw new Unavailable(`the connection was cut (${networkText(cause)})`, { cause });
        });
        if (done) return;
        yield value;
      }
    } finally {
      await reader.cancel().catch(() => undefined); // fails if the connection broke: there is nothing left to cancel
    }
  }

  private async append(chunk: Uint8Array): Promise<void> {
    try {
      for (let done = 0; done < chunk.byteLength; ) {
        const { bytesWritten } = await this.handle.write(chunk, done);
        this.hash.update(chunk.subarray(done, done + bytesWritten));
        this.loadedBytes += bytesWritten;
        done += bytesWritten;
      }
    } catch (error) {
      throw this.unwritable(error);
    }
  }

  private unwritable(cause: unknown): CheckpointError {
    const full = errorCode(cause) === "ENOSPC" || errorCode(cause) === "EDQUOT";
    if (full) return this.stopped(`the disk is full, ${this.file.bytes - this.loadedBytes} more bytes are needed`, cause);
    return new CheckpointError(this.path, `can't be written (${errorText(cause)})`, { cause });
  }

  private stopped(why: string, cause?: unknown): CheckpointError {
    const { file, loadedBytes } = this;
    const kept = loadedBytes > 0 ? `; the part received is kept in ${this.path}, run again to resume` : "; run again later";
    return new CheckpointError(this.remote.id, `${file.path} stopped at byte ${loadedBytes} of ${file.bytes}: ${why}${kept}`, { cause });
  }
}

/** SHA-256, or git's blob hash: SHA-1 of the word "blob", the size, and the bytes. */
function newHash({ etag, bytes }: RemoteFile): Hash {
  return etag.length === 64 ? createHash("sha256") : createHash("sha1").update(`blob ${bytes}\0`);
}
