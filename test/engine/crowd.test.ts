/** Many concurrent requests: the same answers as alone, whatever the cache size, and cancelled requests release their blocks. */
import { fileURLToPath } from "node:url";
import { afterEach, beforeAll, describe, expect, test } from "vitest";
import { type LoadedModel, type LoadOptions, loadModel } from "../../src/api/load.ts";
import type { Engine } from "../../src/engine/engine.ts";
import { GREEDY, type Sampling } from "../../src/engine/sampling.ts";
import type { Request } from "../../src/engine/sequence.ts";
import { GOLDENS, openGoldens } from "../goldens.ts";

const DEFAULT = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const SAMPLED: Sampling = { ...GREEDY, temperature: 2, topK: 100, repetitionPenalty: 1.1 };
let prompts: number[][];
let greedy: (readonly number[])[];
const open: LoadedModel[] = [];

async function load(options: LoadOptions = {}): Promise<Engine> {
  const model = await loadModel(`${GOLDENS}moe-tiny`, { dtype: "fp32", threads: 1, kv_cache_tokens: 8192, ...options });
  open.push(model);
  return model.engine;
}

async function answer(engine: Engine, request: Partial<Request> & Pick<Request, "tokens">): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of engine.submit({ sampling: GREEDY, maxNewTokens: 24, ...request })) ids.push(id);
  return ids;
}

/** All blocks are free again once the current step has finished. */
async function expectEmpty(engine: Engine): Promise<void> {
  await expect.poll(() => engine.cache.free).toBe(engine.cache.count);
}

beforeAll(async () => {
  const goldens = await openGoldens("moe-tiny");
  prompts = await Promise.all(goldens.lengths.map((n) => goldens.ids(n)));
  greedy = goldens.lengths.map((n) => goldens.greedy[n]);
});
afterEach(async () => {
  for (const model of open.splice(0)) await model.engine.dispose();
});

/** 16 requests: four prompts, every second one sampled. */
function crowd(): (Partial<Request> & Pick<Request, "tokens">)[] {
  return Array.from({ length: 16 }, (_, i) => ({
    tokens: prompts[i % 4],
    sampling: i % 8 < 4 ? GREEDY : { ...SAMPLED, seed: i },
    maxNewTokens: 16 + i,
  }));
}

test("16 concurrent requests, greedy and sampled, get the same answers as alone", async () => {
  const engine = await load();
  const alone: number[][] = [];
  for (const request of crowd()) alone.push(await answer(engine, request));
  expect(alone[1].slice(0, 17)).toEqual(greedy[1].slice(0, 17));
  expect(await Promise.all(crowd().map((request) => answer(engine, request)))).toEqual(alone);
  await expectEmpty(engine);
});

test("a request that arrives while others are served changes no answer", async () => {
  const engine = await load();
  const first = answer(engine, { tokens: prompts[3] });
  const later: Promise<number[]>[] = [];
  for await (const { finish } of engine.submit({ tokens: prompts[1], sampling: GREEDY, maxNewTokens: 12 }))
    if (!finish) later.push(answer(engine, { tokens: prompts[2] }));
  expect(await first).toEqual(greedy[3]);
  expect(later.length).toBe(11);
  for (const each of later) expect(await each).toEqual(greedy[2]);
});

