/** Sequences with custom embeddings and positions: they are used, and the prefix cache distinguishes them. */
import { afterEach, describe, expect, test, vi } from "vitest";
import { type LoadedModel, type LoadOptions, loadModel } from "../../src/api/load.ts";
import { readWeight } from "../../src/backend/reference/weights.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import { Scheduler } from "../../src/engine/scheduler.ts";
import type { Request } from "../../src/engine/sequence.ts";
import { contentKeys } from "../../src/model/content.ts";
import { openGoldens } from "../goldens.ts";

const open: LoadedModel[] = [];
afterEach(async () => {
  vi.restoreAllMocks();
  await Promise.all(open.splice(0).map((m) => m.engine.dispose()));
});

async function load(options: LoadOptions = {}) {
  const goldens = await openGoldens("moe-tiny");
  const model = await loadModel(goldens.folder, { dtype: "fp32", kv_cache_tokens: 2048, threads: 2, ...options });
  open.push(model);
  const tokens = await goldens.ids(130);
  const table = model.weights.find((w) => w.name === model.engine.model.embedding);
  const rows = await readWeight(table as NonNullable<typeof table>);
  const hidden = model.engine.model.hiddenSize;
  /** The embeddings of ids, as a source other than the table would provide them. */
  const embedded = (ids: readonly number[]) => Float32Array.from(ids.flatMap((id) => [...rows.subarray(id * hidden, (id + 1) * hidden)]));
  const answer = async (request: Pick<Request, "tokens" | "positions" | "embeddings">) => {
    const ids: number[] = [];
    let cached = 0;
    for await (const token of model.engine.submit({ ...request, sampling: GREEDY, maxNewTokens: 8 })) {
      ids.push(token.id);
      cached = token.cachedTokens ?? cached;
    }
    return { ids, cached };
  };
  return { model, tokens, embedded, answer };
}

describe("embeddings in place of ids", () => {
  const PLACEHOLDER = 3;

  test.each([512, 7])("give the same results as the ids themselves, in prompt chunks of %i tokens", async (chunk_size) => {
    const { tokens, embedded, answer } = await load({ chunk_size, prefix_cache: false });
    const spans = [
      { at: 0, count: 40 },
      { at: 51, count: 3 },
      { at: 100, count: 30 },
    ];
    const placeholders = tokens.map((id, i) => (spans.some((s) => i >= s.at && i < s.at + s.count) ? PLACEHOLDER : id));
    const embeddings = spans.map((s) => ({ ...s, values: embedded(tokens.slice(s.at, s.at + s.count)) }));
    const { ids } = await answer({ tokens });
    expect((await answer({ tokens: placeholders, embeddings })).ids).toEqual(ids);
    expect((await answer({ tokens: placeholders })).ids).not.toEqual(ids);
  });

  test("the prefix cache finds the same content again, but not different content with the same placeholders", async () => {
    const { tokens, embedded, answer } = await load();
    const other = tokens.map((id) => 511 - id + 3);
    const prompt = (content: readonly number[]) => ({
      tokens: tokens.map((id, i) => (i < 64 ? PLACEHOLDER : id)),
      embeddings: [{ at: 0, count: 64, values: embedded(content.slice(0, 64)) }],
    });
    const first = await answer(prompt(tokens));
    const second = await answer(prompt(other));
    expect([first.cached, second.cached]).toEqual([0, 0]);
    expect(second.ids).not.toEqual(first.ids);
    expect(await answer(prompt(tokens))).toEqual({ ids: first.ids, cached: 128 });
    expect(await answer(prompt(other))).toEqual({ ids: second.ids, cached: 128 });
    expect((await answer({ tokens: prompt(tokens).tokens })).cached, "the placeholders as ids").toBe(0);
  });

  test("content that does not fit the tokens is rejected", async () => {
    const { tokens, embedded, model } = await load();
    const submit = (more: Partial<Request>) => () => model.engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 1, ...more });
    const values = embedded(tokens.slice(0, 2));
    expect(submit({ embeddings: [{ at: 129, count: 2, values }] })).toThrow("must be in order and within the 130 tokens");
    expect(submit({ embeddings: [{ at: 0, count: 3, values }] })).toThrow(
      "embeddings of 3 tokens have 128 numbers; at 64 each they take 192",
    );
    const twice = [0, 1].map((at) => ({ at, count: 2, values }));
    expect(submit({ embeddings: twice })).toThrow("must be in order");
    expect(submit({ positions: new Int32Array(7) })).toThrow("positions has 7 numbers; 130 tokens with 1 each need 130");
    expect(submit({ positions: new Int32Array(130).fill(-4) })).toThrow("positions has -4; positions begin at 0");
  });
});

describe("custom positions", () => {
  test("the default positions given explicitly: the same answer, from the same blocks", async () => {
    const { tokens, answer } = await load();
    const plain = await answer({ tokens });
    const same = await answer({ tokens, positions: Int32Array.from(tokens.keys()) });
    expect(same).toEqual({ ids: plain.ids, cached: 128 });
  });

  test("rotations are relative: shifting all positions keeps the answer, a gap changes it; neither shares blocks", async () => {
    const { tokens, answer } = await load();
    const plain = await answer({ tokens });
    const moved = await answer({ tokens, positions: Int32Array.from(tokens, (_, i) => i + 500) });
    expect(moved).toEqual({ ids: plain.ids, cached: 0 });
    const gap = await answer({ tokens, positions: Int32Array.from(tokens, (_, i) => (i < 65 ? i : 3 * i)) });
    expect(gap.cached, "the blocks before the gap").toBe(64);
    expect(gap.ids).not.toEqual(plain.ids);
  });
});

test("keys: the id for a plain token, else a number that is not an id", () => {
  const tokens = [5, 6, 7, 8];
  expect(contentKeys({ tokens })).toBe(tokens);
  const values = Float32Array.of(1, 2, 3, 4);
  const keys = contentKeys({ tokens, embeddings: [{ at: 1, count: 2, values }] });
  expect([keys[0], keys[3]]).toEqual([5, 8]);
  expect(keys[1]).toBeLessThan(0);
  expect(keys[1]).not.toBe(keys[2]);
  expect(keys.every(Number.isSafeInteger)).toBe(true);
  expect(contentKeys({ tokens, embeddings: [{ at: 1, count: 2, values: Float32Array.of(1, 2, 3, 5) }] })[1]).not.toBe(keys[1]);
});

test("a scheduler failure ends the current requests; later ones are served", async () => {
  const { tokens, answer } = await load();
  const next = vi.spyOn(Scheduler.prototype, "next").mockImplementationOnce(() => {
    throw new Error("internal: planted");
  });
  await expect(Promise.all([answer({ tokens }), answer({ tokens })])).rejects.toThrow("internal: planted");
  next.mockRestore();
  expect((await answer({ tokens })).ids.length).toBe(8);
});
