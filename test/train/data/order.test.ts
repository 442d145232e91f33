/** Order, packs and splits depend on the seed and the data alone, so that a run goes on exactly where it stopped. */
import { join } from "node:path";
import fc from "fast-check";
import { expect, test } from "vitest";
import { packed, shuffled } from "../../../src/train/data/order.ts";
import { hash32, Random } from "../../../src/train/random.ts";
import { all, bundled, fixtures, openDataset, openFile } from "./files.ts";

const texts = (n: number) => Array.from({ length: n }, (_, i) => ({ text: `row ${i} ${"word ".repeat((i * 7919) % 40)}` }));

test("random numbers stay the same from version to version, every number below n is equally likely, and streams differ", () => {
  const random = new Random(42, "key");
  expect([random.word(), random.word(), random.word(), random.word()]).toEqual([683149305, 169071110, 1006151062, 1138259269]);
  expect(new Random(42, "yek").word()).not.toBe(683149305);
  expect(new Random(43, "key").word()).not.toBe(683149305);
  const counts = new Uint32Array(6);
  for (let i = 0; i < 60_000; i++) counts[random.below(6)]++;
  for (const count of counts) expect(Math.abs(count - 10_000)).toBeLessThan(5 * Math.sqrt(60_000 * (1 / 6) * (5 / 6)));
});

test("hashes of similar texts spread over all buckets", () => {
  const buckets = new Uint32Array(16);
  for (let i = 0; i < 16_000; i++) buckets[hash32(`row ${i}`) >>> 28]++;
  for (const count of buckets) expect(Math.abs(count - 1000)).toBeLessThan(5 * Math.sqrt(1000));
});

test("an order is a permutation; epochs and seeds differ; groups stay together", () => {
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 200 }), fc.nat(), fc.nat(20), (n, seed, epoch) => {
      const order = shuffled(n, seed, epoch);
      expect([...order].sort((a, b) => a - b)).toEqual([...Array(n).keys()]);
      expect(shuffled(n, seed, epoch)).toEqual(order);
    }),
    { seed: 1 },
  );
  expect(shuffled(100, 1, 0)).not.toEqual(shuffled(100, 1, 1));
  expect(shuffled(100, 1, 0)).not.toEqual(shuffled(100, 2, 0));
  const groupOf = (i: number) => (i < 10 ? 0 : i < 40 ? 1 : 2);
  const runs = [...shuffled(100, 3, 0, [0, 10, 40])].map(groupOf).filter((g, i, list) => g !== list[i - 1]);
  expect(runs.toSorted()).toEqual([0, 1, 2]);
});

test("packs hold every example once, none beyond the capacity, and are those of first-fit decreasing", () => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 32 }), { maxLength: 60 }), fc.integer({ min: 1, max: 20 }), (sizes, window) => {
      const order = shuffled(sizes.length, 7, 0);
      const { order: packs, starts } = packed(order, (i) => sizes[i], 32, window);
      expect([...packs].sort((a, b) => a - b)).toEqual([...sizes.keys()]);
      const got = Array.from({ length: starts.length - 1 }, (_, p) => [...packs.subarray(starts[p], starts[p + 1])]);
      const expected = [];
      for (let from = 0; from < order.length; from += window) {
        const bins: number[][] = [];
        const members = [...order.subarray(from, from + window)];
        const place = new Map(members.map((m, i) => [m, i]));
        for (const m of members.toSorted((a, b) => sizes[b] - sizes[a] || (place.get(a) ?? 0) - (place.get(b) ?? 0))) {
          const bin = bins.find((each) => each.reduce((sum, i) => sum + sizes[i], 0) + sizes[m] <= 32);
          if (bin) bin.push(m);
          else bins.push([m]);
        }
        for (const bin of bins) bin.sort((a, b) => (place.get(a) ?? 0) - (place.get(b) ?? 0));
        expected.push(...bins.sort((a, b) => (place.get(a[0]) ?? 0) - (place.get(b[0]) ?? 0)));
      }
      expect(got).toEqual(expected);
    }),
    { seed: 1 },
  );
});

