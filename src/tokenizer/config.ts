// Settings and special tokens from tokenizer_config.json and its companions, which override the tokenizer's own. Knows nothing of encoding.
import type { AddedToken } from "./added.ts";
import type { Definition } from "./definition.ts";
import { TokenizerError } from "./error.ts";
import type { TokenizerFiles } from "./folder.ts";
import { type AddedJson, addedToken } from "./json.ts";
import { type Role, roleNames } from "./vocabulary.ts";

export type Side = "left" | "right";

/** The settings of a tokenizer, apart from its vocabulary. */
export interface TokenizerConfig {
  /** Chat templates by name; a single template is called `default`. */
  readonly chatTemplates: Readonly<Record<string, string>>;
  /** In tokens; Infinity if not configured. */
  readonly modelMaxLength: number;
  readonly paddingSide: Side;
  readonly truncationSide: Side;
  readonly cleanUp: boolean;
  readonly splitSpecial: boolean;
  readonly addBos: boolean;
  readonly addEos: boolean;
}

export function readConfig({ config, chatTemplate }: TokenizerFiles): TokenizerConfig {
  const maximum = config["model_max_length"];
  return {
    chatTemplates:
      chatTemplate === null ? templates(config["chat_template"]) : { ...templates(config["chat_template"]), default: chatTemplate },
    modelMaxLength: typeof maximum === "number" && maximum > 0 ? maximum : Number.POSITIVE_INFINITY,
    paddingSide: side(config, "padding_side", "left"),
    truncationSide: side(config, "truncation_side", "right"),
    cleanUp: config["clean_up_tokenization_spaces"] === true,
    splitSpecial: config["split_special_tokens"] === true,
    addBos: config["add_bos_token"] === true,
    addEos: config["add_eos_token"] === true,
  };
}

/** All tokens that the configuration declares special. */
export function namedSpecials({ config, specialTokensMap }: TokenizerFiles): Set<string> {
  const named = [specialTokensMap, config].flatMap((source) => [
    ...roleNames.map((role) => content(source[role])),
    ...listed(source["additional_special_tokens"]),
    ...listed(source["extra_special_tokens"]),
    ...decoderEntries(source["added_tokens_decoder"]).flatMap((token) => (token.special === true ? [token.content] : [])),
  ]);
  return new Set(named.filter((token): token is string => token !== null && token !== ""));
}

/** Special tokens by role, from tokenizer_config.json, else special_tokens_map.json, else the tokenizer. An explicit `null` means none. */
export function roles({ config, specialTokensMap }: TokenizerFiles, definition: Definition): Partial<Record<Role, string>> {
  const found: Partial<Record<Role, string>> = {};
  for (const role of roleNames) {
    const source = [config, specialTokensMap, definition.roles].find((each) => role in each);
    const token = source === undefined ? null : content(source[role]);
    if (token !== null && token !== "") found[role] = token;
  }
  return found;
}

/** The definition's added tokens, with those that the configuration adds or declares special. */
export function configuredTokens(files: TokenizerFiles, definition: Definition): AddedToken[] {
  const special = namedSpecials(files);
  const tokens = new Map(definition.added.map((token) => [token.content, token]));
  if (files.json === null)
    for (const [text, id] of Object.entries(files.addedTokens))
      tokens.set(text, addedToken({ id: id as number, content: text, special: special.has(text) }));
  for (const token of decoderEntries(files.config["added_tokens_decoder"])) tokens.set(token.content, addedToken(token));
  for (const text of special) {
    const known = tokens.get(text);
    const id = definition.vocab.get(text);
    if (known !== undefined) tokens.set(text, { ...known, special: true });
    else if (id !== undefined) tokens.set(text, addedToken({ id, content: text, special: true }));
    // a token without an id gets none: a new id would be outside the model's embedding
  }
  return [...tokens.values()];
}

function decoderEntries(value: unknown): AddedJson[] {
  if (typeof value !== "object" || value === null) return [];
  return Object.entries(value).map(([id, token]: [string, Omit<AddedJson, "id">]) => ({ ...token, id: Number(id) }));
}

function listed(value: unknown): (string | null)[] {
  if (Array.isArray(value)) return value.map(content);
  return typeof value === "object" && value !== null ? Object.values(value).map(content) : [];
}

/** Reads a token, which is written as its text or as an object with `content`. */
function content(value: unknown): string | null {
  if (typeof value === "string") return value;
  if (typeof value === "object" && value !== null && "content" in value && typeof value.content === "string") return value.content;
  return null;
}

function templates(value: unknown): Record<string, string> {
  if (typeof value === "string") return { default: value };
  if (!Array.isArray(value)) return {};
  return Object.fromEntries(value.map(({ name, template }: { name: string; template: string }) => [name, template]));
}

function side(config: Readonly<Record<string, unknown>>, key: string, fallback: Side): Side {
  const value = config[key] ?? fallback;
  if (value !== "left" && value !== "right")
    throw new TokenizerError(`tokenizer_config.json: ${key} is ${JSON.stringify(value)}, not "left" or "right"`);
  return value;
}
