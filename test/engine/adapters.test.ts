/** Adapters in the engine: rows with different ones share a step, and each computes the same as alone and as merged weights. */
import { afterEach, describe, expect, test } from "vitest";
import { type LoadedModel, type LoadOptions, loadModel } from "../../src/api/load.ts";
import type { Branch, Branches } from "../../src/engine/engine.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import type { Request } from "../../src/engine/sequence.ts";
import { elements } from "../../src/tensor/shape.ts";
import { noise } from "../backend/builder.ts";
import { openGoldens, relativeError } from "../goldens.ts";

const open: LoadedModel[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((m) => m.engine.dispose()));
});

async function load(options: LoadOptions = {}, variant = "moe-tiny") {
  const goldens = await openGoldens(variant);
  const model = await loadModel(goldens.folder, { dtype: "fp32", kv_cache_tokens: 2048, threads: 2, ...options });
  open.push(model);
  return { ...model, engine: model.engine, tokens: await goldens.ids(130) };
}

/** Branches of repeatable noise, large enough to change answers. */
function branches({ engine }: Pick<LoadedModel, "engine">, rank: number, seed: number, accepts: (module: string) => boolean): Branches {
  const matrices = engine.model.parameters.map(({ name }) => name.replace(/\.weight$/, "")).filter((module) => /_proj$/.test(module));
  const modules = new Set([...matrices, "model.embed_tokens", "lm_head"].filter(accepts));
  const found = new Map<string, Branch>();
  const { parameters } = engine.model.stacked({ count: 1, rank, modules });
  parameters
    .filter((p) => p.kind === "adapter")
    .forEach((p, i) => {
      const { module = "", part, rankLast } = p.branch ?? {};
      const values = noise(elements(p.shape), seed * 1000 + i).map((x) => x * 0.2);
      const branch = found.get(module) ?? { rank, scale: 1 / 3, experts: p.experts ?? 1, a: values, b: values };
      found.set(module, part === "a" ? { ...branch, a: values, ...(rankLast ? { table: true } : {}) } : { ...branch, b: values });
    });
  return found;
}

const ATTENTION = (module: string) => module.includes("self_attn");
const EXPERTS = (module: string) => module.includes(".mlp.");
const VOCABULARY = (module: string) => /^(model\.embed_tokens|lm_head)$/.test(module);
const EVERYTHING = () => true;

async function answer({ engine }: Pick<LoadedModel, "engine">, request: Partial<Request> & Pick<Request, "tokens">, most = 12) {
  const [ids, logprobs, cached]: [number[], number[], number[]] = [[], [], []];
  for await (const token of engine.submit({ sampling: GREEDY, maxNewTokens: most, ...request })) {
    ids.push(token.id);
    logprobs.push(token.logprob);
    if (token.cachedTokens !== undefined) cached.push(token.cachedTokens);
  }
  return { ids, logprobs, cached: cached[0] };
}

const logits = async ({ engine }: Pick<LoadedModel, "engine">, tokens: readonly number[], adapter?: string) =>
  (await engine.inspect(tokens, {}, { adapter })).logits;

describe.each([
  ["moe-tiny", "cpu", 512],
  ["moe-tiny", "cpu", 7],
  ["dense-tiny", "cpu", 512],
  ["moe-ragged", "cpu", 512],
  ["dense-bias", "cpu", 512],
  ["moe-tiny", "reference", 512],
])("%s on %s, %i rows a step", (variant, device, chunk_size) => {
  test("answers of four adapters and the base in the same steps equal those alone", async () => {
    const model = await load({ device, chunk_size, prefix_cache: false }, variant);
    await model.engine.loadAdapter("attention", branches(model, 4, 1, ATTENTION));
    await model.engine.loadAdapter("experts", branches(model, 3, 2, EXPERTS));
    await model.engine.loadAdapter("everything", branches(model, 20, 3, EVERYTHING));
    await model.engine.loadAdapter(
      "half",
      branches(model, 8, 4, (m) => m.endsWith("up_proj") || m.includes("layers.1.")),
    );
    await model.engine.loadAdapter("vocabulary", branches(model, 5, 5, VOCABULARY));
    const tokens = model.tokens.slice(0, device === "reference" ? 20 : 60);
    const most = device === "reference" ? 3 : 12;
    const each = [undefined, "attention", "experts", undefined, "everything", "half", "vocabulary"].map((adapter, i) => ({
      tokens: tokens.slice(i),
      adapter,
    }));
    const alone: Awaited<ReturnType<typeof answer>>[] = [];
    for (const request of each) alone.push(await answer(model, request, most));
    const together = await Promise.all(each.map((request) => answer(model, request, most)));
    // To the bit. Only heads that end within a vector depend on how a busy machine chunks prompts, adapters or not (docs/LOG.md).
    const exact = variant.endsWith("-tiny");
    if (exact) expect(together).toEqual(alone);
    together.forEach(({ ids, logprobs }, i) => {
      expect(ids).toEqual(alone[i].ids);
      expect(relativeError(logprobs, alone[i].logprobs)).toBeLessThan(1e-4);
    });
    expect(new Set(alone.map((a) => String(a.logprobs))).size).toBe(each.length); // the adapters do something
    const steps = model.engine.stats();
    expect(steps.rows).toBeGreaterThan(steps.steps); // and they did share steps
  });
});

