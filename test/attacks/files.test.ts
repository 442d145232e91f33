/** Mutated JSON files of a model: whatever a field holds, the model opens, or one error names the file. */
import { cpSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openTokenizer } from "../../src/api/tokenizer.ts";
import { openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { locate } from "../../src/checkpoint/names.ts";
import { ConfigError } from "../../src/model/config.ts";
import { parameters } from "../../src/model/ernie.ts";
import { configFor } from "../../src/model/fit.ts";
import { measure } from "../../src/model/size.ts";
import { TokenizerError } from "../../src/tokenizer/error.ts";
import { readModel, writeModel } from "../api/folders.ts";
import { temporary } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** `undefined` removes the field. 1e999 is Infinity once parsed, and a text as JSON holds it. */
const WRONG: readonly (string | undefined)[] = [
  undefined,
  "null",
  "true",
  "-1",
  "1.5",
  "1e999",
  "2000000",
  "4294967297",
  '"x"',
  '""',
  '"("',
  "[]",
  "{}",
  "[null]",
  '[["a"]]',
  '{"a":{}}',
  '{"constructor":1,"__proto__":2}',
];

/** The places of all values in a JSON document. */
function* places(value: Json, at: readonly (string | number)[] = []): Generator<readonly (string | number)[]> {
  yield at;
  if (typeof value !== "object" || value === null) return;
  for (const key of Object.keys(value))
    yield* places((value as Record<string, Json>)[key], [...at, Array.isArray(value) ? Number(key) : key]);
}

/** The document as text, with other text at one place. */
function mutated(document: Json, at: readonly (string | number)[], text: string | undefined): string {
  const marked = structuredClone(document) as Json;
  if (at.length === 0) return text ?? "";
  let parent = marked as Record<string | number, Json>;
  for (const key of at.slice(0, -1)) parent = parent[key] as Record<string | number, Json>;
  const last = at[at.length - 1];
  if (text === undefined) delete parent[last];
  else parent[last] = "@@here@@";
  return JSON.stringify(marked).replace('"@@here@@"', () => text ?? "");
}

/** Errors, by mutation, that are not one line of these classes that names `file`. */
async function wrongErrors(
  folder: string,
  file: string,
  document: Json,
  open: () => Promise<unknown>,
): Promise<{ bad: string[]; tried: number; failed: number }> {
  const bad: string[] = [];
  let [tried, failed] = [0, 0];
  for (const at of places(document))
    for (const text of WRONG) {
      writeFileSync(join(folder, file), mutated(document, at, text));
      tried++;
      const error = await open().then(
        () => null,
        (thrown: unknown) => thrown,
      );
      if (error === null) continue;
      failed++;
      const known = error instanceof TokenizerError || error instanceof ConfigError || error instanceof CheckpointError;
      if (!known || /\n|internal:|undefined|is not a function/.test(error.message)) bad.push(`${at.join(".")} = ${text}: ${error}`);
    }
  writeFileSync(join(folder, file), JSON.stringify(document));
  return { bad, tried, failed };
}

const special = (content: string, id: number) => ({
  id,
  content,
  special: true,
  normalized: false,
  single_word: false,
  lstrip: false,
  rstrip: false,
});
const vocab = Object.fromEntries(["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "<0x41>"].map((token, i) => [token, i]));

const TOKENIZERS: Readonly<Record<string, Json>> = {
  "pieces with ▁": {
    added_tokens: [special("<unk>", 0), special("</s>", 2)],
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: "▁" },
        { type: "Replace", pattern: { String: " " }, content: "▁" },
      ],
    },
    pre_tokenizer: null,
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [],
      special_tokens: { "<s>": { id: "<s>", ids: [1], tokens: ["<s>"] } },
    },
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: "<unk>",
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab,
      merges: ["a b", ["▁", "a"]],
    },
  },
  "words and bytes": {
    added_tokens: [special("<unk>", 0)],
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "NFC" },
        { type: "Replace", pattern: { Regex: "\\s+" }, content: " " },
        { type: "Strip", strip_left: true, strip_right: true },
      ],
    },
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        { type: "Split", pattern: { Regex: "\\d" }, behavior: "Isolated", invert: false },
        { type: "Digits", individual_digits: true },
        { type: "Metaspace", replacement: "▁", prepend_scheme: "always", split: true },
      ],
    },
    post_processor: { type: "BertProcessing", sep: ["</s>", 2], cls: ["<s>", 1] },
    decoder: { type: "Metaspace", replacement: "▁", prepend_scheme: "always" },
    model: { type: "WordPiece", unk_token: "<unk>", continuing_subword_prefix: "##", max_input_chars_per_word: 100, vocab },
  },
  scores: {
    added_tokens: [],
    normalizer: { type: "BertNormalizer", clean_text: true, handle_chinese_chars: true, strip_accents: null, lowercase: true },
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: "ByteLevel" },
    model: {
      type: "Unigram",
      unk_id: 0,
      vocab: [
        ["<unk>", 0],
        ["a", -1],
        ["b", -1.5],
      ],
    },
  },
};

