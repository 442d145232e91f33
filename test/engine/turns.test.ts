/** Scheduling order: owners take turns, and prompts do not delay sequences that generate. Measured in steps, not time. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { Blocks } from "../../src/engine/blocks.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import { type BatchEntry, Scheduler } from "../../src/engine/scheduler.ts";
import { Sequence } from "../../src/engine/sequence.ts";

function setUp(options: Partial<ConstructorParameters<typeof Scheduler>[1]> = {}, blocks: number | Blocks = 1000) {
  const scheduler = new Scheduler(typeof blocks === "number" ? new Blocks(blocks) : blocks, {
    maxRows: 64,
    maxSequences: 100,
    prefixCache: false,
    ...options,
  });
  const add = (owner: string, prompt: number, maxNewTokens = 1000) => {
    const sequence = new Sequence({ tokens: Array.from({ length: prompt }, (_, i) => i + 1), sampling: GREEDY, maxNewTokens, owner });
    scheduler.add(sequence);
    return sequence;
  };
  /** One step, as the engine runs it: every sequence that samples gets a token. */
  const step = (promptRows = 64): BatchEntry[] => {
    const batch = scheduler.next(promptRows);
    for (const { sequence, count, samples } of batch) {
      scheduler.settle(sequence, count);
      if (!samples) continue;
      const last = sequence.tokens.length + 1 - sequence.promptCount >= sequence.request.maxNewTokens;
      sequence.append({ id: 1, logprob: 0, ...(last ? { finish: "length" as const } : {}) });
      if (sequence.done) scheduler.remove(sequence);
    }
    return batch;
  };
  return { scheduler, add, step };
}

const rowsOf = (batch: readonly BatchEntry[], owner: string) =>
  batch.filter((e) => e.sequence.owner === owner).reduce((sum, e) => sum + e.count, 0);

test("one owner's single request does not wait behind another's two hundred", () => {
  const { add, step } = setUp();
  for (let i = 0; i < 200; i++) add("many", 64, 1);
  step();
  const one = add("one", 64, 1);
  step();
  step();
  expect(one.done).toBe(true);
});

test("two owners with long queues get equal shares of rows, however long their prompts", () => {
  const { add, step } = setUp();
  for (let i = 0; i < 100; i++) add("long", 200, 1);
  for (let i = 0; i < 400; i++) add("short", 20, 1);
  let [long, short] = [0, 0];
  for (let i = 0; i < 60; i++) {
    const batch = step();
    long += rowsOf(batch, "long");
    short += rowsOf(batch, "short");
  }
  expect(long + short).toBe(60 * 64);
  expect(Math.abs(long - short)).toBeLessThanOrEqual(200);
});

test("an owner that arrives later gets no credit for the time before", () => {
  const { add, step } = setUp();
  for (let i = 0; i < 100; i++) add("early", 64, 1);
  for (let i = 0; i < 50; i++) step();
  for (let i = 0; i < 100; i++) add("late", 64, 1);
  let [early, late] = [0, 0];
  for (let i = 0; i < 20; i++) {
    const batch = step();
    early += rowsOf(batch, "early");
    late += rowsOf(batch, "late");
  }
  expect(Math.abs(early - late)).toBeLessThanOrEqual(64);
});

test("an owner that left and returns gets no credit for the time in between", () => {
  const { add, step } = setUp();
  add("back", 10, 1);
  for (let i = 0; i < 200; i++) add("stayed", 64, 1);
  for (let i = 0; i < 50; i++) step();
  for (let i = 0; i < 100; i++) add("back", 64, 1);
  let [stayed, back] = [0, 0];
  for (let i = 0; i < 20; i++) {
    const batch = step();
    stayed += rowsOf(batch, "stayed");
    back += rowsOf(batch, "back");
  }
  expect(Math.abs(stayed - back)).toBeLessThanOrEqual(64);
});

test("every generating sequence gets a token in every step, and a long prompt only the rows left for prompts", () => {
  const { add, step } = setUp();
  const talkers = Array.from({ length: 5 }, () => add("a", 3));
  step();
  const reader = add("b", 1000);
  for (let i = 0; i < 10; i++) {
    const before = talkers.map((t) => t.tokens.length);
    const batch = step(16);
    expect(talkers.map((t) => t.tokens.length)).toEqual(before.map((n) => n + 1));
    expect(rowsOf(batch, "b")).toBe(16);
  }
  expect(reader.cached).toBe(160);
});

test("when blocks run out the youngest sequence is preempted, and no token is lost", () => {
  const { scheduler, add, step } = setUp({}, 8);
  const all = Array.from({ length: 6 }, (_, i) => add(`owner ${i % 3}`, 40, 100));
  let steps = 0;
  while (scheduler.busy && steps++ < 5000) step();
  expect(all.map((s) => s.tokens.length - s.promptCount)).toEqual(all.map(() => 100));
  expect(scheduler.preemptions).toBeGreaterThan(0);
});

test("no more sequences than allowed hold blocks at once", () => {
  const { scheduler, add, step } = setUp({ maxSequences: 3 });
  for (let i = 0; i < 10; i++) add("a", 5, 4);
  let most = 0;
  while (scheduler.busy) {
    step();
    most = Math.max(most, scheduler.running);
  }
  expect(most).toBe(3);
});

test("an owner that holds all blocks gives some up to an owner without any, but not to its own requests", () => {
  const { scheduler, add, step } = setUp({ maxRows: 256 }, 20);
  const many = Array.from({ length: 30 }, () => add("many", 60, 400));
  for (let i = 0; i < 8; i++) step();
  expect(many.filter((s) => s.pages.length > 0).length).toBeGreaterThan(5);
  const before = scheduler.preemptions;
  const one = add("one", 60, 5);
  for (let i = 0; i < 6; i++) step();
  expect(one.done).toBe(true);
  expect(scheduler.preemptions).toBeGreaterThan(before);
  expect(many[0].pages.length, "the oldest keeps what it has").toBeGreaterThan(0);
});