test("a branch beside a matrix computes what merged weights compute, in each format of the base", async () => {
  const plain = await load();
  const adapter = branches(plain, 5, 7, EVERYTHING);
  const reference = await load({ device: "reference" });
  const tokens = plain.tokens.slice(0, 24);
  await plain.engine.loadAdapter("a", adapter);
  await reference.engine.loadAdapter("a", adapter);
  const expected = await logits(reference, tokens, "a");
  expect(relativeError(await logits(plain, tokens, "a"), expected)).toBeLessThan(1e-5);
  expect(relativeError(await logits(plain, tokens), expected)).toBeGreaterThan(1e-2);
  const base = await logits(reference, tokens);
  for (const dtype of ["bf16", "int8"] as const) {
    const rounded = await load({ dtype });
    await rounded.engine.loadAdapter("a", adapter);
    const own = relativeError(await logits(rounded, tokens), base); // what the base alone loses to rounding
    expect(relativeError(await logits(rounded, tokens, "a"), expected), dtype).toBeLessThan(3 * own);
  }
});

test("the base computes the same programs before and after adapters are loaded, and beside them", async () => {
  const model = await load({ prefix_cache: false });
  const before = await answer(model, { tokens: model.tokens });
  const ops = [...model.engine.profile().keys()].sort();
  await model.engine.loadAdapter("a", branches(model, 8, 1, EVERYTHING));
  expect(await answer(model, { tokens: model.tokens })).toEqual(before);
  expect([...model.engine.profile().keys()].sort()).toEqual(ops); // no op of an adapter
  const [base] = await Promise.all([answer(model, { tokens: model.tokens }), answer(model, { tokens: model.tokens, adapter: "a" })]);
  expect(base).toEqual(before);
  expect([...model.engine.profile().keys()]).toContain("addRows");
});

test("loading another adapter, of a larger rank and for other modules, changes no answer by a bit", async () => {
  const model = await load({ prefix_cache: false });
  await model.engine.loadAdapter("first", branches(model, 3, 1, ATTENTION));
  const request = { tokens: model.tokens, adapter: "first" };
  const before = await answer(model, request);
  const { bytes } = model.engine.adapters;
  await model.engine.loadAdapter("second", branches(model, 40, 2, EVERYTHING));
  expect(model.engine.adapters.bytes).toBeGreaterThan(bytes);
  expect(await answer(model, request)).toEqual(before);
  const back = model.engine.adapterBranches("first");
  const given = branches(model, 3, 1, ATTENTION);
  expect([...back.keys()].sort()).toEqual([...given.keys()].sort());
  for (const [module, { rank, a, b }] of back) {
    expect(rank).toBe(3);
    expect(a).toEqual(given.get(module)?.a);
    expect(relativeError(b, given.get(module)?.b ?? [])).toBeLessThan(1e-6);
  }
});

test("a name that is given to another adapter, or deleted, leaves requests that began before as they are", async () => {
  const model = await load({ prefix_cache: false });
  const tokens = model.tokens.slice(0, 40);
  await model.engine.loadAdapter("a", branches(model, 4, 1, EVERYTHING));
  const alone = await answer(model, { tokens, adapter: "a" }, 40);
  const stream = model.engine.submit({ tokens, adapter: "a", sampling: GREEDY, maxNewTokens: 40 });
  const ids = [(await stream.next()).value?.id];
  await model.engine.loadAdapter("a", branches(model, 4, 2, EVERYTHING));
  const other = await answer(model, { tokens, adapter: "a" }, 40);
  model.engine.deleteAdapter("a");
  expect(() => model.engine.submit({ tokens, adapter: "a", sampling: GREEDY, maxNewTokens: 1 })).toThrow(
    "there is no adapter 'a'; none is loaded",
  );
  await model.engine.loadAdapter("b", branches(model, 4, 3, ATTENTION));
  for await (const token of stream) ids.push(token.id);
  expect(ids).toEqual(alone.ids);
  expect(other.ids).not.toEqual(alone.ids);
});

