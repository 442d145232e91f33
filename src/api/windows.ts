/** The text that a calibration runs through a model, as windows of its tokens. Knows no model. */
import { createHash } from "node:crypto";
import { readFile, stat } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { CheckpointError, errorText } from "../checkpoint/error.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";

/** The text that comes with mixtape: `calibration: "builtin"`. */
const BUILTIN = fileURLToPath(new URL("../../models/calibration/text.txt", import.meta.url));
const MOST_BYTES = 4 * 2 ** 20;
const MOST_WINDOWS = 64;
const LEAST_TOKENS = 4096;
const WINDOW = 512;

export interface Windows {
  /** All of one length. */
  readonly tokens: readonly (readonly number[])[];
  /** SHA-256 of the tokens. */
  readonly digest: string;
}

/**
 * At most 64 windows of 512 tokens, spread evenly over the text, or of `longest` tokens if that is less.
 * @param from a file with UTF-8 text of at most 4 MiB and at least 4,096 tokens, or `builtin`
 * @throws CheckpointError that names the file and says what is wrong with it
 */
export async function readWindows(from: string, tokenizer: Tokenizer, longest: number): Promise<Windows> {
  const path = from === "builtin" ? BUILTIN : from;
  const ids = tokenizer.encode(await readText(path), { add_special_tokens: false });
  const length = Math.min(WINDOW, longest);
  if (ids.length < Math.max(LEAST_TOKENS, length))
    throw new CheckpointError(
      path,
      `holds ${ids.length} tokens of text; a calibration needs at least ${LEAST_TOKENS}, better 32768: give a longer text, or 'builtin'`,
    );
  const count = Math.min(MOST_WINDOWS, Math.floor(ids.length / length));
  const stride = Math.floor(ids.length / count);
  const tokens = Array.from({ length: count }, (_, i) => ids.slice(i * stride, i * stride + length));
  return { tokens, digest: createHash("sha256").update(Int32Array.from(tokens.flat())).digest("hex") };
}

async function readText(path: string): Promise<string> {
  let bytes: Uint8Array;
  try {
    const { size } = await stat(path);
    if (size > MOST_BYTES)
      throw new CheckpointError(path, `holds ${size} bytes; a calibration reads at most ${MOST_BYTES}: give a part of it`);
    bytes = await readFile(path);
  } catch (cause) {
    if (cause instanceof CheckpointError) throw cause;
    throw new CheckpointError(path, `can't be read as a calibration text (${errorText(cause)})`, { cause });
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new CheckpointError(path, "is not UTF-8 text; a calibration needs plain text in UTF-8", { cause });
  }
}
