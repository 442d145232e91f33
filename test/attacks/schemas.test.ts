/**
 * Schemas that are sent to hold the event loop, to exhaust memory or to overflow the stack: each is compiled in slices of bounded
 * work, or refused with a reason. Work is counted in steps, which are the same on every machine; times leave room for a busy one.
 */
import { beforeAll, describe, expect, test } from "vitest";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { GrammarError } from "../../src/grammar/error.ts";
import { checkShape, Grammars } from "../../src/grammar/grammars.ts";
import { Trie } from "../../src/grammar/trie.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

const times = <T>(count: number, make: (i: number) => T): T[] => Array.from({ length: count }, (_, i) => make(i));
const named = (count: number, make: (i: number) => unknown) => Object.fromEntries(times(count, (i) => [`p${i}`, make(i)]));
const nested = (depth: number, wrap: (inner: unknown) => unknown, inner: unknown = { type: "null" }) =>
  times(depth, () => wrap).reduce((value, each) => each(value), inner);
const chain = (count: number, link: (next: object) => object) => ({
  $ref: "#/$defs/d0",
  $defs: Object.fromEntries(times(count, (i) => [`d${i}`, i + 1 < count ? link({ $ref: `#/$defs/d${i + 1}` }) : {}])),
});
const COUNTED = `^${"(".repeat(6)}a{1,1000}${"){1,1000}".repeat(6)}$`;

/** Each with what the answer must say; null: the schema is enforced. */
const ATTACKS: Readonly<Record<string, readonly [schema: unknown, refusal: RegExp | null]>> = {
  "2,100 branches of properties under allOf": [{ allOf: times(2100, (i) => ({ properties: { [`a${i}`]: {} } })) }, /complex/],
  "a product of ten choices of ten": [{ allOf: times(10, () => ({ anyOf: times(10, (i) => ({ minimum: i })) })) }, /complex/],
  "anyOf within anyOf": [nested(60, (inner) => ({ anyOf: [inner, { type: "array" }] })), null],
  "3,000 optional properties": [{ type: "object", properties: named(3000, () => ({})) }, null],
  "5,000 optional properties, half of them at most": [
    { type: "object", properties: named(5000, () => ({})), maxProperties: 2500 },
    /complex/,
  ],
  "3,000 properties and all others": [
    { type: "object", properties: named(3000, () => ({})), additionalProperties: { type: "null" } },
    /complex/,
  ],
  "a choice of 5,000 beside 3,000 values": [{ enum: times(3000, (i) => i), anyOf: new Array(5000).fill({}) }, /complex/],
  "7,000 values": [{ enum: times(7000, (i) => `v${i}`) }, null],
  "6,000 values, each matched with a pattern": [{ enum: times(6000, (i) => `v${i}`), pattern: "^v(1|2)+.*(7|9)$" }, /complex/],
  "1,000 references in a row": [chain(1000, (next) => next), /\/\$defs\/d200: '\$ref' leads back to itself, or through too many/],
  "1,000 references, each within an object": [chain(1000, (next) => ({ type: "object", properties: { x: next } })), null],
  "a reference to itself": [{ $ref: "#" }, /'\$ref' refers to itself/],
  "references to each other": [
    { $ref: "#/$defs/a", $defs: { a: { $ref: "#/$defs/b" }, b: { allOf: [{ $ref: "#/$defs/a" }] } } },
    /at \/\$defs\/b\/allOf\/0: '\$ref' refers to itself/,
  ],
  "a reference with a bare percent sign": [{ $ref: "#/%" }, /'\$ref' "#\/%" is not a valid reference/],
  "an object that always holds another": [{ type: "object", properties: { a: { $ref: "#" } }, required: ["a"] }, /hold another/],
  "repetitions within repetitions": [{ type: "string", pattern: COUNTED }, null],
  "repetitions within repetitions, of bounded length": [{ type: "string", pattern: COUNTED, maxLength: 5000 }, /complex/],
  "a pattern with 2^40 states": [{ type: "string", pattern: "^.*a.{40}$", maxLength: 300 }, /complex/],
  "200 patterns at once": [{ type: "string", allOf: times(200, (i) => ({ pattern: `a.{${i}}b` })) }, /complex/],
  "patterns of names that combine": [{ patternProperties: Object.fromEntries(times(5, (i) => [`a.{${i * 9}}b`, {}])) }, /complex/],
  "200 branches of oneOf that overlap": [{ oneOf: times(200, (i) => ({ required: [`a${i}`] })) }, /complex/],
  "500 branches of oneOf": [
    { oneOf: times(500, (i) => ({ type: "object", properties: { k: { const: `${i}` } }, required: ["k"] })) },
    null,
  ],
  "a negation of 1,000": [{ not: { allOf: times(1000, (i) => ({ minLength: i })) } }, /complex/],
  "20 dependencies": [
    {
      type: "object",
      properties: named(40, () => ({})),
      dependentRequired: Object.fromEntries(times(20, (i) => [`p${i}`, [`p${i + 20}`]])),
    },
    /complex/,
  ],
  "a constant, nested 200 deep": [{ const: nested(200, (inner) => [inner], 1) }, null],
  "a constant, nested 40,000 deep": [{ const: nested(40_000, (inner) => [inner], 1) }, /nested more than 250 deep/],
  "a schema, nested 5,000 deep": [nested(5000, (inner) => ({ items: inner })), /nested more than 250 deep/],
  "a name of 60,000 characters": [{ properties: { ["x".repeat(60_000)]: {} }, additionalProperties: { type: "null" } }, /complex/],
  "a million items that must be contained": [{ type: "array", contains: {}, minContains: 1_000_000 }, /complex/],
  "1,500 of 3,000 items that differ": [
    { type: "array", uniqueItems: true, items: { enum: times(3000, (i) => i) }, minItems: 1500 },
    /complex/,
  ],
  "8,000 leading items": [{ type: "array", prefixItems: times(8000, () => ({})) }, null],
  "numbers beyond 15 digits": [{ type: "number", minimum: 1e300 }, /more than 15 digits/],
  "a megabyte of text": [{ description: "x".repeat(1_000_000) }, /more than the 65536 characters/],
  "a million items in a list": [{ enum: new Array(1_000_000).fill(0) }, /more than the 65536 characters/],
};

