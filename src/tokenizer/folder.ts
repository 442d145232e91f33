// The tokenizer files of a local folder, read and parsed. Knows their names and how to say what is wrong with them, not what they mean.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { TokenizerError } from "./error.ts";

export interface TokenizerFiles {
  /** Parsed tokenizer.json. It wins over tokenizer.model, so at most one of the two is there. */
  readonly json: unknown;
  readonly model: Uint8Array | null;
  /** tokenizer_config.json; `{}` where absent, as the next two. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly specialTokensMap: Readonly<Record<string, unknown>>;
  readonly addedTokens: Readonly<Record<string, unknown>>;
  /** chat_template.jinja, or else `chat_template` of chat_template.json; null without both. */
  readonly chatTemplate: string | null;
}

/** Reads a folder. Throws `TokenizerError` when there is no tokenizer in it or a JSON file is broken. */
export async function readFolder(folder: string): Promise<TokenizerFiles> {
  const [json, config, specialTokensMap, addedTokens, jinja, chatJson] = await Promise.all([
    read(folder, "tokenizer.json"),
    object(folder, "tokenizer_config.json"),
    object(folder, "special_tokens_map.json"),
    object(folder, "added_tokens.json"),
    read(folder, "chat_template.jinja"),
    object(folder, "chat_template.json"),
  ]);
  const model = json === null ? await read(folder, "tokenizer.model") : null;
  if (json === null && model === null)
    throw new TokenizerError(`no tokenizer in ${folder}: neither tokenizer.json nor tokenizer.model is there`);
  const template = jinja?.toString("utf8") ?? chatJson["chat_template"];
  return {
    json: json === null ? null : parseJson(join(folder, "tokenizer.json"), json.toString("utf8")),
    model,
    config,
    specialTokensMap,
    addedTokens,
    chatTemplate: typeof template === "string" ? template : null,
  };
}

/** Parses JSON. Throws `TokenizerError` with file, line and column of the first character that can't be. */
export function parseJson(file: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    const position = firstBadPosition(text);
    const before = text.slice(0, position).split("\n");
    const seen =
      position < text.length ? `unexpected ${JSON.stringify(String.fromCodePoint(text.codePointAt(position) ?? 0))}` : "unexpected end";
    throw new TokenizerError(`${file}: broken JSON: ${seen} at line ${before.length}, column ${(before.at(-1) ?? "").length + 1}`);
  }
}

/**
 * Node's messages don't always tell the position, so look for the shortest prefix that is wrong otherwise than by being too short.
 * A prefix is only too short when something that could follow makes it wrong later than at its end.
 */
function firstBadPosition(text: string): number {
  let good = 0; // a prefix of this length may still be completed
  let bad = text.length + 1;
  while (bad - good > 1) {
    const middle = (good + bad) >> 1;
    if (completable(text.slice(0, middle))) good = middle;
    else bad = middle;
  }
  return good;
}

function completable(prefix: string): boolean {
  try {
    JSON.parse(prefix);
    return true;
  } catch (error) {
    const message = error instanceof Error ? error.message : "";
    const position = /at position (\d+)/.exec(message);
    return message.startsWith("Unexpected end") || (position !== null && Number(position[1]) >= prefix.length);
  }
}

async function object(folder: string, name: string): Promise<Readonly<Record<string, unknown>>> {
  const bytes = await read(folder, name);
  if (bytes === null) return {};
  const value = parseJson(join(folder, name), bytes.toString("utf8"));
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new TokenizerError(`${join(folder, name)}: not a JSON object`);
  return value as Record<string, unknown>;
}

async function read(folder: string, name: string): Promise<Buffer | null> {
  try {
    return await readFile(join(folder, name));
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : undefined;
    if (code === "ENOENT" || code === "ENOTDIR") return null;
    throw new TokenizerError(`${join(folder, name)}: cannot be read: ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
}
