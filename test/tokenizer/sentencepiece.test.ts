import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { TokenizerError } from "../../src/tokenizer/error.ts";
import { readSentencePiece } from "../../src/tokenizer/sentencepiece.ts";
import { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { fixtureFolder, fixtures, folder } from "./folders.ts";

interface Golden {
  readonly text: string;
  readonly ids: number[];
  readonly decoded: string;
}
const goldens = JSON.parse(readFileSync(join(fixtures, "goldens.json"), "utf8")) as Record<string, Golden[]>;

test.each(Object.keys(goldens))("%s.model: ids and texts equal the sentencepiece library's", async (name) => {
  const tokenizer = await Tokenizer.open(fixtureFolder(`${name}.model`, "tokenizer.model"));
  for (const { text, ids, decoded } of goldens[name] ?? []) {
    expect({ text, ids: tokenizer.encode(text) }).toEqual({ text, ids });
    expect(tokenizer.decode(ids)).toBe(decoded);
  }
});

test("special tokens come from the model, and control symbols in a text are special", async () => {
  const tokenizer = await Tokenizer.open(fixtureFolder("identity.model", "tokenizer.model"));
  expect([tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token]).toEqual(["<s>", 2, 0, null]);
  const id = tokenizer.convert_tokens_to_ids("<|begin_of_sentence|>");
  expect(tokenizer.encode("a<|begin_of_sentence|>a")).toEqual([...tokenizer.encode("a"), id, ...tokenizer.encode("a")]);
  expect(tokenizer.decode([id ?? -1, ...tokenizer.encode("a")], { skip_special_tokens: true })).toBe("a");
  expect(tokenizer.encode("<|begin_of_sentence|>", { split_special_tokens: true })).not.toContain(id);
});

test("a user-defined symbol that the configuration calls special can be kept plain", async () => {
  const tokenizer = await Tokenizer.open(
    fixtureFolder("identity.model", "tokenizer.model", { "tokenizer_config.json": { sep_token: "</think>" } }),
  );
  expect(tokenizer.encode("</think>")).toEqual([tokenizer.sep_token_id]);
  const plain = tokenizer.encode("</think>", { split_special_tokens: true });
  expect(plain).not.toContain(tokenizer.sep_token_id);
  expect(tokenizer.decode(plain)).toBe("</think>");
});

test("added_tokens.json and add_bos_token are honoured", async () => {
  const files = {
    "added_tokens.json": { "<extra>": 3000 },
    "tokenizer_config.json": { add_bos_token: true, additional_special_tokens: ["<extra>"] },
  };
  const tokenizer = await Tokenizer.open(fixtureFolder("identity.model", "tokenizer.model", files));
  expect([tokenizer.vocab_size, tokenizer.size, tokenizer.length]).toEqual([3000, 3001, 3001]);
  expect(tokenizer.encode("<extra>")).toEqual([1, 3000]);
  expect(tokenizer.decode([1, 3000], { skip_special_tokens: true })).toBe("");
});

/** Bytes of a field of a protobuf message. */
function field(id: number, value: Uint8Array | string | number): number[] {
  if (typeof value === "number") return [id * 8, value];
  const bytes = typeof value === "string" ? new TextEncoder().encode(value) : value;
  return [...(id > 15 ? [((id * 8 + 2) & 0x7f) | 0x80, (id * 8 + 2) >> 7] : [id * 8 + 2]), bytes.length, ...bytes];
}

function piece(text: string, score: number, type: number): number[] {
  const bytes = [...field(1, text), 0x15, ...new Uint8Array(new Float32Array([score]).buffer), ...field(3, type)];
  return field(1, Uint8Array.from(bytes));
}

function model(pieces: readonly (readonly [string, number, number])[], modelType = 2): Uint8Array {
  const spec = [...field(3, 0), ...field(4, 0)]; // no dummy prefix, spaces kept
  return Uint8Array.from([
    ...pieces.flatMap((each) => piece(...each)),
    ...field(2, Uint8Array.from(field(3, modelType))),
    ...field(3, Uint8Array.from(spec)),
  ]);
}

test("merges of one piece go from left to right, and unused pieces are taken apart", () => {
  const { cut } = readSentencePiece(
    model([
      ["<unk>", 0, 2],
      ["a", -9, 1],
      ["aa", -1, 1],
      ["aaa", -2, 1],
      ["b", -9, 1],
      ["ab", -3, 5],
      ["abb", -9, 1],
    ]),
  );
  const encode = (text: string) => {
    const out: number[] = [];
    cut(text, true, out);
    return out;
  };
  expect(encode("aaaaa")).toEqual([2, 3]);
  expect(encode("ab")).toEqual([1, 4]);
  expect(encode("abb")).toEqual([6]);
  expect(encode("axyb")).toEqual([1, 0, 4]);
});

test.each([
  ["a type that is not BPE", model([["<unk>", 0, 2]], 1), "tokenizer.model: a SentencePiece model of type unigram; only BPE is supported"],
  ["no unknown piece", model([["a", 0, 1]]), "tokenizer.model: malformed: it has no unknown piece"],
  ["nothing", new Uint8Array(0), "tokenizer.model: not a SentencePiece model: its 0 bytes contain no pieces"],
  ["a cut file", readFileSync(join(fixtures, "nfkc.model")).subarray(0, 20_001), "tokenizer.model: not a SentencePiece model: "],
  ["text", new TextEncoder().encode("version https://git-lfs.github.com/spec/v1\n"), "tokenizer.model: not a SentencePiece model: "],
])("refuses %s in one line", async (_, bytes, message) => {
  const error = await Tokenizer.open(folder({ "tokenizer.model": bytes })).catch((caught: unknown) => caught);
  expect(error).toBeInstanceOf(TokenizerError);
  expect(String(error)).toContain(message);
  expect(String(error)).not.toContain("\n");
});

test("a damaged file is refused or read, never anything else", () => {
  const whole = readFileSync(join(fixtures, "identity.model"));
  for (let i = 0; i < 300; i++) {
    const bytes = Uint8Array.from(whole);
    for (let k = 0; k <= i % 3; k++) bytes[(i * 7919 + k * 104729) % bytes.length] = (i * 31 + k) & 0xff;
    try {
      readSentencePiece(i % 2 === 0 ? bytes : bytes.subarray(0, (i * 7907) % bytes.length)).cut("ab 解释", true, []);
    } catch (error) {
      expect(error).toBeInstanceOf(TokenizerError);
    }
  }
});
