import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { TokenizerError } from "../../src/tokenizer/error.ts";
import { PreTrainedTokenizer, Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { ernieConfig, fixtureFolder, fixtures, folder, miniJson } from "./folders.ts";

const open = (config: object = ernieConfig) =>
  Tokenizer.open(fixtureFolder("ernie.json", "tokenizer.json", { "tokenizer_config.json": config }));
const mini = (change?: Record<string, unknown>) => Tokenizer.open(folder({ "tokenizer.json": miniJson(change) }));

test("ids and texts equal those of the Rust library", async () => {
  const tokenizer = await open();
  const goldens = JSON.parse(readFileSync(join(fixtures, "ernie-goldens.json"), "utf8"));
  for (const { text, ids, split, decoded, skipped } of goldens) {
    expect({ text, ids: tokenizer.encode(text) }).toEqual({ text, ids });
    expect(tokenizer.encode(text, { split_special_tokens: true })).toEqual(split);
    expect(tokenizer.decode(ids)).toBe(decoded);
    expect(tokenizer.decode(ids, { skip_special_tokens: true })).toBe(skipped);
  }
});

test("it is a function and an object", async () => {
  const tokenizer = await open();
  expect(tokenizer).toBeInstanceOf(PreTrainedTokenizer);
  const ids = tokenizer.encode("hello");
  expect(tokenizer("hello")).toEqual({ input_ids: [ids], attention_mask: [ids.map(() => 1)] });
  expect(tokenizer([]).input_ids).toEqual([]);
  expect(tokenizer.batch_decode(tokenizer(["a", "", "中文"]).input_ids)).toEqual(["a", "", "中文"]);
  expect(tokenizer.tokenize("a<s>")).toEqual(["a", "<s>"]);
  expect([tokenizer.vocab_size, tokenizer.size, tokenizer.length]).toEqual([2500, 2500, 2500]);
});

test("special tokens and settings by their names in transformers", async () => {
  const tokenizer = await open();
  expect([tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token]).toEqual(["<s>", "</s>", "<unk>", "<unk>"]);
  expect([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]).toEqual([1, 2, 0, 0]);
  expect([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token, tokenizer.mask_token_id]).toEqual([4, 5, "<mask:0>", 3]);
  expect(tokenizer.all_special_ids).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
  expect([tokenizer.model_max_length, tokenizer.padding_side]).toEqual([4096, "left"]);
  expect(tokenizer.convert_ids_to_tokens([1, 2])).toEqual(["<s>", "</s>"]);
  expect(tokenizer.convert_tokens_to_ids(["</s>", "no such token"])).toEqual([2, 0]);
  const bare = await mini();
  expect([bare.bos_token, bare.bos_token_id, bare.model_max_length]).toEqual([null, null, Number.POSITIVE_INFINITY]);
});

test("special tokens may stand in special_tokens_map.json, as objects, and without an id", async () => {
  const files = { "special_tokens_map.json": { eos_token: { content: "ab" }, pad_token: "<none>" }, "tokenizer.json": miniJson() };
  const tokenizer = await Tokenizer.open(folder(files));
  expect([tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.pad_token_id]).toEqual([269, "<none>", null]);
  expect(tokenizer.decode(tokenizer.encode("a ab"), { skip_special_tokens: true })).toBe("a ");
});

test("padding and truncation", async () => {
  const tokenizer = await mini();
  expect(() => tokenizer(["a", "aa"], { padding: true })).toThrow("padding needs a padding token");
  const padded = await Tokenizer.open(
    folder({ "tokenizer.json": miniJson(), "tokenizer_config.json": { pad_token: "<unk>", model_max_length: 5 } }),
  );
  const [a, b] = [263, 264];
  expect(padded(["a", "bab"])).toEqual({ input_ids: [[a], [b, 269]], attention_mask: [[1], [1, 1]] });
  expect(padded(["a", "bb"], { padding: true })).toEqual({ input_ids: [[0, a], [b, b]], attention_mask: [[0, 1], [1, 1]] }); // biome-ignore format: rows
  expect(padded(["a", "bb"], { padding: "longest", padding_side: "right" }).attention_mask).toEqual([[1, 0], [1, 1]]); // biome-ignore format: rows
  padded.padding_side = "right";
  expect(padded("a", { padding: "max_length", max_length: 3 }).input_ids).toEqual([[a, 0, 0]]);
  expect(padded("a", { padding: "max_length" }).input_ids[0]).toHaveLength(5);
  expect(padded("bbbbbbb", { truncation: true }).input_ids[0]).toHaveLength(5);
  expect(padded("bbbbbbb", { max_length: 2 }).input_ids[0]).toHaveLength(2);
  expect(padded("bbbbbbb", { max_length: 2, truncation: false }).input_ids[0]).toHaveLength(7);
  expect(() => tokenizer("a", { padding: "max_length" })).toThrow("needs max_length");
  expect(() => tokenizer("a", { max_length: 1.5 })).toThrow("max_length must be a non-negative integer, not 1.5");
});

test("tokens around a text come from the post-processor, and truncation leaves room for them", async () => {
  const post_processor = {
    type: "TemplateProcessing",
    single: [
      { SpecialToken: { id: "<s>", type_id: 0 } },
      { Sequence: { id: "A", type_id: 0 } },
      { SpecialToken: { id: "</s>", type_id: 0 } },
    ],
    pair: [],
    special_tokens: { "<s>": { id: "<s>", ids: [1], tokens: ["<s>"] }, "</s>": { id: "</s>", ids: [2], tokens: ["</s>"] } },
  };
  const tokenizer = await mini({ post_processor });
  expect(tokenizer.encode("a")).toEqual([1, 263, 2]);
  expect(tokenizer.encode("a", { add_special_tokens: false })).toEqual([263]);
  expect(tokenizer("bbbb", { max_length: 3, truncation: true }).input_ids).toEqual([[1, 264, 2]]);
});

test("odd texts: empty, lone surrogates, a byte order mark, unknown characters", async () => {
  const tokenizer = await open();
  expect([tokenizer.encode(""), tokenizer.decode([])]).toEqual([[], ""]);
  expect(tokenizer.encode("a\ud83d")).toEqual(tokenizer.encode("a\ufffd"));
  expect(tokenizer.encode("\ude00😀")).toEqual(tokenizer.encode("\ufffd😀"));
  for (const text of ["\ufeffx", "𠀀龘\u0000", "a\r\n\t b  ", "👨‍👩‍👧‍👦"]) expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
});

test("added tokens: single words, stripped spaces, normalised text", async () => {
  const added_tokens = [
    { id: 271, content: "aa", single_word: true },
    { id: 272, content: "<l>", lstrip: true, special: true },
    { id: 273, content: "<r>", rstrip: true, special: true },
    { id: 274, content: "b a", normalized: true },
  ];
  const tokenizer = await mini({ added_tokens });
  expect(tokenizer.encode("aa a")).toEqual([271, 268]);
  expect(tokenizer.encode("aab")).toEqual([263, 269]);
  expect(tokenizer.encode("b  <l>b<r> \nb")).toEqual([264, 272, 264, 273, 264]);
  expect(tokenizer.encode("bb a")).toEqual([264, 274]);
});

test.each([-1, 271, 1.5, Number.NaN, "1", undefined])("decode refuses the id %s", async (id) => {
  const tokenizer = await mini();
  const error = (): unknown => tokenizer.decode([263, id as number]);
  expect(error).toThrow(TokenizerError);
  expect(error).toThrow(/271 tokens/);
});

test("what is no text is refused", async () => {
  const tokenizer = await mini();
  expect(() => tokenizer.encode(undefined as never)).toThrow("the text must be a string, not undefined");
  expect(() => tokenizer(5 as never)).toThrow("a tokenizer takes a string or a list of strings, not 5");
  expect(() => tokenizer.decode([[1]] as never)).toThrow("a token id must be an integer");
});

test.each<[string, Record<string, unknown>, string]>([
  ["no tokenizer", { "config.json": "{}" }, "it has neither tokenizer.json nor tokenizer.model"],
  ["JSON cut off", { "tokenizer.json": '{"model": {\n "vocab": {"a"' }, "tokenizer.json: broken JSON: unexpected end at line 2, column 15"],
  ["a stray character", { "tokenizer.json": '{"a": 1,\n  x}' }, 'tokenizer.json: broken JSON: unexpected "x" at line 2, column 3'],
  ["a broken number", { "tokenizer.json": '{"a": -x}' }, 'unexpected "x" at line 1, column 8'],
  ["a broken word", { "tokenizer.json": "[tru]" }, 'unexpected "]" at line 1, column 5'],
  ["a raw line end", { "tokenizer.json": '["a\n"]' }, 'unexpected "\\n" at line 1, column 4'],
  [
    "a broken configuration",
    { "tokenizer.json": miniJson(), "tokenizer_config.json": "{" },
    "tokenizer_config.json: broken JSON: unexpected end at line 1, column 2",
  ],
  [
    "a configuration that is a list",
    { "tokenizer.json": miniJson(), "tokenizer_config.json": "[]" },
    "tokenizer_config.json: not a JSON object",
  ],
  ["no model", { "tokenizer.json": {} }, "tokenizer.json: model is missing, not an object"],
  [
    "a merge of nothing",
    { "tokenizer.json": miniJson({ model: { type: "BPE", vocab: { a: 0 }, merges: ["a b"] } }) },
    'merge 0 ("a b") names a token',
  ],
  [
    "a strange id",
    { "tokenizer.json": miniJson({ added_tokens: [], model: { type: "BPE", vocab: { a: -1 }, merges: [] } }) },
    'tokenizer.json: model.vocab["a"] is -1, not a token id',
  ],
  ["a strange decoder", { "tokenizer.json": miniJson({ decoder: { type: "CTC" } }) }, 'decoder "CTC" is not supported'],
  [
    "a strange normalizer",
    { "tokenizer.json": miniJson({ normalizer: { type: "Odd" } }) },
    "tokenizer.json: cannot be used: Unknown Normalizer type: Odd",
  ],
  [
    "an id taken twice",
    { "tokenizer.json": miniJson({ added_tokens: [{ id: 263, content: "<x>" }] }) },
    'added token "<x>" has the id 263, but the vocabulary has "a" there',
  ],
  ["a strange side", { "tokenizer.json": miniJson(), "tokenizer_config.json": { padding_side: "up" } }, 'padding_side is "up"'],
])("a folder with %s is refused in one line", async (_, files, message) => {
  const path = folder(files);
  const error = await Tokenizer.open(path).catch((caught: unknown) => caught);
  expect(error).toBeInstanceOf(TokenizerError);
  expect((error as Error).message).toContain(path);
  expect((error as Error).message).toContain(message);
  expect((error as Error).message).not.toContain("\n");
});

test("tokenizer.json wins over tokenizer.model", async () => {
  const tokenizer = await Tokenizer.open(fixtureFolder("identity.model", "tokenizer.model", { "tokenizer.json": miniJson() }));
  expect(tokenizer.size).toBe(271);
});

test("100,000 characters are encoded and decoded, whatever they are", async () => {
  const tokenizer = await open();
  const random = Array.from({ length: 100_000 }, (_, i) => String.fromCharCode(0x4e00 + ((i * 7919) % 20_000))).join("");
  const texts = {
    chinese: "解释混合专家架构的优势。".repeat(8_334),
    random,
    repeated: "的".repeat(100_000),
    letters: "a".repeat(100_000),
    spaces: " ".repeat(100_000),
  };
  for (const [name, text] of Object.entries(texts)) {
    expect(tokenizer.decode(tokenizer.encode(text)) === text, name).toBe(true);
  }
});

test("a vocabulary of 100,000 tokens encodes a long text", async () => {
  const characters = Array.from({ length: 20_000 }, (_, i) => String.fromCharCode(0x4e00 + i));
  const pairs = Array.from(
    { length: 80_000 },
    (_, i) => [characters[(i * 7) % 20_000] ?? "", characters[(i * 13 + (i >> 14)) % 20_000] ?? ""] as const,
  );
  const vocab = Object.fromEntries([...new Set([...characters, ...pairs.map((pair) => pair.join(""))])].map((token, id) => [token, id]));
  const tokenizer = await Tokenizer.open(
    folder({ "tokenizer.json": miniJson({ added_tokens: [], model: { type: "BPE", vocab, merges: pairs } }) }),
  );
  const text = Array.from({ length: 100_000 }, (_, i) => characters[(i * 7919 + (i >> 3)) % 20_000]).join("");
  const ids = tokenizer.encode(text);
  expect(tokenizer.convert_ids_to_tokens(ids).join("")).toBe(text);
});
