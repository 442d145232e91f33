/** A backend whose steps sometimes fail: the step's requests get the error, and the engine keeps working. */
import { beforeEach, expect, test, vi } from "vitest";
import { loadModel } from "../../src/api/load.ts";
import type { Backend } from "../../src/backend/backend.ts";
import type { NativeOptions } from "../../src/backend/native.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import { openGoldens } from "../goldens.ts";

/** Number of calls of `run` until one rejects; 0: none does. */
const fault = vi.hoisted(() => ({ after: 0 }));

vi.mock("../../src/backend/native.ts", async (original) => {
  const native = await original<typeof import("../../src/backend/native.ts")>();
  const nativeBackend = (options: NativeOptions): Backend => {
    const backend = native.nativeBackend(options);
    return {
      ...backend,
      prepare: (...args) => {
        const program = backend.prepare(...args);
        return {
          ...program,
          run: (...step) => (fault.after > 0 && --fault.after === 0 ? Promise.reject(new Error("the disk burns")) : program.run(...step)),
        };
      },
    };
  };
  return { ...native, nativeBackend };
});

beforeEach(() => {
  fault.after = 0;
});

async function setUp() {
  const goldens = await openGoldens("moe-tiny");
  const { engine } = await loadModel(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 2048 });
  const prompts = new Map(await Promise.all(goldens.lengths.map(async (n) => [n, await goldens.ids(n)] as const)));
  /** Submits synchronously, so that several calls have an order. */
  const answer = async (n: number) => {
    const ids: number[] = [];
    for await (const { id } of engine.submit({ tokens: prompts.get(n) as number[], sampling: GREEDY, maxNewTokens: 24 })) ids.push(id);
    return ids;
  };
  return { engine, answer, goldens };
}

// The first step starts with the first request, which is therefore alone in it.
test.each([
  [1, 1],
  [2, 3],
  [10, 3],
])("step %i fails: its %i requests fail, blocks come back, later requests are served", async (after, failing) => {
  const { engine, answer, goldens } = await setUp();
  fault.after = after;
  const results = await Promise.allSettled([answer(7), answer(33), answer(130)]);
  expect(results.map((r) => (r.status === "rejected" ? r.reason.message : "served"))).toEqual(
    Array.from({ length: 3 }, (_, i) => (i < failing ? "the disk burns" : "served")),
  );
  expect(engine.cache.free).toBe(engine.cache.count);
  for (const n of [7, 33, 130]) expect(await answer(n)).toEqual(goldens.greedy[n]);
  await engine.dispose();
});

test("tokens from before the failure are delivered first", async () => {
  const { engine, goldens } = await setUp();
  fault.after = 6;
  const ids: number[] = [];
  const read = async () => {
    for await (const { id } of engine.submit({ tokens: await goldens.ids(7), sampling: GREEDY, maxNewTokens: 24 })) ids.push(id);
  };
  await expect(read()).rejects.toThrow("the disk burns");
  expect(ids).toEqual(goldens.greedy[7].slice(0, 5));
  await engine.dispose();
});

test("a failing forward pass rejects alone and releases its blocks", async () => {
  const { engine, answer, goldens } = await setUp();
  fault.after = 1;
  const looking = expect(engine.inspect(await goldens.ids(33))).rejects.toThrow("the disk burns");
  const answered = answer(33);
  await looking;
  expect(await answered).toEqual(goldens.greedy[33]);
  expect(engine.cache.free).toBe(engine.cache.count);
  await engine.dispose();
});

test("blocks that a failed step read or wrote are not reused; other cached blocks are", async () => {
  const { engine, answer, goldens } = await setUp();
  const reused = async (tokens: number[]): Promise<number | undefined> => {
    for await (const { cachedTokens } of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 1 })) return cachedTokens;
    return undefined;
  };
  const [touched, untouched] = [await goldens.ids(130), [9, ...(await goldens.ids(130))]];
  expect([await reused(touched), await reused(untouched)]).toEqual([0, 0]);
  expect(await reused(touched)).toBe(128);
  fault.after = 1;
  await expect(answer(130)).rejects.toThrow("the disk burns");
  expect(engine.cache.free).toBe(engine.cache.count);
  expect([await reused(touched), await reused(untouched)]).toEqual([0, 128]);
  expect(await answer(130)).toEqual(goldens.greedy[130]);
  await engine.dispose();
});

test("dispose ends running requests, queued requests, and those waiting for blocks", async () => {
  const { engine, goldens } = await setUp();
  const read = async (tokens: number[]) => {
    for await (const _ of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 500 }));
  };
  const long = Array.from({ length: 1900 }, (_, i) => 6 + (i % 400));
  const all = [read(await goldens.ids(130)), read(long), read(long), engine.embed(long), engine.inspect(long)];
  const results = Promise.allSettled(all);
  await new Promise((resolve) => setTimeout(resolve, 20));
  await engine.dispose();
  for (const result of await results) expect(result.status === "rejected" && result.reason.message).toBe("the model has been disposed of");
});

test("dispose after a failure", async () => {
  const { engine, answer } = await setUp();
  fault.after = 1;
  await expect(answer(7)).rejects.toThrow("the disk burns");
  await engine.dispose();
  await expect(answer(7)).rejects.toThrow("the model has been disposed of");
});

test("a failing constraint ends only its own request", async () => {
  const { engine, answer, goldens } = await setUp();
  const tokens = await goldens.ids(7);
  const broken = (constraint: object) =>
    (async () => {
      for await (const _ of engine.submit({
        tokens,
        sampling: GREEDY,
        maxNewTokens: 24,
        constraint: { next: () => null, accept: () => {}, ...constraint },
      }));
    })();
  const fails = () => {
    throw new Error("no grammar");
  };
  const [a, b, c] = await Promise.allSettled([
    broken({ accept: fails }),
    broken({ next: () => Promise.reject(new Error("no grammar")) }),
    answer(7),
  ]);
  expect([a, b].map((r) => r.status === "rejected" && r.reason.message)).toEqual(["no grammar", "no grammar"]);
  expect(c).toMatchObject({ status: "fulfilled", value: goldens.greedy[7] });
  await expect.poll(() => engine.cache.free).toBe(engine.cache.count);
  await engine.dispose();
});