test("packed examples: segments cover the sequence, labels of first tokens are ignored, nothing is lost", async () => {
  const data = await openFile("a.jsonl", texts(50), { packing: true, max_length: 128, overflow: "truncate", packing_window: 20 });
  const epoch = data.epoch(0);
  const seen: string[] = [];
  for (const [position, { input_ids, labels, segments = [] }] of (await all(epoch.rows())).entries()) {
    expect(input_ids.length).toBe(epoch.tokens(position));
    expect(input_ids.length).toBeLessThanOrEqual(128);
    let at = 0;
    for (const [start, length] of segments) {
      expect(start).toBe(at);
      expect(labels.slice(start, start + length)).toEqual([-100, ...input_ids.slice(start + 1, start + length)]);
      seen.push(bundled.decode(input_ids.slice(start, start + length)));
      at += length;
    }
    expect(at).toBe(input_ids.length);
  }
  expect(seen.toSorted()).toEqual(
    texts(50)
      .map(({ text }) => `${text}</s>`)
      .toSorted(),
  );
  const { packing } = data.statistics();
  expect(packing).toEqual({ sequences: epoch.length, filled: data.statistics().tokens / (epoch.length * 128) });
});

test("reading from a position gives what reading from the start gives there, in a data set opened anew", async () => {
  for (const packing of [false, true]) {
    const options = { packing, max_length: 64, overflow: "truncate", seed: 5 } as const;
    const whole = await all((await openFile("a.jsonl", texts(200), options)).epoch(3).rows());
    const again = await openFile("a.jsonl", texts(200), options);
    const from = Math.floor(whole.length / 3);
    expect(await all(again.epoch(3).rows(from))).toEqual(whole.slice(from));
    expect(await again.epoch(3).row(from + 1)).toEqual(whole[from + 1]);
  }
});

test("the fingerprint changes with a row, the order of rows, an option and the template, and with nothing else", async () => {
  const base = (await openFile("a.jsonl", texts(5))).fingerprint;
  expect((await openFile("b.json", JSON.stringify(texts(5)))).fingerprint).toBe(base);
  const others = [
    await openFile("a.jsonl", texts(6)),
    await openFile("a.jsonl", texts(5).toReversed()),
    await openFile("a.jsonl", texts(5), { max_length: 1000 }),
    await openFile("a.jsonl", texts(5), { seed: 1 }),
  ].map(({ fingerprint }) => fingerprint);
  expect(new Set([base, ...others]).size).toBe(5);
});

test("a split: shares as asked, duplicates on one side, the rest where it was when rows are added", async () => {
  const rows = (n: number) => Array.from({ length: n }, (_, i) => ({ text: `text ${i % (n / 2)}`, label: i % 3 }));
  const inputs = async (data: { rows(): AsyncIterable<{ input_ids: readonly number[] }> }) =>
    new Set((await all(data.rows())).map(({ input_ids }) => input_ids.join()));
  const data = await openFile("a.jsonl", rows(2000), { task: "classification" });
  const { train, validation } = data.split(0.1, 4);
  expect(train.length + validation.length).toBe(2000);
  expect(Math.abs(validation.length - 200)).toBeLessThan(60);
  const [left, right] = [await inputs(train), await inputs(validation)];
  for (const each of right) expect(left.has(each)).toBe(false);
  const larger = (await openFile("a.jsonl", rows(4000), { task: "classification" })).split(0.1, 4);
  const kept = await inputs(larger.validation);
  for (const each of right) expect(kept.has(each)).toBe(true);
  expect(data.split(0.1, 5).validation.fingerprint).not.toBe(validation.fingerprint);
  const epoch = await all(validation.epoch(0).rows());
  expect(new Set(epoch.map(({ input_ids }) => input_ids.join()))).toEqual(right);
});

test("a split of chats goes by what the model reads, not by its answers", async () => {
  const rows = Array.from({ length: 400 }, (_, i) => ({ instruction: `Question ${i % 200}`, output: `Answer ${i}` }));
  const { train, validation } = (await openFile("a.jsonl", rows)).split(0.2);
  const questions = async (data: typeof train) =>
    (await all(data.rows())).map(({ input_ids }) => /Question \d+/.exec(bundled.decode(input_ids))?.[0]);
  const left = new Set(await questions(train));
  for (const question of await questions(validation)) expect(left.has(question)).toBe(false);
});

test("an empty part of a split is an error", async () => {
  const data = await openFile("a.jsonl", texts(3));
  expect(() => data.split(0.0001)).toThrow("leaves none for validation: give another fraction, or a file");
  expect(() => data.split(0.9999)).toThrow("leaves none for training");
  expect(() => data.split(1)).toThrow("it must be above 0 and below 1");
});

test("Parquet that fits in memory is mixed across its groups", async () => {
  const data = await openDataset(join(fixtures, "labels.parquet"), { tokenizer: bundled, task: "classification" });
  const first = [];
  for (let i = 0; i < 100; i++) first.push(Number(/\d+/.exec(bundled.decode((await data.epoch(0).row(i)).input_ids))?.[0]));
  expect(first.some((i) => i < 2048) && first.some((i) => i > 2048)).toBe(true);
});
