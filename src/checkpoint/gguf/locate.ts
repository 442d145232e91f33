/** Whether a path means a GGUF file, and which. Reads no more than its first bytes: what does is loaded only where there is one. */
import { open, readdir, stat } from "node:fs/promises";
import { join } from "node:path";

/** The GGUF file that a path means: the path itself, if its name or its first bytes say so, or the only one in a folder without other weights. Else undefined. */
export async function ggufFile(path: string): Promise<string | undefined> {
  const found = await stat(path).catch(() => null);
  if (found?.isFile()) return isGgufName(path) || (await startsAsGguf(path)) ? path : undefined;
  if (!found?.isDirectory()) return undefined;
  const names = await readdir(path);
  const weights = names.filter((name) => isGgufName(name) || /\.(safetensors|safetensors\.index\.json)$/.test(name));
  return weights.length === 1 && isGgufName(weights[0]) ? join(path, weights[0]) : undefined;
}

function isGgufName(name: string): boolean {
  return /\.gguf$/i.test(name);
}

/** Caches name files by their hash, so the name says nothing. */
async function startsAsGguf(path: string): Promise<boolean> {
  return (await firstBytes(path, 4)).toString("latin1") === "GGUF";
}

/** Up to `count` bytes from the beginning of a file; none if it can't be read. */
export async function firstBytes(path: string, count: number): Promise<Buffer> {
  const file = await open(path, "r").catch(() => null);
  try {
    const { buffer, bytesRead } = (await file?.read(Buffer.alloc(count), 0, count, 0)) ?? { buffer: Buffer.alloc(0), bytesRead: 0 };
    return buffer.subarray(0, bytesRead);
  } catch {
    return Buffer.alloc(0);
  } finally {
    await file?.close();
  }
}
