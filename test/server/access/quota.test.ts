/** Rates and budgets: what headers report, when they run out, when they reset, and what survives a restart. */
import { readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { Quota } from "../../../src/server/access/quota.ts";
import { temporary } from "../../cli/run.ts";

const NOON = Date.parse("2026-03-01T12:00:00Z");

async function setUp(file: string | null = null) {
  const clock = { now: NOON };
  const failures: unknown[] = [];
  const quota = await Quota.open({ file, onSaveError: (error) => failures.push(error), now: () => clock.now });
  return { quota, clock, failures };
}

test("a rate is a bucket that fills evenly", async () => {
  const { quota, clock } = await setUp();
  const key = { id: "k", requestsPerMinute: 6, tokensPerDay: null };
  expect(quota.allowance(key)).toEqual({ requests: { limit: 6, remaining: 6, resetSeconds: 0 }, tokens: null });
  for (let i = 0; i < 6; i++) quota.take(key);
  expect(quota.allowance(key).requests).toEqual({ limit: 6, remaining: 0, resetSeconds: 60 });
  expect(() => quota.take(key)).toThrow(expect.objectContaining({ code: "rate_limit_exceeded", retryAfterSeconds: 10 }));
  clock.now += 10_000;
  quota.take(key);
  expect(() => quota.take(key)).toThrow("6 requests per minute");
  clock.now += 3_600_000; // no more than full
  expect(quota.allowance(key).requests?.remaining).toBe(6);
});

test("a budget ends at midnight UTC, with the seconds until then", async () => {
  const { quota, clock } = await setUp();
  const key = { id: "k", requestsPerMinute: null, tokensPerDay: 100 };
  quota.take(key);
  quota.charge("k", 60);
  expect(quota.allowance(key).tokens).toEqual({ limit: 100, remaining: 40, resetSeconds: 43_200 });
  quota.charge("k", 60);
  expect(() => quota.take(key)).toThrow(expect.objectContaining({ code: "budget_exceeded", retryAfterSeconds: 43_200 }));
  clock.now += 43_200_000;
  quota.take(key);
  expect(quota.used("k")).toBe(0);
});

test("usage survives a restart on the same day, in a file that only its owner can read", async () => {
  const file = join(temporary(), "keys.json.usage");
  const first = await setUp(file);
  first.quota.charge("k", 70);
  await first.quota.close();
  expect(statSync(file).mode & 0o777).toBe(0o600);
  const second = await setUp(file);
  expect(second.quota.used("k")).toBe(70);
  await second.quota.close();
  writeFileSync(file, JSON.stringify({ day: "2026-02-28", tokens: { k: 5 } }));
  const third = await setUp(file);
  expect(third.quota.used("k")).toBe(0);
  await third.quota.close();
});

test("a broken record is rejected, since ignoring it would reset every budget, and a failed save is reported", async () => {
  const folder = temporary();
  writeFileSync(join(folder, "usage"), "{");
  await expect(setUp(join(folder, "usage"))).rejects.toThrow("not a record of used tokens");
  const { quota, failures } = await setUp(join(folder, "missing", "usage"));
  quota.charge("k", 1);
  await quota.close();
  expect(failures).toHaveLength(1);
  expect(readFileSync(join(folder, "usage"), "utf8")).toBe("{");
});
