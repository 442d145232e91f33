/** Classifiers: the head on the last token's hidden state, transformers' options and results, heads from adapters, and broken ones. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import { AutoModelForSequenceClassification, type ClassifierOptions } from "../../src/api/classifier.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { pipeline } from "../../src/api/pipeline.ts";
import { quantize } from "../../src/api/quantize.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { writeSafetensors } from "../../src/checkpoint/writer.ts";
import { adapterFolder } from "../adapterfolder.ts";
import { classifierFolder, headTensors } from "../classifierfolder.ts";
import { temporary } from "../cli/run.ts";
import { openGoldens, relativeError } from "../goldens.ts";

const BUNDLED = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const open: { dispose(): Promise<void> }[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((m) => m.dispose()));
});

async function load(folder: string, options: ClassifierOptions = {}) {
  const model = await AutoModelForSequenceClassification.from_pretrained(folder, {
    dtype: "fp32",
    threads: 2,
    kv_cache_tokens: 2048,
    ...options,
  });
  open.push(model);
  return model;
}

/** What the head makes of the hidden states that the recorded outputs of transformers hold to. */
async function expected(base: string, rows: readonly number[][], classes: number, bias: boolean, adapter?: string): Promise<Float32Array> {
  const model = await AutoModelForCausalLM.from_pretrained(base, { dtype: "fp32", threads: 1, kv_cache_tokens: 1024 });
  open.push(model);
  if (adapter !== undefined) await model.load_adapter(adapter);
  const hidden = model.config.hiddenSize;
  const [{ values: weight }, shift] = headTensors(classes, hidden, bias);
  const logits: number[] = [];
  for (const row of rows) {
    const { hidden_states } = await model.forward({
      input_ids: [row],
      output_hidden_states: true,
      adapter: adapter === undefined ? null : "default",
    });
    const states = hidden_states?.at(-1)?.data.slice(-hidden) as Float32Array;
    for (let c = 0; c < classes; c++) {
      let sum = shift ? shift.values[c] : 0;
      for (let i = 0; i < hidden; i++) sum += states[i] * weight[c * hidden + i];
      logits.push(sum);
    }
  }
  return Float32Array.from(logits);
}

/** A folder of an adapter with a head beside its branches. */
async function withHead(base: string, classes: number, bias: boolean, config: object = {}): Promise<{ folder: string; plain: string }> {
  const plain = await adapterFolder(base, 5, {}, 0.3);
  const folder = temporary();
  const raw = JSON.parse(readFileSync(join(plain, "adapter_config.json"), "utf8"));
  // PEFT lists both names for SEQ_CLS, whichever the model has
  writeFileSync(
    join(folder, "adapter_config.json"),
    JSON.stringify({ ...raw, task_type: "SEQ_CLS", modules_to_save: ["classifier", "score"], ...config }),
  );
  const { tensors } = await readHeader(join(plain, "adapter_model.safetensors"));
  const { hidden_size } = JSON.parse(readFileSync(join(base, "config.json"), "utf8"));
  await writeSafetensors(
    join(folder, "adapter_model.safetensors"),
    [
      ...[...tensors.values()].map((e) => ({ name: e.name, dtype: e.dtype, shape: e.shape, data: () => readTensor(e) })),
      ...headTensors(classes, hidden_size, bias, "base_model.model."),
    ],
    { metadata: { format: "pt" } },
  );
  return { folder, plain };
}

describe.each([
  ["moe-tiny", 3, false],
  ["dense-tiny", 5, true],
  ["moe-bias", 1, true],
])("%s with %i classes", (variant, classes, bias) => {
  test("logits are the head's of the last token that is no padding, on either side, in any batch", async () => {
    const { folder: base, ids } = await openGoldens(variant);
    const model = await load(await classifierFolder(base, classes, { pad_token_id: 0 }, { bias }));
    const rows = [await ids(33), await ids(7), (await ids(33)).slice(0, 20)].map((row) => row.map((id) => Math.max(id, 1)));
    const wanted = await expected(base, rows, classes, bias);
    const width = 40;
    const right = rows.map((row) => [...row, ...new Array(width - row.length).fill(0)]);
    const left = rows.map((row) => [...new Array(width - row.length).fill(9), ...row]);
    const masks = rows.map((row) => [...new Array(width - row.length).fill(0), ...row.map(() => 1)]);
    const { logits } = await model.forward({ input_ids: right });
    expect(logits.dims).toEqual([3, classes]);
    expect(relativeError(logits.data, wanted)).toBeLessThan(1e-5);
    const masked = await model.forward({ input_ids: left, attention_mask: masks });
    expect(masked.logits.data).toEqual(logits.data); // to the bit
    const alone = [];
    for (const row of rows) alone.push(...(await model.forward({ input_ids: [row] })).logits.data);
    expect([...logits.data]).toEqual(alone);
  });
});

