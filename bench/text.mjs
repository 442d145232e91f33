/**
 * The tokenizer: encoding and decoding 100,000 characters of several kinds, a vocabulary of 100,000 tokens, and whether a token
 * late in an answer costs more to decode than one at its beginning. Medians with their range.
 *
 *   npm run build && node bench/text.mjs [--model default] [--rounds 5] [--seed 1]
 *
 * What keeps rounds honest: each round encodes other text of the same kind, so that no cache of the last one helps;
 * the first round warms up and is left out.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { AutoTokenizer } from "../dist/index.js";
import { Detokenizer } from "../dist/tokenizer/detokenizer.js";
import { report, reportRatio } from "./figures.mjs";
import { freshPrompts } from "./prompts.mjs";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: "default" },
    rounds: { type: "string", default: "5" },
    seed: { type: "string", default: "1" },
  },
});
const rounds = Number(flags.rounds);
const LENGTH = 100_000;
const HAN = 0x4e00;
const HAN_COUNT = 20_000;
const numbers = freshPrompts({ vocabulary: HAN_COUNT, seed: Number(flags.seed) });
const han = (count) => String.fromCharCode(...numbers.ids(count).map((n) => HAN + n));
const times = (piece) => piece.repeat(Math.ceil(LENGTH / piece.length)).slice(0, LENGTH);

/** Random text in the words of the prompts. */
function english() {
  const words = [];
  for (let length = 0; length < LENGTH; length += words.at(-1).length + 1) words.push(numbers.text(8));
  return words.join(" ").slice(0, LENGTH);
}

const KINDS = {
  english,
  "a Chinese sentence, repeated": () => times(`${han(8)}解释混合专家架构的优势。`),
  "random Chinese characters": () => Array.from({ length: 10 }, () => han(LENGTH / 10)).join(""),
  "one Chinese character": () => times(han(1)),
  "one letter": () => times(String.fromCharCode(97 + (numbers.ids(1)[0] % 26))),
  spaces: () => `${han(1)}${" ".repeat(LENGTH - 1)}`,
};

const timed = (work) => {
  const start = performance.now();
  const result = work();
  return [performance.now() - start, result];
};

function measure(tokenizer, name, text) {
  const [encode, decode] = [[], []];
  for (let round = 0; round <= rounds; round++) {
    const input = text();
    const [encodeMs, ids] = timed(() => tokenizer.encode(input, { add_special_tokens: false }));
    const [decodeMs, output] = timed(() => tokenizer.decode(ids));
    if (output !== input) throw new Error(`${name}: the text changed on its way to ids and back`);
    if (round === 0) continue;
    encode.push(encodeMs);
    decode.push(decodeMs);
  }
  report(`${name}: encode ${LENGTH.toLocaleString("en")} characters`, encode, "ms", 1);
  report("  decode", decode, "ms", 1);
}

/** A tokenizer of single Han characters and 80,000 pairs of them, as a folder. */
function largeVocabulary(folder) {
  const characters = Array.from({ length: HAN_COUNT }, (_, i) => String.fromCharCode(HAN + i));
  const merges = Array.from({ length: 80_000 }, (_, i) => [characters[(i * 7) % HAN_COUNT], characters[(i * 13 + (i >> 14)) % HAN_COUNT]]);
  const tokens = [...new Set([...characters, ...merges.map((pair) => pair.join(""))])];
  const model = { type: "BPE", vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges };
  const parts = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: { type: "Fuse" } };
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify({ version: "1.0", added_tokens: [], ...parts, model }));
  return folder;
}

const tokenizer = await AutoTokenizer.from_pretrained(flags.model);
for (const [name, text] of Object.entries(KINDS)) measure(tokenizer, name, text);

const folder = mkdtempSync(join(tmpdir(), "text-"));
try {
  const large = await AutoTokenizer.from_pretrained(largeVocabulary(folder));
  measure(large, "vocabulary of 100,000, random Chinese", KINDS["random Chinese characters"]);
} finally {
  rmSync(folder, { recursive: true });
}

const [early, late] = [[], []];
const fresh = freshPrompts({ vocabulary: tokenizer.vocabulary.size, seed: Number(flags.seed) });
for (let round = 0; round <= rounds; round++) {
  const detokenizer = new Detokenizer(tokenizer);
  const push = (ids) => {
    const [ms] = timed(() => {
      for (const id of ids) detokenizer.push(id);
    });
    return ms / ids.length;
  };
  const first = push(fresh.ids(50_000));
  push(fresh.ids(400_000));
  const last = push(fresh.ids(50_000));
  if (round === 0) continue;
  early.push(first * 1e6);
  late.push(last * 1e6);
}
report("detokenizer, a token of the first 50,000", early, "ns");
report("  after 450,000", late, "ns");
reportRatio("  late / early", late, early);
