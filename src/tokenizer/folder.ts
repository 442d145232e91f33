// Reads and parses the tokenizer files of a local folder. Knows their names and reports malformed ones, but does not interpret them.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { TokenizerError } from "./error.ts";
import { checkFile } from "./schema.ts";

export interface TokenizerFiles {
  /** Parsed tokenizer.json. It takes precedence over tokenizer.model, so exactly one of the two is set. */
  readonly json: unknown;
  readonly model: Uint8Array | null;
  /** tokenizer_config.json; `{}` if absent, like the next two. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly specialTokensMap: Readonly<Record<string, unknown>>;
  readonly addedTokens: Readonly<Record<string, unknown>>;
  /** chat_template.jinja, else `chat_template` of chat_template.json, else null. */
  readonly chatTemplate: string | null;
}

/** Reads a folder. Throws `TokenizerError` if it has no tokenizer, or a JSON file is malformed or has a field of the wrong kind. */
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
    throw new TokenizerError(`no tokenizer in ${folder}: it has neither tokenizer.json nor tokenizer.model`);
  const parsed = json === null ? null : parseJson(join(folder, "tokenizer.json"), json.toString("utf8"));
  try {
    if (json !== null) checkFile("tokenizer.json", parsed);
    checkFile("tokenizer_config.json", config);
    checkFile("special_tokens_map.json", specialTokensMap);
    checkFile("added_tokens.json", addedTokens);
    checkFile("chat_template.json", chatJson);
  } catch (cause) {
    throw cause instanceof TokenizerError ? new TokenizerError(join(folder, cause.message), { cause }) : cause;
  }
  const beside = chatJson["chat_template"];
  return {
    json: parsed,
    model,
    config: config["chat_template"] == null && Array.isArray(beside) ? { ...config, chat_template: beside } : config,
    specialTokensMap,
    addedTokens,
    chatTemplate: jinja?.toString("utf8") ?? (typeof beside === "string" ? beside : null),
  };
}

/** Parses JSON. Throws `TokenizerError` with file, line and column of the first invalid character. */
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
 * Node's messages don't always give the position, so this searches for the shortest prefix that no continuation can make valid.
 * A prefix can be continued if parsing it fails only at its end.
 */
function firstBadPosition(text: string): number {
  let good = 0; // a prefix of this length can be completed
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
    throw new TokenizerError(`${join(folder, name)}: cannot read the file: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    });
  }
}
