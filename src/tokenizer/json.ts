// Reads `tokenizer.json` into a definition. BPE, Metaspace and charsmaps are implemented exactly here; the other normalizers,
// pre-tokenizers, models and post-processors come from @huggingface/tokenizers.
import { Tokenizer as Library } from "@huggingface/tokenizers";
import type { AddedToken } from "./added.ts";
import { Bpe } from "./bpe.ts";
import { CharsMap } from "./charsmap.ts";
import type { DecoderConfig } from "./decoder.ts";
import { type Cut, type Definition, identity } from "./definition.ts";
import { TokenizerError } from "./error.ts";
import { Pairs } from "./pairs.ts";
import { MOST_IDS } from "./schema.ts";

export interface TokenizerJson {
  readonly added_tokens?: readonly AddedJson[] | null;
  readonly normalizer?: Part | null;
  readonly pre_tokenizer?: Part | null;
  readonly post_processor?: Part | null;
  readonly decoder?: DecoderConfig | null;
  readonly model: ModelJson;
}

/** An added token in tokenizer.json or in `added_tokens_decoder` of tokenizer_config.json. */
export interface AddedJson {
  readonly id: number;
  readonly content: string;
  readonly special?: boolean;
  readonly normalized?: boolean;
  readonly single_word?: boolean;
  readonly lstrip?: boolean;
  readonly rstrip?: boolean;
}

interface Part {
  readonly type: string;
  readonly [key: string]: unknown;
}

interface ModelJson {
  readonly type?: string;
  readonly vocab: Readonly<Record<string, number>> | readonly (readonly [string, number])[];
  readonly merges?: readonly (string | readonly [string, string])[];
  readonly unk_token?: string | null;
  readonly fuse_unk?: boolean;
  readonly byte_fallback?: boolean;
  readonly ignore_merges?: boolean;
  readonly continuing_subword_prefix?: string | null;
  readonly end_of_word_suffix?: string | null;
  readonly [key: string]: unknown;
}

/** Reads a parsed `tokenizer.json`. Throws `TokenizerError` for parts that are missing, malformed or not supported. */
export function readJson(json: unknown): Definition {
  if (!isTokenizer(json)) throw new TokenizerError('tokenizer.json: it has no "model" with a "vocab"');
  const { model } = json;
  const own = isBpe(model);
  const library = build({ ...json, normalizer: null, decoder: null, model: own ? emptyModel : model });
  const vocab = readVocab(model.vocab);
  const split = preTokenizer(json.pre_tokenizer ?? null, library);
  const cut: Cut = own ? bpe(model, vocab) : libraryModel(library);
  return {
    vocab,
    added: (json.added_tokens ?? []).map(addedToken),
    normalize: normalizer(json.normalizer ?? null),
    cut(text, first, out) {
      for (const piece of split(text, first)) if (piece !== "") cut(piece, out);
    },
    ...around(library),
    decoder: json.decoder ?? null,
    roles: typeof model.unk_token === "string" ? { unk_token: model.unk_token } : {},
  };
}

/** Without a pair of its own for each entry: vocabularies have 100,000 of them, and every process starts with this. */
function readVocab(stored: ModelJson["vocab"]): Map<string, number> {
  const vocab = new Map<string, number>();
  const add = (token: string, id: number): void => {
    if (!isId(id)) throw new TokenizerError(`tokenizer.json: token ${JSON.stringify(token)} has the id ${id}`);
    vocab.set(token, id);
  };
  if (isList(stored)) for (let id = 0; id < stored.length; id++) add(stored[id][0], id);
  else for (const token of Object.keys(stored)) add(token, stored[token]);
  return vocab;
}

function isList(vocab: ModelJson["vocab"]): vocab is readonly (readonly [string, number])[] {
  return Array.isArray(vocab);
}

export function addedToken(token: AddedJson): AddedToken {
  const { id, content, special = false } = token;
  if (!isId(id) || typeof content !== "string")
    throw new TokenizerError(`added token ${JSON.stringify(token)} needs an integer id and a text`);
  return {
    id,
    content,
    special,
    normalized: token.normalized ?? !special,
    singleWord: token.single_word ?? false,
    lstrip: token.lstrip ?? false,
    rstrip: token.rstrip ?? false,
  };
}

function isId(id: number): boolean {
  return Number.isInteger(id) && id >= 0 && id < MOST_IDS;
}

const emptyModel = { type: "BPE", vocab: {}, merges: [] };
const empty = { added_tokens: [], normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null, model: emptyModel };

function isTokenizer(json: unknown): json is TokenizerJson {
  const model = typeof json === "object" && json !== null && "model" in json ? json.model : null;
  return typeof model === "object" && model !== null && "vocab" in model && typeof model.vocab === "object" && model.vocab !== null;
}

