/** Large bodies are read in a thread: callers take turns, what is held for them has a bound, and wrong bodies cost what requests cost. */
import { expect, onTestFinished, test } from "vitest";
import { Reader } from "../../../src/server/reading/reader.ts";
import { keyFile } from "../harness.ts";
import { post, startHere } from "../start.ts";

const MB = 2 ** 20;
const BODY = { kind: "body", route: "/tokenize" } as const;

function reader(maxBytes = 4 * MB): Reader {
  const made = new Reader({ maxBytes, maxJsonDepth: 100 });
  onTestFinished(() => made.close());
  return made;
}

/** A body of about this size. */
const body = (bytes: number, text = "x") => Buffer.from(JSON.stringify({ model: "default", text: text.repeat(bytes) }));

test("owners take turns: one's many bodies don't hold up another's", async () => {
  const r = reader();
  await r.read(BODY, body(20_000), "many"); // starts the thread
  const done: string[] = [];
  const ask = async (owner: string) => {
    await r.read(BODY, body(MB), owner);
    done.push(owner);
  };
  await Promise.all([...Array.from({ length: 10 }, () => ask("many")), ask("one")]);
  expect(done.indexOf("one")).toBeLessThan(3); // one ran, and one had its turn
});

test("a body that waits is dropped when its client leaves; others are read", async () => {
  const r = reader();
  const gone = new AbortController();
  const first = r.read(BODY, body(MB), "a");
  const left = r.read(BODY, body(MB), "a", gone.signal);
  const last = r.read(BODY, body(MB), "a");
  gone.abort(new Error("gone"));
  await expect(left).rejects.toThrow("gone");
  for (const each of [first, last]) expect(await each).toMatchObject({ model: "default" });
});

test("a fault in the thread costs the body that it is about, and says so", async () => {
  const r = reader();
  const wrong = r.read({ kind: "message", method: "Nothing" }, body(20_000), "a");
  await expect(wrong).rejects.toThrow(/reading failed/);
  expect(await r.read(BODY, body(20_000), "a")).toMatchObject({ model: "default" });
});

test.each([1, 7, 5000, 20_000, 70_000])("a body in chunks of %i bytes is read as it was sent", async (size) => {
  const r = reader();
  const sent = body(100_000, "añ");
  const arrival = r.arrival("a");
  for (let at = 0; at < sent.length; at += size) arrival.add(Buffer.from(sent.subarray(at, at + size)));
  expect(await arrival.read(BODY)).toEqual({ model: "default", text: "añ".repeat(100_000) });
  arrival.release();
});

test("the bytes that are held have a bound; one body of each owner is always taken", () => {
  const r = reader();
  const arrivals = Array.from({ length: 16 }, () => {
    const arrival = r.arrival("many");
    arrival.add(Buffer.alloc(4 * MB));
    return arrival;
  });
  expect(() => r.arrival("many").add(Buffer.alloc(1))).toThrow(expect.objectContaining({ code: "overloaded", retryAfterSeconds: 1 }));
  const other = r.arrival("other");
  other.add(Buffer.alloc(4 * MB));
  expect(() => r.arrival("other").add(Buffer.alloc(1))).toThrow(expect.objectContaining({ code: "overloaded" }));
  expect(() => other.add(Buffer.alloc(1))).toThrow(expect.objectContaining({ code: "request_too_large" }));
  for (const arrival of arrivals) {
    arrival.release();
    arrival.release();
  }
  r.arrival("many").add(Buffer.alloc(4 * MB));
});

test("a wrong body costs its sender what a request costs, and its place is freed", async () => {
  const { file, secret } = await keyFile({ requestsPerMinute: 2 });
  const { url, server } = await startHere({ keys: file });
  const ask = async (text: string) => (await post(url, "/tokenize", text, { authorization: `Bearer ${secret}` })).status;
  expect([await ask("{}"), await ask(`[${" ".repeat(100_000)}1]`), await ask("{}")]).toEqual([400, 400, 429]);
  await expect.poll(() => server.gate.admission.running).toBe(0);
});
