/** Long texts are encoded and decoded in a worker thread, with the same result, and the event loop keeps running. */
import { fileURLToPath } from "node:url";
import { expect, onTestFinished, test } from "vitest";
import { AutoTokenizer } from "../../../src/api/tokenizer.ts";
import type { Prompt } from "../../../src/chat/prompt.ts";
import { encodePrompt } from "../../../src/chat/prompt.ts";
import { Turns } from "../../../src/grammar/turns.ts";
import { Encoder } from "../../../src/server/completion/encoder.ts";

const SOURCE = fileURLToPath(new URL("../../../models/small-moe/", import.meta.url));
const tokenizer = await AutoTokenizer.from_pretrained(SOURCE);

function encoder(source = SOURCE): Encoder {
  const made = new Encoder(source, tokenizer);
  onTestFinished(() => made.close());
  return made;
}

const chat = (content: string, more: Partial<Prompt & { kind: "chat" }> = {}): Prompt => ({
  kind: "chat",
  messages: [{ role: "user", content }],
  tools: [],
  toolChoice: "none",
  oneToolCall: false,
  templateVariables: {},
  ...more,
});
const LONG = "The train leaves at nine. 今天天气很好。<|end_of_sentence|> ".repeat(2000);

test.each<[string, Prompt]>([
  ["a text", { kind: "text", text: LONG }],
  ["a conversation", chat(LONG)],
  ["tools that are long", chat("Hi", { tools: [{ name: "f", description: LONG }], toolChoice: "auto" })],
])("%s: the same ids as in place", async (_name, prompt) => {
  expect(await encoder().encode(prompt)).toEqual(encodePrompt(tokenizer, prompt));
});

test("long lists of ids decode to the same text as on the main thread", async () => {
  const ids = tokenizer.encode(LONG);
  expect(ids.length).toBeGreaterThan(8192);
  expect(await encoder().decode(ids, false)).toBe(tokenizer.decode(ids));
  expect(await encoder().decode(ids, true)).toBe(tokenizer.decode(ids, { skip_special_tokens: true }));
});

test("what the template rejects is the user's error, long or short", async () => {
  for (const content of ["x", LONG]) {
    const refused = encoder().encode(chat(content, { messages: [{ role: "nobody" as "user", content }] }));
    await expect(refused).rejects.toMatchObject({ name: "PromptError", param: "messages" });
  }
});

test("millions of characters do not block the event loop", async () => {
  const e = encoder();
  await e.encode(chat(LONG)); // starts the thread
  const text = "The train leaves the station at nine. ".repeat(60_000);
  // The event loop turns freely until the answer arrives; encoded in place, the text would leave it two or three turns.
  let turns = 0;
  let done = false;
  const count = () => {
    turns++;
    if (!done) setImmediate(count);
  };
  count();
  const { tokens } = await e.encode({ kind: "text", text });
  done = true;
  expect(tokens.length).toBeGreaterThan(400_000);
  expect(turns).toBeGreaterThan(50);
});

test("nothing is encoded for a client that has left; others are served", async () => {
  const e = encoder();
  const gone = new AbortController();
  const first = e.encode(chat(LONG));
  const left = e.encode(chat(LONG), gone.signal);
  const other = chat(`${LONG} Another one.`);
  const last = e.encode(other);
  gone.abort(new Error("gone"));
  await expect(left).rejects.toThrow("gone");
  expect(await first).toEqual(encodePrompt(tokenizer, chat(LONG)));
  expect(await last).toEqual(encodePrompt(tokenizer, other));
});

test("a thread that cannot start fails its requests with the reason; one that was ended starts again", async () => {
  await expect(encoder("/no/such/folder").encode(chat(LONG))).rejects.toThrow("/no/such/folder");
  const e = encoder();
  await e.encode(chat(LONG));
  const waiting = e.encode(chat(LONG));
  await Promise.all([expect(waiting).rejects.toThrow("unloaded"), e.close()]);
  expect((await e.encode(chat(LONG))).tokens.length).toBeGreaterThan(1000);
});

