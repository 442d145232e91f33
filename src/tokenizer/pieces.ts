// A vocabulary of pieces with scores and types, as in SentencePiece models and GGUF files, and its conversion into a definition
// (`portable.ts` converts the other way). Reads no files.
import type { AddedToken } from "./added.ts";
import { Bpe } from "./bpe.ts";
import type { Definition } from "./definition.ts";
import { TokenizerError } from "./error.ts";
import { addedToken, byteTokens, rankedPairs } from "./json.ts";
import { mark } from "./normalizer.ts";
import { Pairs } from "./pairs.ts";
import type { Role } from "./vocabulary.ts";

export interface Piece {
  readonly piece: string;
  /** Merges that produce a piece with a higher score are applied first. */
  readonly score: number;
  readonly type: number;
}

export const pieceType = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/** A complete tokenizer made of such pieces. */
export interface PieceModel {
  readonly pieces: readonly Piece[];
  /** Merges in order of rank, as `left right`; null: every pair of symbols that forms a piece merges, ranked by the piece's score. */
  readonly merges: readonly string[] | null;
  /** An implicit space precedes every text, and every text that follows a special token. */
  readonly spacePrefix: boolean;
  readonly addBos: boolean;
  readonly addEos: boolean;
  /** Ids of special tokens by role. */
  readonly roles: Readonly<Partial<Record<Role, number>>>;
  /** Chat templates by name; a single template is called `default`. */
  readonly chatTemplates: Readonly<Record<string, string>>;
  /** Maximum input length in tokens. */
  readonly maxLength: number;
}

/** Converts pieces into a definition. Throws `TokenizerError` if a piece occurs twice or a merge names an unknown token. */
export function readPieces({ pieces, merges: ranked, spacePrefix, roles }: PieceModel): Definition {
  const vocab = new Map(pieces.map(({ piece }, id) => [piece, id]));
  if (vocab.size !== pieces.length) {
    const twice = pieces.find(({ piece }, id) => vocab.get(piece) !== id);
    throw new TokenizerError(`the piece ${JSON.stringify(twice?.piece)} occurs twice`);
  }
  const unknown = roles.unk_token ?? pieces.findIndex(({ type }) => type === pieceType.unknown);
  const bpe = new Bpe({
    ...(ranked === null ? merges(pieces) : { vocab, pairs: rankedPairs(ranked, vocab) }),
    bytes: byteTokens(vocab),
    unknown: unknown < 0 ? null : unknown,
    fuseUnknown: true,
    ignoreMerges: false,
    unused: new Set(pieces.flatMap(({ type }, id) => (type === pieceType.unused ? [id] : []))),
  });
  return {
    vocab,
    added: [...specials(pieces, new Set()), ...userDefined(pieces)],
    normalize: (text) => (text === "" ? "" : ((spacePrefix ? " " : "") + text).replaceAll(" ", mark)),
    cut: (text, _first, out) => bpe.encode(text, out),
    prefix: [],
    suffix: [],
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: mark }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: spacePrefix ? 1 : 0, stop: 0 },
      ],
    },
    roles: Object.fromEntries(Object.entries(roles).flatMap(([role, id]) => (pieces[id] === undefined ? [] : [[role, pieces[id].piece]]))),
  };
}

function userDefined(pieces: readonly Piece[]): AddedToken[] {
  return pieces.flatMap(({ piece, type }, id) =>
    type === pieceType.userDefined ? [addedToken({ id, content: piece, normalized: false })] : [],
  );
}

/** Pieces that become special added tokens: control and unknown pieces, and the user-defined ones in `named`. */
export function specials(pieces: readonly Piece[], named: ReadonlySet<string>): AddedToken[] {
  return pieces.flatMap(({ piece, type }, id) => {
    const special = type === pieceType.control || type === pieceType.unknown || (type === pieceType.userDefined && named.has(piece));
    return special ? [addedToken({ id, content: piece, special })] : [];
  });
}

/** Every merge of two symbols into a piece, ranked by the piece's score. A symbol is a piece, or a character that is not a piece. */
export function merges(pieces: readonly Piece[]): { vocab: Map<string, number>; pairs: Pairs } {
  const vocab = new Map<string, number>();
  for (const [id, { piece, type }] of pieces.entries())
    if (type === pieceType.normal || type === pieceType.unused || type === pieceType.userDefined) vocab.set(piece, id);
  const scores = [...new Set(pieces.map(({ score }) => score))].sort((a, b) => b - a);
  const ranks = new Map(scores.map((score, rank) => [score, rank]));
  const found: number[] = []; // left, right, rank, result
  for (const [id, { piece, score, type }] of pieces.entries()) {
    if (type !== pieceType.normal && type !== pieceType.unused) continue; // user-defined pieces are split off before merging
    for (let i = 1; i < piece.length; i++) {
      const left = symbol(piece.slice(0, i), vocab);
      const right = left === undefined ? undefined : symbol(piece.slice(i), vocab);
      if (left !== undefined && right !== undefined) found.push(left, right, ranks.get(score) ?? 0, id);
    }
  }
  const pairs = new Pairs(found.length / 4);
  for (let i = 0; i < found.length; i += 4) pairs.set(found[i] ?? 0, found[i + 1] ?? 0, found[i + 2] ?? 0, found[i + 3] ?? 0);
  return { vocab, pairs };
}

function symbol(text: string, vocab: ReadonlyMap<string, number>): number | undefined {
  const id = vocab.get(text);
  if (id !== undefined) return id;
  const code = text.codePointAt(0) ?? 0;
  const surrogate = code >= 0xd800 && code <= 0xdfff;
  return text.length === (code > 0xffff ? 2 : 1) && !surrogate ? -1 - code : undefined;
}
