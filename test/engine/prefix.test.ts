/** The prefix cache: what is shared, what is evicted, and that answers do not depend on it. */
import fc from "fast-check";
import { afterEach, expect, test } from "vitest";
import { type LoadedModel, type LoadOptions, loadModel } from "../../src/api/load.ts";
import { BLOCK_TOKENS, Blocks, ROOT } from "../../src/engine/blocks.ts";
import type { Engine } from "../../src/engine/engine.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import type { Request } from "../../src/engine/sequence.ts";
import { GOLDENS } from "../goldens.ts";

const open: LoadedModel[] = [];
afterEach(async () => {
  for (const model of open.splice(0)) await model.engine.dispose();
});

async function load(options: LoadOptions = {}): Promise<Engine> {
  const model = await loadModel(`${GOLDENS}moe-tiny`, { dtype: "fp32", threads: 1, kv_cache_tokens: 4096, ...options });
  open.push(model);
  return model.engine;
}

async function answer(engine: Engine, tokens: number[], more: Partial<Request> = {}): Promise<{ ids: number[]; reused: number }> {
  const ids: number[] = [];
  let reused = -1;
  for await (const { id, cachedTokens } of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 12, ...more })) {
    ids.push(id);
    reused = cachedTokens ?? reused;
  }
  return { ids, reused };
}

const text = (n: number, seed: number) => Array.from({ length: n }, (_, i) => 3 + ((i * 31 + seed * 17 + ((i * i) % 7)) % 500));

test("the second turn of a conversation computes only the new tokens and gives the same answer", async () => {
  const [cached, plain] = [await load(), await load({ prefix_cache: false })];
  const first = await answer(cached, text(100, 1));
  expect(first.reused).toBe(0);
  const second = [...text(100, 1), ...first.ids, ...text(20, 2)];
  const again = await answer(cached, second);
  expect(again.reused).toBe(Math.floor((100 + 11) / BLOCK_TOKENS) * BLOCK_TOKENS); // the answer's last token was never computed
  expect(await answer(plain, second)).toEqual({ ids: again.ids, reused: 0 });
  expect(cached.stats().cachedTokens).toBe(again.reused);
});

test("at least the last token of a prompt is computed, even if all of it is cached", async () => {
  const engine = await load();
  const tokens = text(2 * BLOCK_TOKENS, 3);
  const first = await answer(engine, tokens);
  const again = await answer(engine, tokens);
  expect(again).toEqual({ ids: first.ids, reused: BLOCK_TOKENS });
});

test("a prompt that differs in its first block shares nothing, whatever follows", async () => {
  const engine = await load();
  const tokens = text(100, 4);
  await answer(engine, tokens);
  expect((await answer(engine, [7, ...tokens.slice(1)])).reused).toBe(0);
});

test("concurrent requests share blocks, and each ends without affecting the others", async () => {
  const [engine, plain] = [await load(), await load({ prefix_cache: false })];
  const system = text(96, 5);
  await answer(engine, system);
  const turns = Array.from({ length: 12 }, (_, i) => [...system, ...text(5 + i, 6 + i)]);
  const together = await Promise.all(turns.map((t, i) => answer(engine, t, { maxNewTokens: 4 + i * 3 })));
  for (const [i, t] of turns.entries()) {
    expect(together[i].reused).toBe(96);
    expect(together[i].ids).toEqual((await answer(plain, t, { maxNewTokens: 4 + i * 3 })).ids);
  }
  expect(engine.cache.free).toBe(engine.cache.count);
});

test("when room is needed, the least recently used blocks are evicted first", async () => {
  const engine = await load({ kv_cache_tokens: 8 * BLOCK_TOKENS });
  const [old, recent] = [text(65, 20), text(65, 21)];
  await answer(engine, old, { maxNewTokens: 1 });
  await answer(engine, recent, { maxNewTokens: 1 });
  await answer(engine, text(4 * BLOCK_TOKENS, 22), { maxNewTokens: 1 }); // leaves no block unused
  await answer(engine, text(BLOCK_TOKENS + 1, 23), { maxNewTokens: 1 });
  expect((await answer(engine, recent, { maxNewTokens: 1 })).reused).toBe(2 * BLOCK_TOKENS);
  expect((await answer(engine, old, { maxNewTokens: 1 })).reused).toBeLessThan(2 * BLOCK_TOKENS);
});

test("blocks: in random sequences of operations, none is lost or allocated twice", () => {
  fc.assert(
    fc.property(
      fc.array(fc.record({ act: fc.constantFrom("take", "leave", "fill"), prompt: fc.nat(3), size: fc.integer({ min: 1, max: 5 }) }), {
        maxLength: 60,
      }),
      (acts) => {
        const blocks = new Blocks(9);
        const held: { pages: number[]; tokens: number[]; entry: number; chained: number }[] = [];
        for (const { act, prompt, size } of acts) {
          if (act === "take") {
            const tokens = Array.from({ length: size * BLOCK_TOKENS }, (_, i) => (i < BLOCK_TOKENS ? 1 : prompt));
            const { pages, entry } = blocks.match(tokens, size - 1);
            const chained = pages.length;
            if (blocks.cover(pages, tokens.length)) held.push({ pages, tokens, entry, chained });
            else blocks.release(pages);
          } else if (act === "leave" && held.length) blocks.release(held.splice(size % held.length, 1)[0].pages);
          else if (act === "fill" && held.length) {
            const one = held[size % held.length];
            for (; one.chained < one.pages.length; one.chained++)
              one.entry = blocks.remember(one.pages, one.chained, one.entry, one.tokens);
          }
          const taken = new Set(held.flatMap((h) => h.pages));
          expect(taken.size + blocks.free).toBe(9);
          for (const { pages } of held) expect(new Set(pages).size).toBe(pages.length);
          // A block with two holders has the same contents for both.
          for (const a of held)
            for (const b of held)
              a.pages.forEach((block, i) => {
                const j = b.pages.indexOf(block);
                if (j < 0) return;
                expect(j).toBe(i);
                expect(b.tokens.slice(0, (i + 1) * BLOCK_TOKENS)).toEqual(a.tokens.slice(0, (i + 1) * BLOCK_TOKENS));
              });
        }
        for (const { pages } of held) blocks.release(pages);
        expect(blocks.free).toBe(9);
        expect(blocks.match([], 0)).toEqual({ pages: [], entry: ROOT });
      },
    ),
    { numRuns: 300 },
  );
});