test("slots are shared too: one owner cannot fill them all", () => {
  const { add, step } = setUp({ maxSequences: 4 });
  for (let i = 0; i < 10; i++) add("many", 5, 1000);
  step();
  const one = add("one", 5, 3);
  for (let i = 0; i < 3; i++) step();
  expect(one.done).toBe(true);
});

test("past owners have no effect on later ones", () => {
  const { add, step } = setUp();
  const steady = add("steady", 6000, 1);
  for (let i = 0; i < 20; i++) {
    const brief = add(`brief ${i}`, 2, 1);
    step();
    step();
    expect(brief.done).toBe(true);
  }
  add("new", 3000, 1);
  let [old, fresh] = [0, 0];
  for (let i = 0; i < 20; i++) {
    const batch = step();
    old += rowsOf(batch, "steady");
    fresh += rowsOf(batch, "new");
  }
  expect(steady.done).toBe(false);
  expect(Math.abs(old - fresh)).toBeLessThanOrEqual(64);
});

test("within an owner a short prompt is not delayed by a long one, and the long one makes progress", () => {
  const { add, step } = setUp();
  const long = add("a", 6000, 1);
  for (let i = 0; i < 5; i++) step();
  const steps = Array.from({ length: 10 }, () => {
    const short = add("a", 40, 1);
    let count = 0;
    for (; !short.done; count++) step();
    return count;
  });
  expect(Math.max(...steps)).toBeLessThanOrEqual(2);
  expect(long.cached).toBeGreaterThan(15 * 24);
});

test("equally long prompts of one owner are computed one after the other, so that the first finishes early", () => {
  const { add, step } = setUp();
  const all = Array.from({ length: 8 }, () => add("a", 128, 1));
  step();
  step();
  expect(all.map((s) => s.done)).toEqual([true, ...all.slice(1).map(() => false)]);
});

test("small prompts do not take the room that the same owner's large prompt waits for", () => {
  const { add, step } = setUp({ maxRows: 64 }, 20);
  for (let i = 0; i < 8; i++) add("a", 33, 30);
  for (let i = 0; i < 8; i++) step();
  const large = add("a", 500, 1);
  let steps = 0;
  for (; !large.done && steps < 200; steps++) {
    add("a", 20, 30);
    step();
  }
  expect(large.done).toBe(true);
});

test("reservations are served before later sequences and after earlier ones", async () => {
  const { scheduler, add, step } = setUp({}, 6);
  const [first, second] = [add("a", 60, 40), add("a", 60, 40)];
  step();
  step();
  step();
  let lent: number[] | null = null;
  void Promise.resolve(scheduler.reserve(4 * 32)).then((pages) => {
    lent = pages;
  });
  const later = add("b", 30, 2);
  for (let i = 0; i < 10; i++) step();
  await null;
  expect(lent).toBe(null);
  expect(later.pages).toEqual([]);
  expect(scheduler.waiting).toBe(2);
  let steps = 0;
  for (; !lent && steps < 100; steps++) {
    step();
    await null;
  }
  expect(first.done || second.done).toBe(true);
  expect(later.done).toBe(false);
  for (let i = 0; i < 60; i++) step();
  scheduler.giveBack(lent as unknown as number[]);
  for (let i = 0; i < 60; i++) step();
  expect([first, second, later].map((s) => s.done)).toEqual([true, true, true]);
});

test("whatever the owners, prompts and cache size, nothing waits forever, and all blocks are free at the end", () => {
  const request = fc.record({
    owner: fc.nat(4),
    prompt: fc.integer({ min: 1, max: 250 }),
    answer: fc.integer({ min: 1, max: 40 }),
    at: fc.nat(40),
  });
  fc.assert(
    fc.property(
      fc.array(request, { maxLength: 25 }),
      fc.integer({ min: 10, max: 30 }),
      fc.integer({ min: 1, max: 12 }),
      fc.integer({ min: 1, max: 64 }),
      fc.boolean(),
      (requests, count, maxSequences, maxRows, prefixCache) => {
        const blocks = new Blocks(count);
        const { scheduler, add, step } = setUp({ maxSequences, maxRows, prefixCache }, blocks);
        const all: Sequence[] = [];
        let steps = 0;
        for (; steps <= 40 || scheduler.busy; steps++) {
          for (const r of requests) if (r.at === steps) all.push(add(`${r.owner}`, r.prompt, r.answer));
          const batch = step(Math.ceil(maxRows / 2));
          expect(batch.reduce((sum, e) => sum + e.count, 0)).toBeLessThanOrEqual(maxRows);
          expect(new Set(batch.map((e) => e.sequence)).size).toBe(batch.length);
          expect(scheduler.running).toBeLessThanOrEqual(maxSequences);
          // No step writes to a shared block: it only fills blocks with a single holder.
          const holders = new Map<number, number>();
          for (const s of all) for (const page of s.pages) holders.set(page, (holders.get(page) ?? 0) + 1);
          for (const s of all) for (const page of s.pages.slice(Math.floor(s.cached / 32))) expect(holders.get(page)).toBe(1);
          expect(holders.size + blocks.free).toBe(count);
          if (steps > 20_000) throw new Error("somebody waits for ever");
        }
        for (const s of all) expect(s.tokens.length - s.promptCount).toBe(s.request.maxNewTokens);
        expect(blocks.free).toBe(count);
      },
    ),
    { numRuns: 150 },
  );
});
