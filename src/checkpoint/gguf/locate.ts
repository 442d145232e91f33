/** Whether a path means a GGUF file, and which. Reads no file: what does is loaded only where there is one. */
import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";

/** The GGUF file that a path means: the path itself, or the only one in a folder without other weights. Else undefined. */
export async function ggufFile(path: string): Promise<string | undefined> {
  const found = await stat(path).catch(() => null);
  if (found?.isFile()) return path.endsWith(".gguf") ? path : undefined;
  if (!found?.isDirectory()) return undefined;
  const names = await readdir(path);
  const weights = names.filter((name) => /\.(safetensors|safetensors\.index\.json|gguf)$/.test(name));
  return weights.length === 1 && weights[0].endsWith(".gguf") ? join(path, weights[0]) : undefined;
}
