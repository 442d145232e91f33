// Converts tokenizer files to pieces with scores, for formats that store only those (GGUF), and back. Rejects what pieces cannot express.
import { configuredTokens, namedSpecials, readConfig, roles } from "./config.ts";
import { TokenizerError } from "./error.ts";
import type { TokenizerFiles } from "./folder.ts";
import { readJson, type TokenizerJson } from "./json.ts";
import { type Piece, type PieceModel, pieceType } from "./pieces.ts";
import { parseModel, readSentencePiece } from "./sentencepiece.ts";

type Part = TokenizerJson["normalizer"];

/** Converts tokenizer files to pieces. Throws `TokenizerError` unless the tokenizer is BPE over pieces with ▁ for spaces. */
export function toPieces(files: TokenizerFiles): PieceModel {
  const config = readConfig(files);
  const definition = files.model === null ? readJson(files.json) : readSentencePiece(files.model, namedSpecials(files));
  const source = files.model === null ? fromJson(files.json as TokenizerJson) : fromModel(files.model);
  const pieces = [...source.pieces];
  for (const { id, content, special } of configuredTokens(files, definition)) {
    const type = pieces[id]?.type === pieceType.unknown ? pieceType.unknown : special ? pieceType.control : pieceType.userDefined;
    pieces[id] = { piece: content, score: 0, type };
  }
  for (let id = 0; id < pieces.length; id++) pieces[id] ??= { piece: `<unused:${id}>`, score: 0, type: pieceType.unused };
  const ids = new Map(pieces.map(({ piece }, id) => [piece, id]));
  const named = Object.entries(roles(files, definition)).map(([role, token]) => [role, ids.get(token)]);
  return {
    ...source,
    pieces,
    addBos: config.addBos || definition.prefix.length > 0,
    addEos: config.addEos || definition.suffix.length > 0,
    roles: Object.fromEntries(named.filter(([, id]) => id !== undefined)),
    chatTemplates: config.chatTemplates,
    maxLength: config.modelMaxLength,
  };
}

type Source = Pick<PieceModel, "pieces" | "merges" | "spacePrefix">;

/** The score of a piece is minus the rank of its first merge, so that merging by score follows the order of the merges. */
function fromJson(json: TokenizerJson): Source {
  const { model } = json;
  const refuse = (what: string) =>
    new TokenizerError(`tokenizer.json: ${what}; only BPE with byte fallback and ▁ for spaces can be converted to pieces`);
  if ((model.type ?? "BPE") !== "BPE" || Array.isArray(model.vocab) || model.byte_fallback !== true)
    throw refuse(`its model is ${model.type ?? "BPE"}${model.byte_fallback === true ? "" : " without byte fallback"}`);
  const spaces = [...steps(json.normalizer), ...steps(json.pre_tokenizer)].map((part) => spaceStep(part, refuse));
  const merges = (model.merges ?? []).map((merge) => (typeof merge === "string" ? merge : merge.join(" ")));
  const ranks = new Map<string, number>();
  merges.forEach((merge, rank) => {
    const piece = merge.replace(" ", "");
    if (!ranks.has(piece)) ranks.set(piece, rank);
  });
  const pieces: Piece[] = [];
  for (const [piece, id] of Object.entries(model.vocab as Record<string, number>)) {
    const type = piece === model.unk_token ? pieceType.unknown : /^<0x[0-9A-F]{2}>$/.test(piece) ? pieceType.byte : pieceType.normal;
    pieces[id] = { piece, score: type === pieceType.normal ? -(ranks.get(piece) ?? merges.length) : 0, type };
  }
  return { pieces, merges, spacePrefix: spaces.includes(true) };
}

function steps(part: Part): NonNullable<Part>[] {
  if (!part) return [];
  const inner = part["normalizers"] ?? part["pretokenizers"];
  return part.type === "Sequence" && Array.isArray(inner) ? inner.flatMap(steps) : [part];
}

