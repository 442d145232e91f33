/** MinHash finds near duplicates; the exact similarity decides, so that none is found that is not one. */
import { expect, test, vi } from "vitest";
import { bandsFor, Duplicates, jaccard, shingles } from "../../../src/train/augment/duplicates.ts";
import { Random } from "../../../src/train/random.ts";

/** Adds texts; the number that each is a duplicate of, or null. */
async function add(threshold: number, texts: readonly string[]): Promise<(number | null)[]> {
  const duplicates = new Duplicates(threshold);
  const kept: string[] = [];
  const found: (number | null)[] = [];
  for (const text of texts) {
    const like = await duplicates.add(text, async (number) => kept[number]);
    if (like === null) kept.push(text);
    found.push(like?.of ?? null);
  }
  return found;
}

test("case and white space do not matter, another text does", async () => {
  const texts = [
    "The quick brown fox jumps",
    "the  QUICK brown\nfox jumps",
    "A slow green turtle walks",
    "很好吃，送得快",
    "很好吃，送得快",
    "a",
    "b",
    "a",
    "",
  ];
  expect(await add(0.9, texts)).toEqual([null, 0, null, null, 2, null, null, 3, null]);
});

test("shingles are 5 characters, 3 in Chinese; a shorter text is one", () => {
  expect(shingles("ab cdEf")).toEqual(new Set(["ab cd", "b cde", " cdef"]));
  expect(shingles("味道很好")).toEqual(new Set(["味道很", "道很好"]));
  expect(shingles("ab")).toEqual(new Set(["ab"]));
  expect(jaccard(new Set(["a", "b"]), new Set(["b", "c"]))).toBeCloseTo(1 / 3, 12);
});

test.each([0.5, 0.7, 0.8, 0.9, 1])("threshold %d: bands find a text that similar with a chance of 99 %", (threshold) => {
  const { bands, rows } = bandsFor(threshold);
  expect(bands * rows).toBeLessThanOrEqual(128);
  expect(1 - (1 - threshold ** rows) ** bands).toBeGreaterThanOrEqual(0.99);
});

test("as many as a comparison of every pair finds, and nothing else", async () => {
  const random = new Random(1);
  const word = () => Array.from({ length: 6 }, () => String.fromCharCode(97 + random.below(26))).join("");
  const texts: string[] = [];
  for (let i = 0; i < 400; i++) {
    const words = Array.from({ length: 20 }, word);
    texts.push(words.join(" "));
    if (i % 2 === 0) texts.push(words.with(random.below(20), word()).join(" ")); // about 0.83 alike
    if (i % 5 === 0) texts.push(words.map((each, k) => (k % 3 === 0 ? word() : each)).join(" ")); // less than half
  }
  const kept: Set<string>[] = [];
  const exact = texts.map((text) => {
    const own = shingles(text);
    const found = kept.some((each) => jaccard(own, each) >= 0.75);
    if (!found) kept.push(own);
    return found;
  });
  const got = (await add(0.75, texts)).map((each) => each !== null);
  const count = (list: readonly boolean[]) => list.filter(Boolean).length;
  expect(count(exact)).toBeGreaterThan(150);
  const missed = texts.filter((_, i) => exact[i] && !got[i]).length;
  expect(missed).toBeLessThanOrEqual(Math.ceil(0.02 * count(exact)));
  expect(texts.filter((_, i) => got[i] && !exact[i])).toEqual([]);
});

test("of thousands of texts that all are alike, each is compared with a few and looked up among a bounded number", async () => {
  const texts = Array.from(
    { length: 3000 },
    (_, i) => `the same beginning of every text, which is quite long, and then ${"x".repeat(i % 7)}${i}`,
  );
  const kept: string[] = [];
  let [compared, most] = [0, 0];
  const duplicates = new Duplicates(1);
  const looked = vi.spyOn(Map.prototype, "set");
  for (const text of texts) {
    const [before, lookups] = [compared, looked.mock.calls.length];
    const like = await duplicates.add(text, async (number) => {
      compared++;
      return kept[number];
    });
    if (like === null) kept.push(text);
    expect(compared - before).toBeLessThanOrEqual(16);
    most = Math.max(most, looked.mock.calls.length - lookups);
  }
  looked.mockRestore();
  expect(kept).toHaveLength(texts.length);
  expect(most).toBeLessThanOrEqual(bandsFor(1).bands * 128);
  expect(compared).toBeGreaterThan(texts.length); // they do meet
});

test("a threshold outside is refused", () => {
  expect(() => new Duplicates(0)).toThrow("it must be above 0 and at most 1");
  expect(() => new Duplicates(1.1)).toThrow("it must be above 0 and at most 1");
});
