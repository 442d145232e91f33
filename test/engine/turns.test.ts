/** Who is served when: owners take turns, prompts do not hold up those who generate; counted in steps, not in time. */
import { expect, test } from "vitest";
import { Blocks } from "../../src/engine/blocks.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import { type BatchEntry, Scheduler } from "../../src/engine/scheduler.ts";
import { Sequence } from "../../src/engine/sequence.ts";

function setUp(options: Partial<ConstructorParameters<typeof Scheduler>[1]> = {}, blocks = 1000) {
  const scheduler = new Scheduler(new Blocks(blocks), { maxRows: 64, maxSequences: 100, prefixCache: false, ...options });
  const add = (owner: string, prompt: number, maxNewTokens = 1000) => {
    const sequence = new Sequence({ tokens: Array.from({ length: prompt }, (_, i) => i + 1), sampling: GREEDY, maxNewTokens, owner });
    scheduler.add(sequence);
    return sequence;
  };
  /** One step, as the engine runs it: everyone who samples gets a token. */
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

test("one request of one owner is not behind two hundred of another", () => {
  const { add, step } = setUp();
  for (let i = 0; i < 200; i++) add("many", 64, 1);
  step();
  const one = add("one", 64, 1);
  step();
  step();
  expect(one.done).toBe(true);
});

test("two owners with long queues get the same share of rows, however long their prompts", () => {
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

test("who comes later has no claim on the time before", () => {
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

test("who was here before, left, and comes back has no claim on the time between", () => {
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

test("everyone who generates gets a token in every step, and a long prompt only what is left for prompts", () => {
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

test("when blocks run out the youngest gives way, and nobody loses a token", () => {
  const { scheduler, add, step } = setUp({}, 8);
  const all = Array.from({ length: 6 }, (_, i) => add(`owner ${i % 3}`, 40, 100));
  let steps = 0;
  while (scheduler.busy && steps++ < 5000) step();
  expect(all.map((s) => s.tokens.length - s.promptCount)).toEqual(all.map(() => 100));
  expect(scheduler.preemptions).toBeGreaterThan(0);
});

test("no more sequences than allowed have blocks at once", () => {
  const { scheduler, add, step } = setUp({ maxSequences: 3 });
  for (let i = 0; i < 10; i++) add("a", 5, 4);
  let most = 0;
  while (scheduler.busy) {
    step();
    most = Math.max(most, scheduler.running);
  }
  expect(most).toBe(3);
});