/** Whether a step adds a leading space. Throws for a step that does anything but that or replacing spaces with ▁. */
function spaceStep(part: NonNullable<Part>, refuse: (what: string) => TokenizerError): boolean {
  const pattern = part["pattern"];
  const space = typeof pattern === "object" && pattern !== null && "String" in pattern && pattern.String === " ";
  if (part.type === "Replace" && space && part["content"] === "▁") return false;
  if (part.type === "Prepend" && part["prepend"] === "▁") return true;
  if (part.type === "Metaspace" && (part["replacement"] ?? "▁") === "▁" && part["split"] === false)
    return (part["prepend_scheme"] ?? (part["add_prefix_space"] === false ? "never" : "always")) !== "never";
  throw refuse(`it has a step of type ${part.type}`);
}

/** Drops the charsmap, which pieces cannot express, as llama.cpp's converter does. */
function fromModel(bytes: Uint8Array): Source {
  const { pieces, normalizerSpec } = parseModel(bytes);
  return {
    pieces: pieces.map(({ piece, score, type }) => ({ piece, score, type })),
    merges: null,
    spacePrefix: normalizerSpec.addDummyPrefix,
  };
}

/**
 * Converts pieces to tokenizer.json and tokenizer_config.json, as values for `JSON.stringify`. Without ranked merges, it lists every
 * pair that forms a piece, ordered by score, as transformers does when it converts such vocabularies.
 */
export function toFiles(model: PieceModel): { readonly json: object; readonly config: object } {
  const { pieces, spacePrefix, roles: named, chatTemplates, maxLength } = model;
  const added = pieces.flatMap(({ piece, type }, id) => {
    const special = type === pieceType.control || type === pieceType.unknown;
    if (!special && type !== pieceType.userDefined) return [];
    return [{ id, content: piece, single_word: false, lstrip: false, rstrip: false, normalized: false, special }];
  });
  const escaped = { type: "Replace", pattern: { String: " " }, content: "▁" };
  const decoders: object[] = [{ type: "Replace", pattern: { String: "▁" }, content: " " }, { type: "ByteFallback" }, { type: "Fuse" }];
  if (spacePrefix) decoders.push({ type: "Strip", content: " ", start: 1, stop: 0 });
  const unknown = pieces[named.unk_token ?? pieces.findIndex(({ type }) => type === pieceType.unknown)]?.piece ?? null;
  const json = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: added,
    normalizer: spacePrefix ? { type: "Sequence", normalizers: [{ type: "Prepend", prepend: "▁" }, escaped] } : escaped,
    pre_tokenizer: null,
    post_processor: null,
    decoder: { type: "Sequence", decoders },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: unknown,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(pieces.map(({ piece }, id) => [piece, id])),
      merges: (model.merges ?? allMerges(pieces)).map((merge) => merge.split(" ")),
    },
  };
  const templates = Object.entries(chatTemplates).map(([name, template]) => ({ name, template }));
  const config = {
    tokenizer_class: "PreTrainedTokenizerFast",
    ...Object.fromEntries(Object.entries(named).map(([role, id]) => [role, pieces[id].piece])),
    add_bos_token: model.addBos,
    add_eos_token: model.addEos,
    clean_up_tokenization_spaces: false,
    ...(Number.isFinite(maxLength) ? { model_max_length: maxLength } : {}),
    ...(templates.length === 0
      ? {}
      : { chat_template: templates.length === 1 && templates[0].name === "default" ? templates[0].template : templates }),
  };
  return { json, config };
}

function allMerges(pieces: readonly Piece[]): string[] {
  const ids = new Map(pieces.flatMap(({ piece, type }, id) => (type === pieceType.normal ? [[piece, id] as const] : [])));
  const found: { score: number; left: number; right: number }[] = [];
  for (const [piece, id] of ids) {
    for (let at = 1; at < piece.length; at++) {
      const [left, right] = [ids.get(piece.slice(0, at)), ids.get(piece.slice(at))];
      if (left !== undefined && right !== undefined) found.push({ score: pieces[id].score, left, right });
    }
  }
  found.sort((a, b) => b.score - a.score || a.left - b.left || a.right - b.right);
  return found.map(({ left, right }) => `${pieces[left].piece} ${pieces[right].piece}`);
}
