/** Reads pieces of files, of which it keeps only so many open. Knows nothing of what is in them. */
import { type FileHandle, open } from "node:fs/promises";
import { DataError } from "./fault.ts";

const MOST_OPEN = 64;

export class Handles {
  /** Latest used last. */
  readonly #open = new Map<string, { readonly handle: Promise<FileHandle>; users: number }>();

  /** Exactly `length` bytes from `offset`. Throws DataError for a file that is gone or has become shorter. */
  async read(path: string, offset: number, length: number): Promise<Uint8Array> {
    const known = this.#open.get(path) ?? { handle: open(path), users: 0 };
    this.#open.delete(path);
    this.#open.set(path, known);
    known.users++;
    try {
      const handle = await known.handle.catch((cause) => {
        this.#open.delete(path);
        throw new DataError(`${path}: the file cannot be read: ${cause.message}`, [], { cause });
      });
      const bytes = Buffer.allocUnsafe(length);
      const { bytesRead } = await handle.read(bytes, 0, length, offset);
      if (bytesRead < length) throw new DataError(`${path}: the file has become shorter since it was indexed`);
      return bytes;
    } finally {
      known.users--;
      await this.#closeOldest();
    }
  }

  /** Closes all. Reading again opens files again. */
  async close(): Promise<void> {
    const all = [...this.#open.values()];
    this.#open.clear();
    await Promise.all(all.map(async ({ handle }) => (await handle).close()));
  }

  async #closeOldest(): Promise<void> {
    for (const [path, { handle, users }] of this.#open) {
      if (this.#open.size <= MOST_OPEN) return;
      if (users > 0) continue;
      this.#open.delete(path);
      await (await handle).close();
    }
  }
}