/** CPU time of this process in ms: unlike the clock, it does not see what else the machine does. */
function cpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

/** Most CPU time that passed between two turns of the event loop while `work` ran, in ms. */
async function longestBlock<T>(work: Promise<T>): Promise<number> {
  let [longest, last, over] = [0, cpuMs(), false];
  const tick = () => {
    const now = cpuMs();
    longest = Math.max(longest, now - last);
    last = now;
    if (!over) setImmediate(tick);
  };
  setImmediate(tick);
  await work.catch(() => undefined);
  await new Promise(setImmediate);
  over = true;
  return longest;
}

let tokenizer: Tokenizer;
let grammars: Grammars;
beforeAll(async () => {
  tokenizer = await AutoTokenizer.from_pretrained("default");
  grammars = new Grammars(tokenizer, 20480, [2]);
  await grammars.constraint({ kind: "json" }, { param: "x" });
});

describe("schemas", () => {
  test.each(Object.entries(ATTACKS))("%s", async (_name, [schema, refusal]) => {
    const param = "response_format.json_schema.schema";
    const asked = grammars.constraint({ kind: "schema", schema: schema as Record<string, unknown> }, { param });
    const blocked = await longestBlock(asked.then((constraint) => constraint.next()));
    if (refusal === null) await asked;
    else {
      await expect(asked).rejects.toBeInstanceOf(GrammarError);
      await expect(asked).rejects.toMatchObject({ param, message: expect.stringMatching(refusal) });
    }
    if (process.env["BLOCKS"]) console.log(`${blocked.toFixed(1)} ms: ${_name}`);
    expect(blocked).toBeLessThan(400); // of all threads, collecting garbage and compiling code included; before, seconds
  });

  test("128 tools with large schemas share one limit, and those that are not strict take any object beyond it", async () => {
    const parameters = { type: "object", properties: named(50, () => ({})) };
    const tools = times(128, (i) => ({ name: `t${i}`, parameters }));
    const constraint = await grammars.constraint(
      { kind: "calls", tools, tags: ["<a>", "</a>"], several: true, free: false },
      { param: "tools" },
    );
    expect((await constraint.next())?.some((word) => word !== 0)).toBe(true);
    const heavy = times(128, (i) => ({ name: `t${i}`, strict: true, parameters: { type: "object", properties: named(300, () => ({})) } }));
    const asked = grammars.constraint(
      { kind: "calls", tools: heavy, tags: ["<a>", "</a>"], several: true, free: false },
      { param: "tools" },
    );
    await expect(asked).rejects.toMatchObject({ message: expect.stringMatching(/characters|complex/) });
  });

  test("what the command line checks is refused alike", () => {
    for (const [schema, refusal] of Object.values(ATTACKS))
      if (refusal) expect(() => checkShape({ kind: "schema", schema: schema as Record<string, unknown> }, "f.json")).toThrow(refusal);
  });
});

test("an answer of 20,000 open brackets does not overflow the stack", async () => {
  const constraint = await grammars.constraint({ kind: "schema", schema: {} }, { param: "x" });
  const [bracket] = tokenizer.encode("[", { add_special_tokens: false }).slice(-1);
  for (let depth = 0; depth < 20_000; depth++) {
    if (depth % 1000 === 0) await constraint.next();
    constraint.accept(bracket);
  }
  expect((await constraint.next())?.some((word) => word !== 0)).toBe(true);
});

test("the first mask over 100,000 tokens pauses", async () => {
  const words = times(100_000, (i) => new TextEncoder().encode(`${(i * 7919).toString(36)}${i % 3 === 0 ? '", "' : ""}`));
  const bytes = [...times(256, (i) => Uint8Array.of(i)), ...words];
  const vocabulary = { specialIds: [], has: () => true, isSpecial: () => false, bytes: (id: number) => bytes[id], id: () => undefined };
  const big = new Grammars({ vocabulary } as unknown as Tokenizer, bytes.length, [0]);
  await Trie.build(vocabulary, bytes.length);
  const constraint = await big.constraint({ kind: "schema", schema: { type: "string", maxLength: 500 } }, { param: "x" });
  constraint.accept(0x22);
  const blocked = await longestBlock(Promise.resolve(constraint.next()));
  if (process.env["BLOCKS"]) console.log(`${blocked.toFixed(1)} ms: a first mask`);
  expect(blocked).toBeLessThan(400);
});
