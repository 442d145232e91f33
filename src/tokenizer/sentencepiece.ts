// Reads `tokenizer.model` (SentencePiece BPE) into a definition that produces the same ids as the sentencepiece library.
// As in the library, merges are ordered by the score of the resulting piece: a list of ranked pairs would break ties differently.
// Knows nothing of tokenizer_config.json.
import protobuf from "protobufjs/light.js";
import { Bpe } from "./bpe.ts";
import { type Definition, identity } from "./definition.ts";
import { TokenizerError } from "./error.ts";
import { byteTokens } from "./json.ts";
import { Matcher } from "./matcher.ts";
import { mark, Normalizer, type NormalizerSpec } from "./normalizer.ts";
import { merges, type Piece, pieceType, specials } from "./pieces.ts";

/** Field numbers of sentencepiece_model.proto; other fields are skipped. (Must be proto2: otherwise an explicit `false` would read as the default.) */
const schema = {
  nested: {
    SentencePiece: {
      edition: "proto2",
      fields: {
        piece: { id: 1, type: "string" },
        score: { id: 2, type: "float" },
        type: { id: 3, type: "int32", options: { default: 1 } },
      },
    },
    TrainerSpec: {
      edition: "proto2",
      fields: {
        modelType: { id: 3, type: "int32", options: { default: 1 } },
        treatWhitespaceAsSuffix: { id: 24, type: "bool" },
        byteFallback: { id: 35, type: "bool" },
        bosId: { id: 41, type: "int32", options: { default: 1 } },
        eosId: { id: 42, type: "int32", options: { default: 2 } },
        padId: { id: 43, type: "int32", options: { default: -1 } },
      },
    },
    NormalizerSpec: {
      edition: "proto2",
      fields: {
        precompiledCharsmap: { id: 2, type: "bytes" },
        addDummyPrefix: { id: 3, type: "bool", options: { default: true } },
        removeExtraWhitespaces: { id: 4, type: "bool", options: { default: true } },
        escapeWhitespaces: { id: 5, type: "bool", options: { default: true } },
      },
    },
    ModelProto: {
      edition: "proto2",
      fields: {
        pieces: { id: 1, rule: "repeated", type: "SentencePiece" },
        trainerSpec: { id: 2, type: "TrainerSpec" },
        normalizerSpec: { id: 3, type: "NormalizerSpec" },
      },
    },
  },
};

export interface ModelProto {
  readonly pieces: readonly Piece[];
  readonly trainerSpec: {
    readonly modelType: number;
    readonly treatWhitespaceAsSuffix: boolean;
    readonly byteFallback: boolean;
    readonly bosId: number;
    readonly eosId: number;
    readonly padId: number;
  };
  readonly normalizerSpec: NormalizerSpec;
}

const modelTypes = ["", "unigram", "BPE", "word", "char"];
const bpeType = 2;

/**
 * Reads the bytes of a `tokenizer.model`. Control and unknown pieces become special added tokens, and so do the user-defined pieces
 * in `special`. Each section between added tokens is encoded as the sentencepiece library encodes a complete text.
 * Throws `TokenizerError` if the bytes are not a SentencePiece model or its type is not BPE.
 */
export function readSentencePiece(bytes: Uint8Array, special: ReadonlySet<string> = new Set()): Definition {
  const { pieces, trainerSpec, normalizerSpec } = parseModel(bytes);
  if (trainerSpec.modelType !== bpeType)
    throw new TokenizerError(
      `tokenizer.model: a SentencePiece model of type ${modelTypes[trainerSpec.modelType] ?? trainerSpec.modelType}; only BPE is supported`,
    );
  if (trainerSpec.treatWhitespaceAsSuffix) throw new TokenizerError("tokenizer.model: treat_whitespace_as_suffix is not supported");
  const vocab = new Map(pieces.map(({ piece }, id) => [piece, id]));
  const unknown = pieces.findIndex(({ type }) => type === pieceType.unknown);
  if (unknown < 0 || vocab.size !== pieces.length)
    throw new TokenizerError(`tokenizer.model: malformed: ${unknown < 0 ? "it has no unknown piece" : "a piece occurs twice"}`);
  const frozen = new Matcher(
    pieces.filter(({ piece, type }) => type === pieceType.userDefined && !special.has(piece)).map(({ piece }) => piece),
  );
  const normalizer = new Normalizer(normalizerSpec, frozen);
  const bpe = new Bpe({
    ...merges(pieces),
    bytes: trainerSpec.byteFallback ? byteTokens(vocab) : null,
    unknown,
    fuseUnknown: true,
    ignoreMerges: false,
    unused: new Set(pieces.flatMap(({ type }, id) => (type === pieceType.unused ? [id] : []))),
  });
  const stripped = normalizerSpec.addDummyPrefix || normalizerSpec.removeExtraWhitespaces;
  const roles = { bos_token: trainerSpec.bosId, eos_token: trainerSpec.eosId, pad_token: trainerSpec.padId, unk_token: unknown };
  return {
    vocab,
    added: specials(pieces, special),
    normalize: identity, // the rules depend on user-defined pieces, so they run in `cut`
    cut: (text, _first, out) => cut(normalizer.normalize(text), frozen, vocab, bpe, out),
    prefix: [],
    suffix: [],
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: mark }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: stripped ? 1 : 0, stop: 0 },
      ],
    },
    roles: Object.fromEntries(Object.entries(roles).flatMap(([role, id]) => (pieces[id] === undefined ? [] : [[role, pieces[id].piece]]))),
  };
}

/** Parses the protobuf message of a `tokenizer.model`. Throws `TokenizerError` if the bytes are not one. */
export function parseModel(bytes: Uint8Array): ModelProto {
  const proto = protobuf.Root.fromJSON(schema).lookupType("ModelProto");
  let model: ModelProto;
  try {
    // an empty message supplies the defaults of an absent spec
    const read = proto.decode(bytes) as unknown as { trainerSpec: unknown; normalizerSpec: unknown };
    read.trainerSpec ??= proto.root.lookupType("TrainerSpec").create();
    read.normalizerSpec ??= proto.root.lookupType("NormalizerSpec").create();
    model = read as unknown as ModelProto;
  } catch (cause) {
    throw new TokenizerError(`tokenizer.model: not a SentencePiece model: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    });
  }
  if (model.pieces.length === 0)
    throw new TokenizerError(`tokenizer.model: not a SentencePiece model: its ${bytes.length} bytes contain no pieces`);
  return model;
}

/** Splits normalised text at user-defined pieces, which never merge with their neighbours, and encodes the text between them. */
function cut(text: string, frozen: Matcher, vocab: ReadonlyMap<string, number>, bpe: Bpe, out: number[]): void {
  let done = 0;
  for (let at = 0; !frozen.empty && at < text.length; ) {
    const end = frozen.longest(text, at);
    if (end < 0) {
      at++;
      continue;
    }
    if (done < at) bpe.encode(text.slice(done, at), out);
    const id = vocab.get(text.slice(at, end));
    if (id === undefined) throw new Error("internal: the matched text is not a piece");
    out.push(id);
    done = at = end;
  }
  if (done < text.length) bpe.encode(text.slice(done), out);
}
