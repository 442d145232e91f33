/** Serving on the device: company, cancellation, sampling, log-probabilities, constraints, embeddings, adapters, several models. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { before, describe, test } from "node:test";
import type { LoadedModel } from "../../src/api/load.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import type { Engine } from "../../src/engine/engine.ts";
import { GREEDY, type Sampling } from "../../src/engine/sampling.ts";
import { GOLDENS, openGoldens, relativeError } from "../goldens.ts";
import { answer, BUNDLED, CLOSE, DEVICE, dispose, load, loadOnCpu, tokens, until } from "./device.ts";

const FOLDER = join(GOLDENS, "moe-tiny");
const LORA = join(FOLDER, "lora-final");
const SAMPLED: Sampling = { ...GREEDY, temperature: 2, topK: 100, topP: 0.95, minP: 0.001, repetitionPenalty: 1.1, presencePenalty: 0.2 };
let prompts: number[][];
let greedy: (readonly number[])[];
let model: LoadedModel;
let engine: Engine;
let cpu: LoadedModel;
before(async () => {
  const goldens = await openGoldens("moe-tiny");
  prompts = await Promise.all(goldens.lengths.map((n) => goldens.ids(n)));
  greedy = goldens.lengths.map((n) => goldens.greedy[n]);
  model = await load(FOLDER);
  engine = model.engine;
  cpu = await loadOnCpu(FOLDER);
});

const allFree = () => until("all blocks of the cache are free", () => engine.cache.free === engine.cache.count);

test("the model says what computes", () => {
  const expected = DEVICE === "cpu" ? /^\w+, 1 thread$/ : DEVICE === "reference" ? /^reference, 1 thread$/ : /^cuda:\d+, \S/;
  assert.match(model.backend.device, expected);
});

test("64 requests at once, greedy and sampled, get the answers they get alone", async () => {
  const crowd = Array.from({ length: 64 }, (_, i) => ({
    tokens: prompts[i % prompts.length],
    sampling: i % 8 < 4 ? GREEDY : { ...SAMPLED, seed: i },
    maxNewTokens: 12 + (i % 16),
  }));
  const alone: number[][] = [];
  for (const request of crowd) alone.push(await answer(engine, request));
  assert.deepEqual(alone[1].slice(0, 13), greedy[1].slice(0, 13));
  assert.deepEqual(await Promise.all(crowd.map((request) => answer(engine, request))), alone);
  await allFree();
});

test("a cache that is too small for all: sequences are preempted, and answers stay the same", async () => {
  const small = await load(FOLDER, { kv_cache_tokens: 512, prefix_cache: false });
  const requests = Array.from({ length: 12 }, (_, i) => ({ tokens: prompts[1].slice(i % 3), maxNewTokens: 80 }));
  const alone: number[][] = [];
  for (const request of requests.slice(0, 3)) alone.push(await answer(engine, request));
  const answers = await Promise.all(requests.map((request) => answer(small.engine, request)));
  assert.deepEqual(
    answers,
    requests.map((_, i) => alone[i % 3]),
  );
  assert.ok(small.engine.stats().preemptions > 0);
  await dispose(small);
});

test("a prompt whose beginning is in the prefix cache gets the same answer", async () => {
  const longest = prompts.at(-1) as number[];
  const shared = await load(FOLDER);
  const first = await tokens(shared.engine, { tokens: longest });
  const second = await tokens(shared.engine, { tokens: longest });
  assert.equal(first[0].cachedTokens, 0);
  assert.ok((second[0].cachedTokens ?? 0) > 0);
  assert.deepEqual(
    second.map(({ id }) => id),
    greedy.at(-1),
  );
  await dispose(shared);
});

test("1,000 cancelled streams give their memory back, and the engine lives on", async () => {
  const cancel = async (i: number) => {
    const controller = new AbortController();
    const stream = engine.submit({ tokens: prompts[i % prompts.length], sampling: GREEDY, maxNewTokens: 200, signal: controller.signal });
    let seen = 0;
    try {
      for await (const _ of stream) {
        if (++seen <= i % 3) continue;
        if (i % 2 === 0) break;
        controller.abort(new Error("gone"));
      }
    } catch (error) {
      assert.equal((error as Error).message, "gone");
    }
    assert.ok(seen < 200);
  };
  for (let i = 0; i < 1000; i += 50) await Promise.all(Array.from({ length: 50 }, (_, j) => cancel(i + j)));
  await allFree();
  assert.deepEqual(await answer(engine, { tokens: prompts[1] }), greedy[1]);
});

describe("sampling", () => {
  test("a seed repeats its answer, another gives another", async () => {
    const sample = (seed: number) => answer(engine, { tokens: prompts[1], sampling: { ...SAMPLED, seed }, maxNewTokens: 40 });
    const first = await sample(7);
    assert.deepEqual(await sample(7), first);
    assert.notDeepEqual(await sample(8), first);
  });

  test("each seed draws the token that it draws on the CPU, but for ties within rounding", async () => {
    const draw = (of: LoadedModel, seed: number) =>
      answer(of.engine, { tokens: prompts[2], sampling: { ...SAMPLED, seed }, maxNewTokens: 1 });
    const seeds = Array.from({ length: 200 }, (_, i) => i);
    const [here, there] = await Promise.all([model, cpu].map((of) => Promise.all(seeds.map((seed) => draw(of, seed)))));
    const same = here.filter(([id], i) => id === there[i][0]).length;
    assert.ok(new Set(here.map(([id]) => id)).size > 20);
    assert.ok(same >= 196, `${same} of 200 are the same`);
  });
});

test("log-probabilities are the CPU's", async () => {
  const request = { tokens: prompts[2], topLogprobs: 5 };
  const [here, there] = [await tokens(engine, request), await tokens(cpu.engine, request)];
  assert.deepEqual(
    here.map(({ id }) => id),
    there.map(({ id }) => id),
  );
  for (const [i, { logprob, top = [] }] of here.entries()) {
    assert.ok(Math.abs(logprob - there[i].logprob) < 2e-3, `token ${i}: ${logprob}, not ${there[i].logprob}`);
    assert.equal(top.length, 5);
    assert.ok(Math.abs(top[0].logprob - logprob) < 1e-6);
    top.forEach((t, j) => {
      assert.ok(Math.abs(t.logprob - (there[i].top?.[j].logprob ?? Number.NaN)) < 2e-3);
      assert.ok(j === 0 || t.logprob <= top[j - 1].logprob);
    });
  }
});

test("the experts of each generated token are the CPU's", async () => {
  const request = { tokens: prompts[2], wantRouting: true };
  const [here, there] = [await tokens(engine, request), await tokens(cpu.engine, request)];
  assert.deepEqual(
    here.map(({ routing }) => routing?.experts),
    there.map(({ routing }) => routing?.experts),
  );
  assert.ok((here[0].routing?.experts.length ?? 0) > 0);
});

test("a constraint allows only its tokens", async () => {
  const words = Math.ceil(model.config.vocabSize / 32);
  const allowed = new Set([3, 64, 65, 200, 411]);
  const mask = new Int32Array(words);
  for (const id of allowed) mask[id >> 5] |= 1 << (id & 31);
  for (const sampling of [GREEDY, { ...SAMPLED, seed: 3 }]) {
    const accepted: number[] = [];
    const constraint = { next: () => mask, accept: (id: number) => void accepted.push(id) };
    const ids = await answer(engine, { tokens: prompts[1], sampling, constraint, maxNewTokens: 20 });
    assert.equal(ids.length, 20);
    assert.deepEqual(accepted, ids);
    assert.ok(
      ids.every((id) => allowed.has(id)),
      String(ids),
    );
  }
});

test("embeddings are the CPU's", async () => {
  for (const prompt of prompts) {
    const error = relativeError(await engine.embed(prompt), await cpu.engine.embed(prompt));
    assert.ok(error < CLOSE, `${prompt.length} tokens differ by ${error}`);
  }
});

test("an adapter served beside the base: each request gets its own answer, in the same steps", async () => {
  const options = { dtype: "fp32", kv_cache_tokens: 8192, threads: 1 };
  const [here, there] = await Promise.all(
    [DEVICE, "cpu"].map((device) => AutoModelForCausalLM.from_pretrained(FOLDER, { ...options, device })),
  );
  for (const each of [here, there]) await each.load_adapter(LORA, { adapter_name: "tuned" });
  for (const prompt of prompts)
    for (const watch of [{}, { adapter: "tuned" }]) {
      const [a, b] = await Promise.all([here, there].map(async ({ engine: e }) => (await e.inspect(prompt, {}, watch)).logits));
      const error = relativeError(a, b);
      assert.ok(error < CLOSE, `${prompt.length} tokens ${JSON.stringify(watch)} differ by ${error}`);
    }
  const requests = Array.from({ length: 24 }, (_, i) => ({
    tokens: prompts[i % prompts.length],
    ...(i % 3 === 0 ? {} : { adapter: "tuned" }),
  }));
  const alone: number[][] = [];
  for (const request of requests) alone.push(await answer(there.engine, request));
  assert.notDeepEqual(alone[0], alone[4]); // the same prompt without and with the adapter
  assert.deepEqual(await Promise.all(requests.map((request) => answer(here.engine, request))), alone);
  here.delete_adapter("tuned");
  assert.deepEqual(await answer(here.engine, { tokens: prompts[1] }), greedy[1]);
  await here.dispose();
  await there.dispose();
});

test("several models on one device answer at the same time", async () => {
  const variants = ["dense-tiny", "moe-bias", "moe-ragged"];
  const goldens = await Promise.all(variants.map((variant) => openGoldens(variant)));
  const models = await Promise.all(goldens.map(({ folder }) => load(folder)));
  const asked = models.flatMap(({ engine: e }, m) => goldens[m].lengths.map((n) => ({ e, m, n })));
  const answers = await Promise.all(asked.map(async ({ e, m, n }) => answer(e, { tokens: await goldens[m].ids(n) })));
  assert.deepEqual(
    answers,
    asked.map(({ m, n }) => goldens[m].greedy[n]),
  );
  await dispose(...models);
  assert.deepEqual(await answer(engine, { tokens: prompts[1] }), greedy[1]); // the one that was there before lives on
});

for (const dtype of ["bf16", "fp16", "int8", "int4"])
  for (const kv_cache_dtype of DEVICE.startsWith("cuda") ? ["bf16", "fp16", "int8", "fp8"] : ["fp16", "int8"])
    test(`${dtype} weights with a cache of ${kv_cache_dtype}: answers as long as asked, and the same again`, async () => {
      const small = await load(BUNDLED, { dtype, kv_cache_dtype: kv_cache_dtype as "fp16" });
      const prompt = (await AutoTokenizer.from_pretrained("default")).apply_chat_template([{ role: "user", content: "Who are you?" }], {
        add_generation_prompt: true,
      });
      const first = await answer(small.engine, { tokens: prompt, maxNewTokens: 32 });
      assert.equal(first.length, 32);
      assert.deepEqual(await answer(small.engine, { tokens: prompt, maxNewTokens: 32 }), first);
      await dispose(small);
    });

test("the bundled model answers in the form of a schema", async () => {
  const tokenizer = await AutoTokenizer.from_pretrained("default");
  const bundled = await AutoModelForCausalLM.from_pretrained("default", { device: DEVICE, threads: 1, kv_cache_tokens: 4096 });
  const ids = tokenizer.apply_chat_template([{ role: "user", content: "Who are you?" }], { add_generation_prompt: true });
  const schema = {
    type: "object",
    properties: { name: { type: "string", maxLength: 4 }, age: { type: "integer", minimum: 0, maximum: 120 } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const response_format = { type: "json_schema", json_schema: { name: "answer", schema } } as const;
  const common = { input_ids: [ids], tokenizer, response_format, max_new_tokens: 200 };
  const [sure] = await bundled.generate({ ...common, do_sample: false });
  const rows = [sure, ...(await bundled.generate({ ...common, do_sample: true, temperature: 2, num_return_sequences: 4, seed: 5 }))];
  for (const row of rows) {
    const value = JSON.parse(tokenizer.decode(row.slice(ids.length), { skip_special_tokens: true }));
    assert.deepEqual(Object.keys(value), ["name", "age"]);
    assert.ok([...value.name].length <= 4);
    assert.ok(Number.isInteger(value.age) && value.age >= 0 && value.age <= 120);
  }
  await bundled.dispose();
});