/** Whether `bpe` below supports the model; models with word affixes use the library. */
function isBpe(model: ModelJson): boolean {
  const named = model.type === "BPE" || (model.type === undefined && Array.isArray(model.merges));
  return named && !Array.isArray(model.vocab) && !model.continuing_subword_prefix && !model.end_of_word_suffix;
}

function build(parts: object): Library {
  return guarded(() => new Library({ ...empty, ...parts }, {}));
}

/** Runs a part of the library, which reports what it cannot do with a file by whatever error its code runs into. */
function guarded<T>(run: () => T): T {
  try {
    return run();
  } catch (cause) {
    if (cause instanceof TokenizerError) throw cause;
    throw new TokenizerError(`tokenizer.json: cannot be used: ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
}

/** Builds merges ranked 0, 1, …, each given as `left right` or a pair. Throws `TokenizerError` if one names a token outside the vocabulary. */
export function rankedPairs(merges: readonly (string | readonly [string, string])[], vocab: ReadonlyMap<string, number>): Pairs {
  const pairs = new Pairs(merges.length);
  merges.forEach((merge, rank) => {
    const [left = "", right = ""] = typeof merge === "string" ? merge.split(" ") : merge;
    const a = vocab.get(left);
    const b = vocab.get(right);
    const result = vocab.get(left + right);
    if (a === undefined || b === undefined || result === undefined)
      throw new TokenizerError(`tokenizer.json: merge ${rank} (${JSON.stringify(merge)}) names a token that is not in the vocabulary`);
    pairs.set(a, b, rank, result);
  });
  return pairs;
}

function bpe(model: ModelJson, vocab: ReadonlyMap<string, number>): Cut {
  const unknown = model.unk_token ?? null;
  const encoder = new Bpe({
    vocab,
    pairs: rankedPairs(model.merges ?? [], vocab),
    bytes: model.byte_fallback === true ? byteTokens(vocab) : null,
    unknown: unknown === null ? null : (vocab.get(unknown) ?? null),
    fuseUnknown: model.fuse_unk ?? false,
    ignoreMerges: model.ignore_merges ?? false,
    unused: new Set(),
  });
  return (text, out) => encoder.encode(text, out);
}

/** The ids of `<0x00>` to `<0xFF>`, -1 if absent. */
export function byteTokens(vocab: ReadonlyMap<string, number>): Int32Array {
  return Int32Array.from({ length: 256 }, (_, byte) => vocab.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`) ?? -1);
}

function libraryModel(library: Library): Cut {
  const { model } = library;
  if (model === null) throw new Error("internal: the library built no model");
  return (text, out) => {
    for (const token of guarded(() => model([text]))) {
      const id = model.tokens_to_ids.get(token) ?? model.unk_token_id;
      if (id === undefined) throw new TokenizerError(`no token for ${JSON.stringify(token)}, and the vocabulary has no unknown token`);
      out.push(id);
    }
  };
}

function normalizer(part: Part | null): (text: string) => string {
  if (part === null) return identity;
  if (part.type === "Sequence" && Array.isArray(part["normalizers"])) {
    const steps = part["normalizers"].map(normalizer);
    return (text) => steps.reduce((result, step) => step(result), text);
  }
  if (part.type === "Precompiled" && typeof part["precompiled_charsmap"] === "string") {
    const map = new CharsMap(Buffer.from(part["precompiled_charsmap"], "base64"));
    return (text) => map.normalize(text);
  }
  const { normalizer: step } = build({ normalizer: part });
  return step === null ? identity : (text) => (text === "" ? "" : guarded(() => step(text)));
}

function preTokenizer(part: Part | null, library: Library): (text: string, first: boolean) => string[] {
  const step = library.pre_tokenizer;
  if (part === null || step === null) return (text) => [text];
  if (part.type !== "Metaspace") return (text, first) => guarded(() => step(text, { section_index: first ? 0 : 1 }));
  const mark = typeof part["replacement"] === "string" ? part["replacement"] : "▁";
  const scheme = part["prepend_scheme"] ?? (part["add_prefix_space"] === false ? "never" : "always");
  return (text, first) => {
    const marked = text.replaceAll(" ", mark);
    const prefix = (scheme === "always" || (scheme === "first" && first)) && !marked.startsWith(mark) ? mark : "";
    if (part["split"] === false) return [prefix + marked];
    return (prefix + marked).split(mark).map((word, i) => (i === 0 ? word : mark + word)); // each ▁ begins a word
  };
}

/** The tokens that the post-processor puts around a sequence, found by processing a probe. */
function around(library: Library): { prefix: string[]; suffix: string[] } {
  const probe = "\ufdd0";
  const tokens = guarded(() => library.post_processor?.([probe], null, true).tokens) ?? [probe];
  const at = tokens.indexOf(probe);
  return { prefix: tokens.slice(0, at), suffix: tokens.slice(at + 1) };
}
