/** Classifiers on the server: vLLM's requests and responses, gRPC, shared steps, and what they refuse. */
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { AutoModelForSequenceClassification } from "../../src/api/classifier.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { adapterFolder } from "../adapterfolder.ts";
import { classifierFolder } from "../classifierfolder.ts";
import { relativeError } from "../goldens.ts";
import { ask, startGrpcHere } from "./grpc/reflected.ts";
import { post, startHere } from "./start.ts";

const BASE = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const TEXTS = ["The soup was cold.", "Wonderful!", "It is a long story of a journey through the mountains, told by two friends."];

async function served(config: object = {}, model: object = {}) {
  const folder = await classifierFolder(BASE, 3, config);
  const running = await startHere({ models: [{ name: "mood", path: folder, kvCacheTokens: 8192, threads: 1, ...model }] });
  const own = await AutoModelForSequenceClassification.from_pretrained(folder, { threads: 1, kv_cache_tokens: 4096 });
  const tokenizer = await AutoTokenizer.from_pretrained(folder, {});
  const rows = TEXTS.map((text) => tokenizer.encode(text));
  const logits = await own.classify(rows);
  await own.dispose();
  return { ...running, folder, rows, logits };
}

interface Reply {
  readonly data: { index: number; label: string; probs: number[]; num_classes: number }[];
  readonly usage: { prompt_tokens: number };
  readonly error: { message: string; param: string | null; code: string };
}

const asked = async (url: string, path: string, body: object) => (await (await post(url, path, body)).json()) as Reply;

const softmax = (logits: Float32Array) => {
  const powers = [...logits].map((x) => Math.exp(x));
  return powers.map((p) => p / powers.reduce((a, b) => a + b));
};

test.each(["/v1/classify", "/classify"])("POST %s answers as vLLM does", async (path) => {
  const { url, rows, logits } = await served();
  const reply = await asked(url, path, { model: "mood", input: TEXTS, user: "ignored", priority: 0 });
  expect(reply).toMatchObject({
    id: expect.stringMatching(/^classify-[0-9a-f]{32}$/),
    object: "list",
    created: expect.any(Number),
    model: "mood",
    usage: { prompt_tokens: rows.flat().length, total_tokens: rows.flat().length, completion_tokens: 0, prompt_tokens_details: null },
  });
  expect(Object.keys(reply).sort()).toEqual(["created", "data", "id", "model", "object", "usage"]);
  reply.data.forEach((each, i) => {
    const wanted = softmax(logits[i]);
    expect(Object.keys(each)).toEqual(["index", "label", "probs", "num_classes"]);
    expect([each.index, each.num_classes]).toEqual([i, 3]);
    expect(relativeError(each.probs, wanted)).toBeLessThan(1e-6);
    expect(each.label).toBe(`class ${wanted.indexOf(Math.max(...wanted))}`);
  });
  const one = await asked(url, path, { model: "mood", input: TEXTS[1] });
  expect(one.data).toEqual([{ ...reply.data[1], index: 0 }]); // alone as in a batch, to the bit
  const ids = await asked(url, path, { model: "mood", input: rows.slice(1) });
  expect(ids.data.map((d) => d.probs)).toEqual(reply.data.slice(1).map((d) => d.probs));
  for (const name of ["use_activation", "activation", "softmax"]) {
    const raw = await asked(url, path, { model: "mood", input: TEXTS[0], [name]: false });
    expect(relativeError(raw.data[0].probs, [...logits[0]])).toBeLessThan(1e-6);
  }
});

test("texts that are cut keep their last tokens, or their first", async () => {
  const { url, rows } = await served();
  const of = async (fields: object) => {
    const { data, usage } = await asked(url, "/v1/classify", { model: "mood", ...fields });
    return { probs: data[0].probs, tokens: usage.prompt_tokens };
  };
  expect(await of({ input: TEXTS[2], truncate_prompt_tokens: 4 })).toEqual(await of({ input: rows[2].slice(-4) }));
  expect(await of({ input: TEXTS[2], truncate_prompt_tokens: 4, truncation_side: "right" })).toEqual(
    await of({ input: rows[2].slice(0, 4) }),
  );
  expect(await of({ input: TEXTS[2], truncate_prompt_tokens: 4000 })).toEqual(await of({ input: rows[2] }));
  const long = "a ".repeat(6000);
  expect((await of({ input: long, truncate_prompt_tokens: -1 })).tokens).toBeGreaterThan(1000);
  const refused = await post(url, "/v1/classify", { model: "mood", input: long });
  expect([refused.status, ((await refused.json()) as Reply).error.code]).toEqual([400, "context_length_exceeded"]);
});

test("wrong requests are named, and classifiers and other models are told apart", async () => {
  const { url, client } = await served({}, {});
  const wrong: [object, number, string | null, string][] = [
    [{}, 400, "input", "input"],
    [{ input: [] }, 400, "input", "input"],
    [{ input: new Array(257).fill("a") }, 400, "input", "256"],
    [{ input: "a", truncate_prompt_tokens: 0 }, 400, "truncate_prompt_tokens", "at least one token"],
    [{ input: "a", messages: [] }, 400, "messages", "send the text as 'input'"],
    [{ input: [[99999999]] }, 400, "input[0]", "outside the vocabulary"],
  ];
  for (const [fields, status, param, message] of wrong) {
    const reply = await post(url, "/v1/classify", { model: "mood", ...fields });
    const { error } = (await reply.json()) as Reply;
    expect([reply.status, error.param], JSON.stringify(fields).slice(0, 100)).toEqual([status, param]);
    expect(error.message).toContain(message);
  }
  await expect(client.completions.create({ model: "mood", prompt: "Hello" })).rejects.toMatchObject({
    status: 400,
    message: expect.stringContaining("the model is a classifier"),
  });
  const base = await startHere();
  const reply = await post(base.url, "/v1/classify", { model: "default", input: "Hello" });
  expect([reply.status, ((await reply.json()) as Reply).error.message]).toEqual([
    400,
    "the model 'default' is no classifier: it predicts tokens",
  ]);
});

test("a config's labels and problem, adapters of a classifier by name, and gRPC", async () => {
  const folder = await classifierFolder(BASE, 3);
  const shop = await adapterFolder(BASE, 3, {}, 0.3);
  const model = {
    name: "mood",
    path: folder,
    kvCacheTokens: 8192,
    threads: 1,
    labels: ["bad", "fine", "good"],
    problemType: "multi_label_classification",
  };
  const { url, client } = await startGrpcHere({ models: [{ ...model, adapters: { shop } }] });
  const classes = async (name: string) => (await asked(url, "/v1/classify", { model: name, input: TEXTS[0] })).data[0];
  const [plain, adapted] = await Promise.all([classes("mood"), classes("mood:shop")]);
  expect(["bad", "fine", "good"]).toContain(plain.label);
  expect(plain.probs.reduce((a: number, b: number) => a + b)).not.toBeCloseTo(1, 3); // sigmoid of each
  expect(relativeError(adapted.probs, plain.probs)).toBeGreaterThan(1e-4);
  const request = { model: "mood:shop", inputs: TEXTS.map((text) => ({ text })) };
  const { results, prompt_tokens } = (await ask(client, "Classify" as never, request)) as {
    results: { label: string; scores: number[] }[];
    prompt_tokens: number;
  };
  expect(results).toHaveLength(3);
  expect(prompt_tokens).toBeGreaterThan(10);
  expect(relativeError(results[0].scores, adapted.probs)).toBeLessThan(1e-6);
});