const CONFIG: Json = {
  bos_token: "<s>",
  eos_token: { content: "</s>", special: true, lstrip: false },
  additional_special_tokens: ["<s>"],
  extra_special_tokens: { image: "<s>" },
  added_tokens_decoder: { "0": { content: "<unk>", special: true, normalized: false } },
  chat_template: [{ name: "default", template: "{{ messages[0].content }}" }],
  model_max_length: 100,
  padding_side: "left",
  truncation_side: "right",
  clean_up_tokenization_spaces: false,
  split_special_tokens: false,
  add_bos_token: true,
  add_eos_token: false,
};

/** Opens and uses a tokenizer. */
async function useTokenizer(folder: string): Promise<void> {
  const tokenizer = await openTokenizer(folder);
  const ids = tokenizer.encode("ab a 12");
  tokenizer.decode(ids.filter((id) => tokenizer.vocabulary.has(id)));
  for (const id of ids) if (tokenizer.vocabulary.has(id)) tokenizer.vocabulary.bytes(id);
  if (tokenizer.chat_template !== null) void tokenizer.special_tokens_map;
}

describe("mutated files are refused in one line, or work", () => {
  test.each(Object.keys(TOKENIZERS))("tokenizer.json: %s", async (name) => {
    const folder = temporary();
    const { bad, tried, failed } = await wrongErrors(folder, "tokenizer.json", TOKENIZERS[name], () => useTokenizer(folder));
    expect(bad).toEqual([]);
    expect(tried).toBeGreaterThan(300);
    expect(failed).toBeGreaterThan(100);
    await useTokenizer(folder);
  });

  test.each(["tokenizer_config.json", "special_tokens_map.json"])("%s", async (file) => {
    const folder = temporary();
    writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(TOKENIZERS["pieces with ▁"]));
    const { bad, failed } = await wrongErrors(folder, file, CONFIG, () => useTokenizer(folder));
    expect(bad).toEqual([]);
    expect(failed).toBeGreaterThan(80);
    await useTokenizer(folder);
  });

  test.each(["config.json", "generation_config.json", "model.safetensors.index.json"])(
    "%s",
    async (file) => {
      const model = await readModel("moe-tiny");
      const folder = await writeModel(temporary(), "model", model, 2);
      const documents: Record<string, Json> = {
        "config.json": model.config as Json,
        "generation_config.json": model.generation as Json,
        "model.safetensors.index.json": { metadata: { total_size: 1 }, weight_map: { "model.norm.weight": "model-1-of-2.safetensors" } },
      };
      const { bad } = await wrongErrors(folder, file, documents[file], async () => {
        const checkpoint = await openCheckpoint(folder);
        const config = configFor(checkpoint);
        measure(config);
        locate(parameters(config), checkpoint);
      });
      expect(bad).toEqual([]);
    },
    30_000,
  );
});

describe("config.json against the weights", () => {
  test.each<[string, unknown, RegExp]>([
    ["num_hidden_layers", 2_000_000, /num_hidden_layers is 2000000; at most 4096 is supported/],
    ["num_hidden_layers", 4000, /num_hidden_layers is 4000, but the weights hold 4 layers/],
    ["num_hidden_layers", 3, /num_hidden_layers is 3, but the weights hold 4 layers/],
    ["num_hidden_layers", -1, /num_hidden_layers is -1, not a whole number/],
    ["num_hidden_layers", 4.5, /num_hidden_layers is 4.5, not a whole number/],
    ["num_hidden_layers", "4", /num_hidden_layers is "4", not a whole number/],
    ["vocab_size", 2 ** 40, /vocab_size is 1099511627776; at most/],
    ["vocab_size", 513, /vocab_size is 513, but the weights hold 512 rows/],
    ["hidden_size", 2 ** 30, /hidden_size is 1073741824; at most/],
    ["intermediate_size", 2 ** 40, /intermediate_size is 1099511627776; at most/],
    ["moe_num_experts", 1_000_000, /moe_num_experts is 1000000; at most 4096/],
    ["moe_num_experts", 4000, /moe_num_experts is 4000, but the weights hold 8 experts/],
    ["moe_num_shared_experts", 1e15, /moe_num_shared_experts is 1000000000000000; at most/],
    ["num_attention_heads", 1e9, /num_attention_heads is 1000000000; at most/],
    ["max_position_embeddings", 1e15, /max_position_embeddings is 1000000000000000; at most 16777216/],
    ["eos_token_id", Array.from({ length: 5000 }, () => 1), /eos_token_id is a list of 5000 ids; at most/],
  ])("%s: %o", async (field, value, message) => {
    const folder = temporary();
    mkdirSync(folder, { recursive: true });
    cpSync(`${GOLDENS}moe-tiny`, folder, { recursive: true });
    const checkpoint = await openCheckpoint(folder);
    const start = performance.now();
    expect(() => configFor({ ...checkpoint, config: { ...checkpoint.config, [field]: value } })).toThrow(message);
    expect(performance.now() - start).toBeLessThan(1000); // it took 25 s to list the layers of such a config
  });
});