test("slots of deleted adapters are used again, without what they held", async () => {
  const model = await load({ prefix_cache: false, max_loras: 2 });
  await model.engine.loadAdapter("only", branches(model, 4, 9, ATTENTION));
  const alone = await answer(model, { tokens: model.tokens, adapter: "only" });
  const { bytes } = model.engine.adapters;
  model.engine.deleteAdapter("only");
  for (let i = 0; i < 5; i++) {
    await model.engine.loadAdapter("other", branches(model, 4, i, EVERYTHING));
    model.engine.deleteAdapter("other");
    await model.engine.loadAdapter("only", branches(model, 4, 9, ATTENTION));
    expect(await answer(model, { tokens: model.tokens, adapter: "only" })).toEqual(alone);
    model.engine.deleteAdapter("only");
  }
  expect(model.engine.adapters.bytes).toBeLessThan(bytes * 10); // more modules, not more places
  await model.engine.loadAdapter("one", branches(model, 4, 1, ATTENTION));
  await model.engine.loadAdapter("two", branches(model, 4, 1, ATTENTION));
  await expect(model.engine.loadAdapter("three", branches(model, 4, 1, ATTENTION))).rejects.toThrow(
    "2 adapters are loaded, and max_loras is 2; delete one first, or raise it",
  );
  await model.engine.loadAdapter("two", branches(model, 4, 2, ATTENTION)); // in place of another
});

test("the prefix cache never gives blocks of one adapter to another or to the base", async () => {
  const model = await load();
  await model.engine.loadAdapter("a", branches(model, 4, 1, EVERYTHING));
  await model.engine.loadAdapter("b", branches(model, 4, 2, EVERYTHING));
  const ask = (adapter?: string) => answer(model, { tokens: model.tokens, adapter });
  const first = [await ask(), await ask("a"), await ask("b")];
  expect(first.map((f) => f.cached)).toEqual([0, 0, 0]);
  const again = [await ask("b"), await ask(), await ask("a")];
  expect(again.map((f) => f.cached)).toEqual([128, 128, 128]);
  expect(again.map((f) => f.ids)).toEqual([first[2].ids, first[0].ids, first[1].ids]);
  await model.engine.loadAdapter("a", branches(model, 4, 3, EVERYTHING));
  const replaced = await ask("a");
  expect(replaced.cached).toBe(0);
  expect(replaced.ids).not.toEqual(first[1].ids);
});

test("under preemption, with little room, adapted answers are those of much room", async () => {
  const much = await load({ prefix_cache: true });
  const little = await load({ prefix_cache: true, kv_cache_tokens: 192, chunk_size: 16 });
  const requests = Array.from({ length: 6 }, (_, i) => ({ tokens: much.tokens.slice(i, i + 50), adapter: [undefined, "a", "b"][i % 3] }));
  const answers = [];
  for (const model of [much, little]) {
    await model.engine.loadAdapter("a", branches(model, 4, 1, EVERYTHING));
    await model.engine.loadAdapter("b", branches(model, 6, 2, EXPERTS));
    answers.push((await Promise.all(requests.map((r) => answer(model, r, 30)))).map((a) => a.ids));
  }
  expect(answers[1]).toEqual(answers[0]);
  expect(little.engine.stats().preemptions).toBeGreaterThan(0);
});

describe("an adapter that does not fit is refused by name, and the engine goes on", () => {
  test.each<[string, (all: Map<string, Branch>, module: string, branch: Branch) => void, string]>([
    ["another base", (all, _, branch) => all.set("model.layers.9.self_attn.q_proj", branch), "no module model.layers.9.self_attn.q_proj"],
    [
      "a wrong width",
      (all, module, branch) => all.set(module, { ...branch, a: branch.a.subarray(4) }),
      "lora_A has 252 numbers, and this model needs 256",
    ],
    [
      "NaN",
      (all, module, branch) => all.set(module, { ...branch, b: branch.b.map((x, i) => (i === 7 ? Number.NaN : x)) }),
      "lora_B holds NaN, element 7",
    ],
    ["a scale that is not finite", (all, module, branch) => all.set(module, { ...branch, scale: Infinity }), "has the scale Infinity"],
    [
      "a huge rank",
      (all, module, branch) => all.set(module, { ...branch, rank: 2 ** 30 }),
      "has rank 1073741824, and max_lora_rank is 256",
    ],
    ["nothing", (all) => all.clear(), "it adapts no module"],
  ])("%s", async (_, spoil, message) => {
    const model = await load();
    const spoilt = new Map(branches(model, 4, 1, ATTENTION));
    const [[module, branch]] = spoilt;
    spoil(spoilt, module, branch);
    await expect(model.engine.loadAdapter("bad", spoilt)).rejects.toThrow(message);
    expect(model.engine.adapters.names).toEqual([]);
    await model.engine.loadAdapter("good", branches(model, 4, 1, ATTENTION));
    expect((await answer(model, { tokens: model.tokens, adapter: "good" })).ids).toHaveLength(12);
  });
});
