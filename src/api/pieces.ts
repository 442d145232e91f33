/** Converts the tokenizer in a GGUF file from key-values to pieces, and back. Knows no weights. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { CheckpointError } from "../checkpoint/error.ts";
import { type GgufHead, readGguf } from "../checkpoint/gguf/header.ts";
import { ggufFile } from "../checkpoint/gguf/locate.ts";
import { type GgufEntry, generationOf } from "../checkpoint/gguf/metadata.ts";
import { type PieceModel, pieceType } from "../tokenizer/pieces.ts";
import { readPieceModel } from "../tokenizer/tokenizer.ts";
import type { Role } from "../tokenizer/vocabulary.ts";

const KEY = "tokenizer.ggml.";
const TEMPLATE = "tokenizer.chat_template";
/** GGUF's names for special tokens; the misspelled separator is GGUF's own. */
const ROLES: Readonly<Record<Role, string>> = {
  bos_token: "bos_token_id",
  eos_token: "eos_token_id",
  unk_token: "unknown_token_id",
  sep_token: "seperator_token_id",
  pad_token: "padding_token_id",
  cls_token: "cls_token_id",
  mask_token: "mask_token_id",
};

/** The tokenizer of a GGUF file or a folder, as pieces. Rejects with CheckpointError or TokenizerError when there is none. */
export async function openPieces(path: string): Promise<PieceModel> {
  const file = await ggufFile(path);
  return file === undefined ? readPieceModel(path) : piecesOf(file, await readGguf(file));
}

/** Writes a model folder's files besides config.json and weights: the tokenizer and generation_config.json. */
export async function unpackConfigs(file: string, folder: string): Promise<void> {
  const head = await readGguf(file);
  const { toFiles } = await import("../tokenizer/portable.ts");
  const { json, config } = toFiles(piecesOf(file, head));
  const files = { "tokenizer.json": json, "tokenizer_config.json": config, "generation_config.json": generationOf(head) };
  for (const [name, value] of Object.entries(files)) await writeFile(join(folder, name), `${JSON.stringify(value, null, 1)}\n`);
}

/** Placeholder pieces for a model without a tokenizer: the 256 bytes. Readers need some, and speed does not depend on them. */
export function placeholderPieces(vocabSize: number): PieceModel {
  const named = [pieceType.unknown, pieceType.control, pieceType.control].map((type, id) => ({
    piece: ["<unk>", "<s>", "</s>"][id],
    score: 0,
    type,
  }));
  const bytes = Array.from({ length: 256 }, (_, byte) => {
    return { piece: `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`, score: 0, type: pieceType.byte };
  });
  return {
    pieces: [...named, ...bytes].slice(0, vocabSize),
    merges: null,
    spacePrefix: false,
    addBos: false,
    addEos: false,
    roles: { unk_token: 0, bos_token: 1, eos_token: 2 },
    chatTemplates: {},
    maxLength: Number.POSITIVE_INFINITY,
  };
}

/** Missing keys get llama.cpp's defaults for this kind of tokenizer: a leading space, and `bos` as the first token. */
export function piecesOf(file: string, { values }: GgufHead): PieceModel {
  const kind = values.get(`${KEY}model`);
  if (kind !== "llama") {
    const seen = kind === undefined ? "there is no tokenizer in it" : `its tokenizer is of the kind ${JSON.stringify(kind)}`;
    throw new CheckpointError(file, `${seen}; "llama" (pieces with scores) is read`);
  }
  const list = (name: string) => {
    const value = values.get(KEY + name);
    return typeof value === "object" ? value : undefined;
  };
  const tokens = list("tokens") as readonly string[] | undefined;
  if (!tokens?.length || tokens.some((token) => typeof token !== "string"))
    throw new CheckpointError(file, `${KEY}tokens is not a list of strings`);
  const numbers = (name: string, fallback: number): ArrayLike<number> => {
    const found = list(name) ?? new Array<number>(tokens.length).fill(fallback);
    if (found.length !== tokens.length || typeof found[0] !== "number")
      throw new CheckpointError(file, `${KEY}${name} is not a list of ${tokens.length} numbers, one per token`);
    return found as ArrayLike<number>;
  };
  const scores = numbers("scores", 0);
  const types = numbers("token_type", pieceType.normal);
  const merges = list("merges");
  const roles: Partial<Record<Role, number>> = {};
  for (const [role, key] of Object.entries(ROLES)) {
    const id = values.get(KEY + key);
    if (typeof id === "number" && tokens[id] !== undefined) roles[role as Role] = id;
  }
  const templates = [...values].filter(([key, value]) => key.startsWith(TEMPLATE) && typeof value === "string");
  const length = [...values].find(([key]) => key.endsWith(".context_length"))?.[1];
  return {
    pieces: tokens.map((piece, id) => ({ piece, score: scores[id], type: types[id] })),
    merges: merges?.length && typeof merges[0] === "string" ? (merges as readonly string[]) : null,
    spacePrefix: values.get(`${KEY}add_space_prefix`) !== false,
    addBos: values.get(`${KEY}add_bos_token`) !== false && roles.bos_token !== undefined,
    addEos: values.get(`${KEY}add_eos_token`) === true && roles.eos_token !== undefined,
    roles,
    chatTemplates: Object.fromEntries(templates.map(([key, value]) => [key.slice(TEMPLATE.length + 1) || "default", String(value)])),
    maxLength: typeof length === "number" ? length : Number.POSITIVE_INFINITY,
  };
}

/**
 * The key-values of a tokenizer. llama.cpp merges any two pieces that form a third, by score, and ignores the list of merges; it
 * is written anyway, so that mixtape encodes exactly as before. Throws RangeError when there are more pieces than rows.
 * @param vocabSize rows of the embedding: ids beyond the pieces get placeholders
 */
export function pieceEntries(model: PieceModel, vocabSize: number): GgufEntry[] {
  if (model.pieces.length > vocabSize)
    throw new RangeError(`the tokenizer has ${model.pieces.length} tokens, the model's embedding ${vocabSize}`);
  const pieces = [...model.pieces];
  for (let id = pieces.length; id < vocabSize; id++) pieces.push({ piece: `[PAD${id}]`, score: -1000, type: pieceType.unused });
  const entries: GgufEntry[] = [
    [`${KEY}model`, "string", "llama"],
    [`${KEY}pre`, "string", "default"],
    [`${KEY}tokens`, "strings", pieces.map(({ piece }) => piece)],
    [`${KEY}scores`, "f32s", pieces.map(({ score }) => score)],
    [`${KEY}token_type`, "i32s", pieces.map(({ type }) => type)],
    [`${KEY}add_space_prefix`, "bool", model.spacePrefix],
    [`${KEY}add_bos_token`, "bool", model.addBos],
    [`${KEY}add_eos_token`, "bool", model.addEos],
  ];
  if (model.merges) entries.push([`${KEY}merges`, "strings", model.merges]);
  for (const [role, id] of Object.entries(model.roles)) entries.push([KEY + ROLES[role as Role], "u32", id]);
  for (const [name, template] of Object.entries(model.chatTemplates))
    entries.push([name === "default" ? TEMPLATE : `${TEMPLATE}.${name}`, "string", template]);
  return entries;
}