describe("a cache too small for all", () => {
  // The longest request needs 130 + 31 tokens: 6 blocks of 32.
  test.each([
    [192, 512],
    [224, 512],
    [192, 16],
    [192, 5],
  ])("%i tokens of cache, %i rows a step: nothing is lost", async (kv_cache_tokens, chunk_size) => {
    const roomy = await load();
    const wanted = await Promise.all(crowd().map((request) => answer(roomy, request)));
    const engine = await load({ kv_cache_tokens, chunk_size });
    let lowest = engine.cache.count;
    const got = await Promise.all(
      crowd().map(async (request) => {
        const ids: number[] = [];
        for await (const { id } of engine.submit({ sampling: GREEDY, maxNewTokens: 24, ...request })) {
          ids.push(id);
          lowest = Math.min(lowest, engine.cache.free);
        }
        return ids;
      }),
    );
    expect(got).toEqual(wanted);
    expect(lowest, "the cache did run out").toBe(0);
    await expectEmpty(engine);
  });

  test("one sequence may fill it, and then ends", async () => {
    const engine = await load({ kv_cache_tokens: 64 });
    const tokens: unknown[] = [];
    for await (const token of engine.submit({ tokens: prompts[2], sampling: GREEDY, maxNewTokens: 1000 })) tokens.push(token.finish);
    expect(tokens.length).toBe(64 - 33);
    expect(tokens.at(-1)).toBe("length");
    await expectEmpty(engine);
  });

  test("a longer prompt is an error that states the cache's size", async () => {
    const engine = await load({ kv_cache_tokens: 64 });
    expect(() => engine.submit({ tokens: prompts[3], sampling: GREEDY, maxNewTokens: 1 })).toThrow(
      /^the prompt has 130 tokens and needs .* GiB of KV cache; the cache holds 64 tokens/,
    );
    await expect(engine.inspect(prompts[3])).rejects.toThrow(/the cache holds 64 tokens/);
  });

  test("requests wait for blocks that a forward pass holds", async () => {
    const engine = await load({ kv_cache_tokens: 64, chunk_size: 4 });
    const looking = engine.inspect(prompts[2].concat(prompts[2].slice(0, 30))); // 63 tokens: all blocks, 16 steps
    const answered = answer(engine, { tokens: prompts[1] });
    expect(engine.cache.free).toBe(0);
    expect((await looking).logits.length).toBe(63 * 512);
    expect(await answered).toEqual(greedy[1]);
    await expectEmpty(engine);
  });

  test("a forward pass without free blocks waits for them and affects no other request", async () => {
    const engine = await load({ kv_cache_tokens: 64 });
    const answered = answer(engine, { tokens: prompts[2] });
    const looking = engine.inspect(prompts[2]);
    let looked = false;
    void looking.then(() => {
      looked = true;
    });
    expect(await answered).toEqual(greedy[2]);
    expect(looked).toBe(false);
    expect((await looking).logits.length).toBe(prompts[2].length * 512);
    await expectEmpty(engine);
  });
});

describe("cancelling", () => {
  test("a reader that leaves its loop releases its blocks, and others continue", async () => {
    const engine = await load();
    const other = answer(engine, { tokens: prompts[3] });
    let count = 0;
    for await (const _ of engine.submit({ tokens: prompts[1], sampling: GREEDY, maxNewTokens: 4000 })) if (++count === 5) break;
    expect(await other).toEqual(greedy[3]);
    await expectEmpty(engine);
    expect(await answer(engine, { tokens: prompts[1] })).toEqual(greedy[1]);
  });

  test("an abort before the first token", async () => {
    const engine = await load();
    const controller = new AbortController();
    const answered = answer(engine, { tokens: prompts[3], signal: controller.signal });
    controller.abort(new Error("no longer wanted"));
    await expect(answered).rejects.toThrow("no longer wanted");
    await expectEmpty(engine);
  });

  test("an abort while queued", async () => {
    const engine = await load({ kv_cache_tokens: 192 });
    const first = answer(engine, { tokens: prompts[3] });
    const controller = new AbortController();
    const waiting = answer(engine, { tokens: prompts[3], signal: controller.signal });
    const failed = expect(waiting).rejects.toThrow("no longer wanted");
    setTimeout(() => controller.abort(new Error("no longer wanted")), 5);
    await failed;
    expect(await first).toEqual(greedy[3]);
    await expectEmpty(engine);
  });

  test("zero new tokens", async () => {
    const engine = await load();
    expect(await answer(engine, { tokens: prompts[1], maxNewTokens: 0 })).toEqual([]);
    expect(() => engine.submit({ tokens: prompts[1], sampling: GREEDY, maxNewTokens: -1 })).toThrow("maxNewTokens is -1");
    await expectEmpty(engine);
  });
});

