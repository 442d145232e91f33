/**
 * Whether an independent engine, llama.cpp through node-llama-cpp, agrees with mixtape on a model: the model is exported to
 * GGUF, both run it, and their tokens and greedy texts are compared. It measures no time and has no rounds.
 *
 *   npm run build && npm install --prefix bench/rivals --no-package-lock && node bench/rivals/agree.mjs [model] [--types q8_0,bf16] [--tokens 48] [--corpus FILE...]
 */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";
import { exportGguf } from "../../dist/api/export.js";
import { AutoModelForCausalLM, AutoTokenizer } from "../../dist/index.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    types: { type: "string", default: "q8_0,bf16" },
    tokens: { type: "string", default: "48" },
    corpus: { type: "string", multiple: true, default: [] },
    json: { type: "boolean", default: false },
  },
});
const root = fileURLToPath(new URL("../../", import.meta.url));
const source = positionals[0] ?? join(root, "models/small-moe");
const newTokens = Number(values.tokens);

const PROMPTS = [
  "What is 17 + 25?",
  "请用一句话介绍北京。",
  "Tell me a short story about a cat and a lighthouse.",
  "1, 2, 3, 4,",
  "Write a haiku about rain.",
  "为什么天空是蓝色的？",
  "List three fruits.",
  "Translate to Chinese: good morning",
  "How many letters are in the word banana?",
  "日本の首都はどこですか？",
];
/** mixtape's cache is float32 for float32 weights; llama.cpp's is half precision unless set. */
const EXACT_CACHE = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false };
/** Texts that trip tokenizers up. */
const TEXTS = [
  "",
  " ",
  "   three spaces, then\ttab\n\n\nnewlines  ",
  "aaaaaaaaaaaaaaaa bbbbbbb ======== -------- ........",
  "naïve café Ünïcödé ÀÉÎÕÜ ß ﬁ ½ ①",
  "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u0000 \u200b \ufeff end",
  "混合 mixed 文本 with English 单词 and 数字 12345.678e-9",
  "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n",
  "https://example.com/a/b?c=d&e=%20f#g",
  "<|begin_of_sentence|>User: hi\nAssistant: hello<|end_of_sentence|></s><unk><0x0A>",
  "العربية עברית हिन्दी ไทย 한국어 日本語 Русский Ελληνικά",
];

const ours = await AutoTokenizer.from_pretrained(source);
const texts = [...TEXTS, ...PROMPTS];
for (const file of [join(root, "README.md"), join(root, "models/small-moe/README.md"), ...values.corpus]) {
  for (const line of readFileSync(file, "utf8").split(/(?<=\n)/)) if (line.trim() !== "") texts.push(line);
}
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const folder = mkdtempSync(join(tmpdir(), "agree-"));
const results = [];
try {
  for (const type of values.types.split(",")) results.push(await compare(type));
} finally {
  rmSync(folder, { recursive: true, force: true });
}
if (values.json) console.log(JSON.stringify(results));
process.exit(0);

async function compare(type) {
  const file = join(folder, `${type}.gguf`);
  await exportGguf(source, file, { type });
  const theirs = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
  const model = await AutoModelForCausalLM.from_pretrained(file);
  const own = await AutoModelForCausalLM.from_pretrained(source);
  const fromFile = await AutoTokenizer.from_pretrained(file);

  let [tokens, sameTexts, oursAgain] = [0, 0, 0];
  const differing = [];
  for (const text of texts) {
    const expected = ours.encode(text, { add_special_tokens: false });
    const seen = theirs.tokenize(text, true, "trimLeadingSpace");
    tokens += expected.length;
    if (equal(expected, seen)) sameTexts++;
    else if (differing.length < 5)
      differing.push({ text: text.slice(0, 80), ours: expected.slice(0, 40).join(), llama: [...seen].slice(0, 40).join() });
    if (equal(expected, fromFile.encode(text, { add_special_tokens: false }))) oursAgain++;
  }

  const context = await theirs.createContext({ contextSize: 1024, threads: 2, ...(type === "f32" ? EXACT_CACHE : {}) });
  let [sameAnswers, sameSource, same, total, widest] = [0, 0, 0, 0, 0];
  const answers = [];
  for (const prompt of PROMPTS) {
    const ids = ours.apply_chat_template([{ role: "user", content: prompt }], { add_generation_prompt: true });
    const [a, b] = await Promise.all([greedy(model, ids), greedy(own, ids)]);
    const sequence = context.getSequence();
    const c = [];
    for await (const id of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
      c.push(id);
      if (c.length === newTokens || (model.generation_config.eos_token_id ?? []).includes?.(id)) break;
    }
    sequence.dispose();
    const first = [...a].findIndex((id, i) => c[i] !== id);
    if (equal(a, c)) sameAnswers++;
    else answers.push({ prompt, at: first, ours: ours.decode(a), llama: ours.decode(c) });
    if (equal(a, b)) sameSource++;
    // Position by position along our text: which token would the other engine choose after the same ones?
    const forced = context.getSequence();
    const input = [...ids, ...a.slice(0, -1)].map((id, i) =>
      i < ids.length - 1 ? id : [id, { generateNext: { token: true, confidence: true } }],
    );
    const out = (await forced.controlledEvaluate(input, { evaluationPriority: 5 })).filter((each) => each?.next?.token != null);
    forced.dispose();
    const { logits } = await model.forward({ input_ids: [[...ids, ...a.slice(0, -1)]] });
    const vocab = logits.dims[2];
    out.forEach((each, i) => {
      total++;
      if (each.next.token === a[i]) same++;
      const row = logits.data.subarray((ids.length - 1 + i) * vocab, (ids.length + i) * vocab);
      widest = Math.max(widest, row[a[i]] - row[each.next.token]);
    });
  }
  await context.dispose();
  await theirs.dispose();
  await model.dispose();
  await own.dispose();
  const result = {
    type,
    tokenizer: { texts: texts.length, tokens, same: sameTexts, sameAfterRoundTrip: oursAgain, differing },
    greedy: { prompts: PROMPTS.length, same: sameAnswers, sameAsSource: sameSource, differing: answers },
    positions: { total, same, widest },
  };
  if (!values.json) {
    console.log(`${type}: tokens of ${sameTexts} of ${texts.length} texts equal (${oursAgain} with mixtape's own reading of the file)`);
    for (const each of differing) console.log("  ", JSON.stringify(each));
    console.log(
      `${type}: greedy answers equal to llama.cpp's: ${sameAnswers} of ${PROMPTS.length}; to the source's in mixtape: ${sameSource}`,
    );
    console.log(
      `${type}: next token the same along our answers: ${same} of ${total} (${((100 * same) / total).toFixed(1)} %); where not, our logits of the two are at most ${widest.toFixed(3)} apart`,
    );
    for (const each of answers) console.log("  ", JSON.stringify(each));
  }
  return result;
}

async function greedy(model, ids) {
  const [out] = await model.generate({ input_ids: [ids], do_sample: false, repetition_penalty: 1, max_new_tokens: newTokens });
  return out.slice(ids.length);
}

function equal(a, b) {
  return a.length === b.length && a.every((id, i) => id === b[i]);
}