test("a head and branches from an adapter's folder, by the base's folder and by the adapter's own", async () => {
  const { folder: base, ids } = await openGoldens("moe-tiny");
  const { folder, plain } = await withHead(base, 4, true, { base_model_name_or_path: base });
  const rows = [await ids(33), await ids(7)];
  const wanted = await expected(base, rows, 4, true, plain);
  for (const model of [await load(base, { adapter: folder }), await load(folder)]) {
    expect(model.classifier.labels).toEqual(["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]);
    expect(model.active_adapter).toBe("default");
    expect(relativeError((await model.forward({ input_ids: rows })).logits.data, wanted)).toBeLessThan(1e-5);
    const without = await model.forward({ input_ids: rows, adapter: null });
    expect(relativeError(without.logits.data, await expected(base, rows, 4, true))).toBeLessThan(1e-5);
    expect(relativeError(without.logits.data, wanted)).toBeGreaterThan(1e-2);
  }
  const named = await load(base, {
    adapter: folder,
    id2label: { 0: "a", 1: "b", 2: "c", 3: "d" },
    problem_type: "multi_label_classification",
  });
  expect(named.classifier).toMatchObject({ labels: ["a", "b", "c", "d"], problem: "multi_label_classification" });
  await expect(named.load_adapter(folder)).rejects.toThrow("is a classifier: it has a head 'score'");
});

describe("pipeline", () => {
  const texts = ["The soup was cold.", "Wonderful!", "It is a long story of a journey through the mountains, told by two friends."];

  async function classifier(config: object, classes = 3) {
    const classify = await pipeline("text-classification", await classifierFolder(BUNDLED, classes, config), {
      threads: 1,
      kv_cache_tokens: 2048,
    });
    open.push(classify);
    const logits = async (text: string) => [
      ...(await classify.model.forward({ input_ids: [classify.tokenizer.encode(text)] })).logits.data,
    ];
    return { classify, logits };
  }

  test("shapes of results are transformers'", async () => {
    const { classify, logits } = await classifier({});
    const powers = (await logits(texts[0])).map((x) => Math.exp(x));
    const scores = powers.map((p) => p / powers.reduce((a, b) => a + b));
    const ranked = scores.map((score, i) => ({ label: `class ${i}`, score })).sort((a, b) => b.score - a.score);
    const near = (found: readonly { label: string; score: number }[]) =>
      found.map(({ label, score }) => ({ label, score: expect.closeTo(score, 5) }));
    expect(await classify(texts[0])).toEqual(near(ranked.slice(0, 1)));
    expect(await classify(texts[0], { top_k: null })).toEqual(near(ranked));
    expect(await classify(texts[0], { top_k: 2 })).toEqual(near(ranked.slice(0, 2)));
    const all = await classify(texts);
    expect(all).toHaveLength(3);
    expect(all[0]).toEqual(near(ranked.slice(0, 1))[0]);
    expect((await classify(texts, { top_k: 1 })).map((each) => each.length)).toEqual([1, 1, 1]);
    expect(await classify([])).toEqual([]);
    expect(await classify(texts[2], { truncation: true, max_length: 4 })).not.toEqual(await classify(texts[2]));
  });

  test.each([
    [{ problem_type: "multi_label_classification" }, 3, "sigmoid"],
    [{ problem_type: "single_label_classification" }, 3, "softmax"],
    [{ problem_type: "regression" }, 1, "none"],
    [{}, 1, "sigmoid"],
    [{}, 2, "softmax"],
  ] as const)("%j with %i classes applies %s", async (config, classes, name) => {
    const { classify, logits } = await classifier(config, classes);
    const raw = await logits(texts[1]);
    const scored = async (function_to_apply?: "softmax" | "sigmoid" | "none" | "default") => {
      const found = await classify(texts[1], { top_k: null, function_to_apply });
      return Array.from({ length: classes }, (_, i) => found.find(({ label }) => label === `class ${i}`)?.score ?? Number.NaN);
    };
    const sum = raw.reduce((total, x) => total + Math.exp(x), 0);
    const wanted = { none: raw, sigmoid: raw.map((x) => 1 / (1 + Math.exp(-x))), softmax: raw.map((x) => Math.exp(x) / sum) };
    expect(relativeError(await scored(), wanted[name])).toBeLessThan(1e-5);
    for (const given of ["none", "sigmoid", "softmax"] as const)
      expect(relativeError(await scored(given), wanted[given])).toBeLessThan(1e-5);
  });

  test("wrong options are named", async () => {
    const { classify } = await classifier({});
    const wrong: [object, string][] = [
      [{ return_all_scores: true }, "give top_k: null"],
      [{ top_k: 0 }, "top_k is 0"],
      [{ function_to_apply: "tanh" }, "function_to_apply is 'tanh'"],
      [{ topk: 1 }, "text-classification has no option 'topk'"],
      [{ max_length: -1 }, "max_length is -1"],
      [{ adapter: "nosuch" }, "there is no adapter 'nosuch'; none is loaded"],
    ];
    for (const [options, message] of wrong) await expect(classify(texts[0], options)).rejects.toThrow(message);
    await expect(classify({ text: "a", text_pair: "b" } as never)).rejects.toThrow("takes a text or a list of texts");
    const tokens = classify.model.config.maxPositions + 1;
    await expect(classify("a ".repeat(tokens))).rejects.toThrow(/the prompt has \d+ tokens/);
    const gone = AbortSignal.abort(new Error("left"));
    await expect(classify(texts, { signal: gone })).rejects.toThrow("left");
  });
});

test("what is no classifier, or one that does not fit, is refused in one line", async () => {
  const { folder: base, ids } = await openGoldens("moe-tiny");
  const fails = async (loading: Promise<unknown>, message: string | RegExp) => expect(loading).rejects.toThrow(message);
  const folder = await classifierFolder(base, 3);
  await fails(load(base), "has no head 'score', so it is no classifier");
  await fails(AutoModelForCausalLM.from_pretrained(folder), "is a classifier; load it with AutoModelForSequenceClassification");
  await fails(
    load(await classifierFolder(base, 3, { id2label: { 0: "a", 1: "b" } })),
    /id2label is 2, but the weights hold 3 rows of the head 'score'/,
  );
  await fails(
    load(await classifierFolder(base, 3, { id2label: { 0: "a", 1: "b", 3: "c" } })),
    "id2label has 3 entries, and that of 2 is missing",
  );
  await fails(
    load(await classifierFolder(base, 3, { problem_type: "ranking" })),
    'problem_type is "ranking"; it must be single_label_classification',
  );
  await fails(load(folder, { id2label: { 0: "a" } }), "id2label names 1 classes, and the model has 3");
  await fails(load(base, { adapter: await adapterFolder(base, 1) }), "has no head: there is no tensor score.weight");
  const dense = await openGoldens("dense-bias");
  const { folder: foreign } = await withHead(dense.folder, 3, false);
  await fails(load(base, { adapter: foreign }), "the head belongs to another base");
  await fails(load(foreign), "is an adapter that does not name its base");
  await fails(pipeline("summarization" as never), "unknown task 'summarization'; supported are text-generation and text-classification");

  const model = await load(folder);
  expect(() => model.engine.submit({ tokens: [1], sampling: {} as never, maxNewTokens: 1 })).toThrow("the model is a classifier");
  await fails(model.forward({ input_ids: [[]] }), "empty");
  await fails(model.forward({ input_ids: [[99999]] }), "outside the vocabulary");
  expect((await model.forward({ input_ids: [await ids(7)] })).logits.dims).toEqual([1, 3]);
});

test("a quantised classifier keeps its head in float32", async () => {
  const { folder: base, ids } = await openGoldens("moe-tiny");
  const folder = await classifierFolder(base, 3, {}, { bias: true });
  const out = join(temporary(), "int8");
  await quantize(folder, out, { dtype: "int8" });
  const rows = [await ids(33)];
  const model = await load(out, { dtype: "auto" });
  const near = relativeError((await model.forward({ input_ids: rows })).logits.data, await expected(base, rows, 3, true));
  expect(near).toBeLessThan(0.2);
  expect((await readHeader(join(out, "model.safetensors"))).tensors.get("score.weight")?.dtype).toBe("F32");
});