describe("64 at once", () => {
  /** Prompts with shared prefixes of many lengths or none, some sampled, some with penalties, from four owners. */
  function mixed(vocab: number): (Partial<Request> & Pick<Request, "tokens">)[] {
    const text = (n: number, seed: number) => Array.from({ length: n }, (_, i) => 6 + ((i * 31 + seed * 17 + ((i * i) % 7)) % (vocab - 6)));
    const system = text(100, 1);
    return Array.from({ length: 64 }, (_, i) => ({
      tokens: i % 2 ? [...system.slice(0, 40 + (i % 3) * 30), ...text(1 + ((i * 7) % 40), i)] : text(1 + ((i * 13) % 90), i),
      sampling: i % 4 === 3 ? { ...SAMPLED, seed: i } : GREEDY,
      maxNewTokens: 4 + ((i * 5) % 30),
      owner: `owner ${i % 4}`,
    }));
  }

  test.each<[string, string, LoadOptions]>([
    ["a tiny model in float32, little room", `${GOLDENS}moe-tiny`, { dtype: "fp32", threads: 1, kv_cache_tokens: 480, chunk_size: 48 }],
    ["the bundled model, much room", DEFAULT, { threads: 2, kv_cache_tokens: 16384 }],
    ["the bundled model, little room", DEFAULT, { threads: 2, kv_cache_tokens: 640, max_sequences: 20 }],
  ])("%s: each the same as alone, with the prefix cache and without", async (_name, folder, options) => {
    const open1 = async (more: LoadOptions) => {
      const model = await loadModel(folder, { ...options, ...more });
      open.push(model);
      return model.engine;
    };
    const [plain, cached] = [await open1({ prefix_cache: false }), await open1({})];
    const requests = mixed(plain.model.vocabSize);
    const alone: number[][] = [];
    for (const request of requests) alone.push(await answer(plain, request));
    const together = () => Promise.all(requests.map((request) => answer(cached, request)));
    expect(await together()).toEqual(alone);
    const first = cached.stats();
    expect(await together(), "from the cache").toEqual(alone);
    expect(cached.stats().cachedTokens).toBeGreaterThan(first.cachedTokens);
    expect(await Promise.all(requests.map((request) => answer(plain, request)))).toEqual(alone);
    expect(plain.stats().cachedTokens).toBe(0);
    if (options.kv_cache_tokens && options.kv_cache_tokens < 1000) expect(first.preemptions).toBeGreaterThan(0);
    await expectEmpty(cached);
  });
});

describe("a thousand cancelled requests", () => {
  test("never read, read once, aborted, or returned before they started: all blocks are free again", async () => {
    const engine = await load({ kv_cache_tokens: 4096 });
    const lasting = answer(engine, { tokens: prompts[3] });
    for (let i = 0; i < 1000; i++) {
      const controller = new AbortController();
      const stream = engine.submit({
        tokens: [3 + (i % 500), ...prompts[i % 3]],
        sampling: GREEDY,
        maxNewTokens: 1000,
        owner: `owner ${i % 10}`,
        signal: controller.signal,
      });
      if (i % 4 === 0) controller.abort();
      else if (i % 4 === 1) await stream.return();
      else if (i % 4 === 2) setImmediate(() => controller.abort());
      else {
        const first = stream.next();
        void first.then(() => stream.return()).catch(() => {});
        if (i % 40 === 3) await first;
      }
    }
    expect(await lasting).toEqual(greedy[3]);
    await expectEmpty(engine);
    expect(engine.stats().running + engine.stats().waiting).toBe(0);
    expect(await answer(engine, { tokens: prompts[1] })).toEqual(greedy[1]);
  });

  test("a reader that does not read costs only its own answer, and holds no blocks once that is complete", async () => {
    const engine = await load();
    const slow = engine.submit({ tokens: prompts[1], sampling: GREEDY, maxNewTokens: 24 });
    expect(await answer(engine, { tokens: prompts[2], maxNewTokens: 60 })).toHaveLength(60);
    await expectEmpty(engine);
    const ids: number[] = [];
    for await (const { id } of slow) ids.push(id);
    expect(ids).toEqual(greedy[1]);
  });
});

test("inspect and embed under load: correct results, and others are delayed by no more than prompts may take", async () => {
  const engine = await load({ kv_cache_tokens: 2048 });
  const long = Array.from({ length: 900 }, (_, i) => 6 + ((i * 7) % 500));
  const [alone, mean] = [await engine.inspect(long, { logits: false, hiddenStates: true }), await engine.embed(long)];
  const last = alone.hiddenStates.at(-1) as Float32Array;
  const width = mean.length;
  mean.forEach((x, d) => {
    let sum = 0;
    for (let t = 0; t < long.length; t++) sum += last[t * width + d];
    expect(x).toBeCloseTo(sum / long.length, 4);
  });
  const crowd = Array.from({ length: 6 }, () => answer(engine, { tokens: prompts[1], maxNewTokens: 300 }));
  const [beside, besideMean] = await Promise.all([engine.inspect(long, { logits: false, hiddenStates: true }), engine.embed(long)]);
  expect(beside.hiddenStates).toEqual(alone.hiddenStates);
  expect(besideMean).toEqual(mean);
  for (const ids of await Promise.all(crowd)) expect(ids.slice(0, 24)).toEqual(greedy[1]);
  await expectEmpty(engine);
});