test("owners take turns: one's many long prompts don't hold up another's", async () => {
  const e = encoder();
  const done: string[] = [];
  const ask = async (owner: string) => {
    await e.encode({ kind: "text", text: LONG }, undefined, { owner });
    done.push(owner);
  };
  await Promise.all([...Array.from({ length: 6 }, () => ask("many")), ask("one")]);
  expect(done.indexOf("one")).toBeLessThan(3); // one ran, and one had its turn
});

test("a running job ends when its client leaves", async () => {
  const e = encoder();
  const gone = new AbortController();
  await e.encode(chat(LONG)); // starts the thread
  const start = performance.now();
  await e.encode({ kind: "text", text: LONG });
  const perCharacter = (performance.now() - start) / LONG.length;
  const text = "The train leaves at nine. ".repeat(1_500_000);
  const left = e.encode({ kind: "text", text }, gone.signal);
  setTimeout(() => gone.abort(new Error("gone")), 200);
  await expect(left).rejects.toThrow("gone");
  const since = performance.now();
  await e.encode({ kind: "text", text: LONG });
  // Without its end, the other would have waited for all of it.
  expect(performance.now() - since).toBeLessThan((perCharacter * text.length) / 2);
}, 60_000);

test.each<[string, Prompt, string]>([
  ["a text", { kind: "text", text: "word ".repeat(100_000) }, "prompt"],
  ["a conversation", chat("word ".repeat(100_000)), "messages"],
  ["parts", chat("", { messages: [{ role: "user", content: [{ type: "text", text: "word ".repeat(100_000) }] }] }), "messages"],
])("%s that can't fit is refused by its length, and not encoded", async (_name, prompt, param) => {
  const e = encoder("/no/such/folder"); // its thread can't start
  await expect(e.encode(prompt, undefined, { mostTokens: 4096 })).rejects.toMatchObject({
    code: "context_length_exceeded",
    param,
    message: expect.stringMatching(/the prompt has 500000 characters; no text of more than \d+ fits the 4096 tokens/),
  });
  await expect(e.encode(prompt, undefined, { mostTokens: 500_000 })).rejects.toThrow("/no/such/folder");
});

test("short jobs of owners take turns as well", async () => {
  const turns = new Turns();
  const order: string[] = [];
  const ask = (owner: string, i: number) => turns.take(() => order.push(`${owner}${i}`), owner);
  await Promise.all([0, 1, 2, 3].map((i) => ask("a", i)).concat([0, 1].map((i) => ask("b", i))));
  expect(order).toEqual(["a0", "b0", "a1", "b1", "a2", "a3"]);
});

test("a burst is handled one by one, each in its own turn of the event loop", async () => {
  const turns = new Turns();
  let turn = 0;
  const tick = () => {
    if (++turn < 100) setImmediate(tick);
  };
  setImmediate(tick);
  const seen = await Promise.all(Array.from({ length: 5 }, () => turns.next().then(() => turn)));
  expect(seen).toEqual([0, 1, 2, 3, 4].map((i) => seen[0] + i));
});

test("short jobs run in order, and everything else gets its turn in between", async () => {
  const turns = new Turns();
  const order: number[] = [];
  let timers = 0;
  const timer = setInterval(() => timers++, 1);
  const busy = (i: number) => {
    const until = performance.now() + 3;
    while (performance.now() < until);
    order.push(i);
    if (i === 7) throw new Error("seven");
    return i;
  };
  const done = await Promise.allSettled(Array.from({ length: 20 }, (_, i) => turns.take(() => busy(i))));
  clearInterval(timer);
  expect(order).toEqual(done.map((_, i) => i));
  expect(done.map(({ status }) => status).indexOf("rejected")).toBe(7);
  expect(timers).toBeGreaterThan(5);
});
