/** Places and the queue for them: immediate rejection when full, turns between owners, nothing lost however a request leaves. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { Admission, type Place } from "../../../src/server/access/admission.ts";

const limits = { running: 2, queued: 2, perOwner: null, queueSeconds: 10 };

/** Lets promises that can settle do so. */
const settled = () => new Promise((resolve) => setImmediate(resolve));

test("beyond the queue, requests are rejected immediately with the time to retry", async () => {
  const admission = new Admission(limits);
  const places = [await admission.enter("a"), await admission.enter("a")];
  const waiting = [admission.enter("a"), admission.enter("a")];
  const refused = admission.enter("a").catch((error: unknown) => error);
  expect(await Promise.race([refused, settled()])).toMatchObject({ code: "overloaded", retryAfterSeconds: expect.any(Number) });
  expect([admission.running, admission.queued]).toEqual([2, 2]);
  places[0].leave();
  (await waiting[0]).leave();
  (await waiting[1]).leave();
  places[1].leave();
  expect([admission.running, admission.queued]).toEqual([0, 0]);
});

test("owners take turns: one with many queued requests does not delay another", async () => {
  const admission = new Admission({ ...limits, running: 1, queued: 10 });
  const order: string[] = [];
  let current = await admission.enter("x");
  const enter = (owner: string) =>
    admission.enter(owner).then((place) => {
      order.push(owner);
      current = place;
    });
  const all = ["many", "many", "many", "many", "few", "one"].map(enter);
  for (let i = 0; i < all.length; i++) {
    current.leave();
    await settled();
  }
  current.leave();
  await Promise.all(all);
  expect(order).toEqual(["many", "few", "one", "many", "many", "many"]);
});

test("an owner is held to its own limit, while others are admitted", async () => {
  const admission = new Admission({ ...limits, perOwner: 1 });
  const place = await admission.enter("a");
  await expect(admission.enter("a")).rejects.toMatchObject({ code: "overloaded" });
  (await admission.enter("b")).leave();
  place.leave();
  (await admission.enter("a")).leave();
});

test("requests that wait too long are rejected, and these and those that leave free their place in the queue", async () => {
  const admission = new Admission({ ...limits, running: 1, queueSeconds: 0.02 });
  const place = await admission.enter("a");
  const left = new AbortController();
  const gone = admission.enter("b", left.signal);
  const late = admission.enter("c");
  left.abort(new Error("gone"));
  await expect(gone).rejects.toThrow("gone");
  await expect(late).rejects.toMatchObject({ code: "overloaded" });
  expect(admission.queued).toBe(0);
  place.leave();
  place.leave();
  expect(admission.running).toBe(0);
});

test("closing rejects everyone who waits", async () => {
  const admission = new Admission({ ...limits, running: 1 });
  const place = await admission.enter("a");
  const waiting = admission.enter("b");
  admission.close();
  await expect(waiting).rejects.toMatchObject({ code: "not_ready" });
  place.leave();
  expect([admission.running, admission.queued]).toEqual([0, 0]);
});

test("in any order of arrivals and departures, the counts are right and nobody is forgotten", async () => {
  const event = fc.record({ kind: fc.constantFrom("enter", "leave", "abort"), owner: fc.constantFrom("a", "b", "c"), which: fc.nat() });
  await fc.assert(
    fc.asyncProperty(fc.array(event, { maxLength: 60 }), async (events) => {
      const admission = new Admission({ running: 3, queued: 4, perOwner: 5, queueSeconds: 60 });
      const places: Place[] = [];
      const waiting = new Set<AbortController>();
      for (const { kind, owner, which } of events) {
        if (kind === "enter") {
          const controller = new AbortController();
          waiting.add(controller);
          admission
            .enter(owner, controller.signal)
            .then((place) => places.push(place))
            .catch(() => {})
            .finally(() => waiting.delete(controller));
        } else if (kind === "leave" && places.length > 0) places.splice(which % places.length, 1)[0].leave();
        else if (kind === "abort" && waiting.size > 0) [...waiting][which % waiting.size].abort(new Error("gone"));
        await settled();
        expect(admission.running).toBe(places.length);
        expect(admission.queued).toBe(waiting.size);
        expect(admission.running).toBeLessThanOrEqual(3);
        expect(admission.queued === 0 || admission.running === 3).toBe(true);
      }
      for (const controller of waiting) controller.abort(new Error("end"));
      for (const place of places) place.leave();
      await settled();
      expect([admission.running, admission.queued]).toEqual([0, 0]);
      for (let i = 0; i < 3; i++) await admission.enter("a"); // no owner keeps a count of requests that have gone
    }),
    { numRuns: 100 },
  );
});
