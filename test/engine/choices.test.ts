/** Alternatives and routing returned with tokens, masks that restrict their choice, and the effect of a bad constraint. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type LoadedModel, loadModel } from "../../src/api/load.ts";
import type { Engine } from "../../src/engine/engine.ts";
import { GREEDY, type Sampling } from "../../src/engine/sampling.ts";
import type { Constraint, GeneratedToken, Request } from "../../src/engine/sequence.ts";
import { type Goldens, openGoldens } from "../goldens.ts";

const SAMPLED: Sampling = { ...GREEDY, temperature: 1.5, seed: 3 };
const VOCAB = 512;

describe.each([
  ["native", { device: "cpu" }],
  ["reference", { device: "reference" }],
])("%s", (_name, options) => {
  let goldens: Goldens;
  let model: LoadedModel;
  let engine: Engine;
  let prompt: number[];
  beforeAll(async () => {
    goldens = await openGoldens("moe-tiny");
    model = await loadModel(goldens.folder, { ...options, dtype: "fp32", threads: 1, kv_cache_tokens: 2048 });
    engine = model.engine;
    prompt = await goldens.ids(7);
  });
  afterAll(() => engine.dispose());

  async function generate(request: Partial<Request> = {}): Promise<GeneratedToken[]> {
    const tokens: GeneratedToken[] = [];
    for await (const token of engine.submit({ tokens: prompt, sampling: GREEDY, maxNewTokens: 6, ...request })) tokens.push(token);
    return tokens;
  }
  const idsOf = (tokens: readonly GeneratedToken[]) => tokens.map((t) => t.id);

  test.each([1, 5, 20, VOCAB])("the %i likeliest tokens match the logits, in order", async (topLogprobs) => {
    const tokens = await generate({ topLogprobs });
    const { logits } = await engine.inspect([...prompt, ...idsOf(tokens)]);
    tokens.forEach(({ id, logprob, top = [] }, t) => {
      const row = [...logits.subarray((prompt.length - 1 + t) * VOCAB, (prompt.length + t) * VOCAB)];
      const total = Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0));
      const best = [...row.keys()].sort((a, b) => row[b] - row[a] || a - b).slice(0, topLogprobs);
      expect(top.map((x) => x.id)).toEqual(best);
      for (const x of top) expect(x.logprob).toBeCloseTo(row[x.id] - total, 4);
      expect([id, logprob]).toEqual([best[0], expect.closeTo(top[0].logprob, 5)]);
    });
  });

  test("concurrent requests each get the number of alternatives they asked for", async () => {
    const [none, three, nine] = await Promise.all([generate(), generate({ topLogprobs: 3 }), generate({ topLogprobs: 9 })]);
    expect(none.every((t) => t.top === undefined)).toBe(true);
    expect(three.map((t) => t.top?.length)).toEqual(three.map(() => 3));
    nine.forEach((t, i) => {
      expect(t.top?.length).toBe(9);
      expect(t.top?.slice(0, 3).map((x) => x.id)).toEqual(three[i].top?.map((x) => x.id));
    });
  });

  test("more alternatives than the vocabulary has are an error", () => {
    expect(() => engine.submit({ tokens: prompt, sampling: GREEDY, maxNewTokens: 1, topLogprobs: VOCAB + 1 })).toThrow(
      "topLogprobs is 513; it must be a whole number from 0 to the vocabulary's 512",
    );
  });

  test("routing belongs to the position that each token was predicted from, and does not affect other requests", async () => {
    const [tokens, plain] = await Promise.all([generate({ wantRouting: true }), generate()]);
    expect(plain.every((t) => t.routing === undefined)).toBe(true);
    const { routing, logits } = await engine.inspect([...prompt, ...idsOf(tokens)], { logits: false, routing: true });
    expect(logits.length).toBe(0);
    tokens.forEach((token, t) => {
      const at = prompt.length - 1 + t;
      routing.forEach((layer, l) => {
        const k = layer.experts.length / (prompt.length + tokens.length);
        expect(token.routing?.experts.subarray(l * k, (l + 1) * k)).toEqual(layer.experts.subarray(at * k, (at + 1) * k));
        expect(token.routing?.weights.subarray(l * k, (l + 1) * k)).toEqual(layer.weights.subarray(at * k, (at + 1) * k));
      });
      expect(token.routing?.experts.length).toBe(routing.length * 2);
    });
  });

  /** Allows the ids for which `allows` holds, and records the tokens it receives. */
  function only(allows: (id: number, step: number) => boolean): Constraint & { readonly told: number[]; asked: number } {
    const told: number[] = [];
    return {
      told,
      asked: 0,
      next() {
        this.asked++;
        const mask = new Int32Array(VOCAB / 32);
        for (let id = 0; id < VOCAB; id++) if (allows(id, told.length)) mask[id >> 5] |= 1 << (id & 31);
        return mask;
      },
      accept: (id) => void told.push(id),
    };
  }

  test.each([
    ["greedy", GREEDY],
    ["sampled", SAMPLED],
    ["sampled from the best", { ...SAMPLED, topK: 4, topP: 0.9 }],
  ])("%s: masks are obeyed, and other requests are unaffected", async (_kind, sampling) => {
    const constraint = only((id, step) => id % 7 === step % 7);
    const [free, bound] = await Promise.all([generate({ maxNewTokens: 14 }), generate({ maxNewTokens: 14, sampling, constraint })]);
    expect(idsOf(free)).toEqual(goldens.greedy[7].slice(0, 14));
    expect(idsOf(bound).map((id) => id % 7)).toEqual(Array.from({ length: 14 }, (_, i) => i % 7));
    expect(constraint.told).toEqual(idsOf(bound));
    expect(constraint.asked).toBe(14);
    // Log-probabilities are the model's own, over all tokens.
    const { logits } = await engine.inspect([...prompt, ...idsOf(bound)]);
    bound.forEach(({ id, logprob }, t) => {
      const row = logits.subarray((prompt.length - 1 + t) * VOCAB, (prompt.length + t) * VOCAB);
      expect(logprob).toBeCloseTo(row[id] - Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0)), 3);
    });
  });

  test("greedy under a mask picks the best allowed token", async () => {
    const [{ id }] = await generate({ maxNewTokens: 1, constraint: only((each) => each % 2 === 1 && each !== 5) });
    const { logits } = await engine.inspect(prompt);
    const row = [...logits.subarray((prompt.length - 1) * VOCAB)];
    const allowed = [...row.keys()].filter((each) => each % 2 === 1 && each !== 5);
    expect(id).toBe(allowed.reduce((a, b) => (row[b] > row[a] ? b : a)));
  });

  test("no mask, and a mask that resolves later", async () => {
    const open: Constraint = { next: async () => null, accept() {} };
    expect(idsOf(await generate({ constraint: open }))).toEqual(goldens.greedy[7].slice(0, 6));
  });

  test.each<[string, Partial<Constraint>, RegExp]>([
    ["throws", { next: () => fail("no rule for this") }, /^no rule for this$/],
    ["rejects", { next: async () => fail("no rule, later") }, /^no rule, later$/],
    ["does not accept", { accept: () => fail("not what I allowed") }, /^not what I allowed$/],
    ["allows nothing", { next: () => new Int32Array(VOCAB / 32) }, /^no token is left to choose/],
    ["has another vocabulary", { next: () => new Int32Array(3) }, /^the constraint's mask has 3 words; 512 tokens take 16$/],
  ])("a constraint that %s fails its own request only", async (_what, faulty, message) => {
    const constraint: Constraint = { next: () => null, accept() {}, ...faulty };
    const results = await Promise.allSettled([generate(), generate({ constraint }), generate()]);
    expect(results.map((r) => r.status)).toEqual(["fulfilled", "rejected", "fulfilled"]);
    expect((results[1] as PromiseRejectedResult).reason.message).toMatch(message);
    await expect.poll(() => engine.cache.free).toBe(engine.cache.count);
  });

  test("biases that rule out every token fail the request, not the step", async () => {
    const logitBias = new Map(Array.from({ length: VOCAB }, (_, id) => [id, Number.NEGATIVE_INFINITY]));
    const results = await Promise.allSettled([generate({ sampling: { ...GREEDY, logitBias } }), generate()]);
    expect(results.map((r) => r.status)).toEqual(["rejected", "fulfilled"]);
  });
});

function fail(message: string): never {
  throw new Error(message);
}

test("a constraint receives each token once, even if its sequence is recomputed", async () => {
  const goldens = await openGoldens("moe-tiny");
  const { engine } = await loadModel(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 192 });
  const told: number[][] = [];
  const answers = await Promise.all(
    Array.from({ length: 8 }, async (_, i) => {
      const heard: number[] = [];
      told.push(heard);
      const ids: number[] = [];
      const constraint: Constraint = { next: () => null, accept: (id) => void heard.push(id) };
      const tokens = await goldens.ids(33);
      for await (const { id } of engine.submit({ tokens: [i + 3, ...tokens], sampling: GREEDY, maxNewTokens: 40, constraint }))
        ids.push(id);
      return ids;
    }),
  );
  expect(engine.stats().preemptions).toBeGreaterThan(0);
  expect(told).toEqual(answers);
  expect(answers.map((ids) => ids.length)).toEqual(answers.map(() => 40));
  await engine.dispose();
});
