/** Grammars alone: tokens drawn at random from their masks, without a model, still satisfy the schema. Long because all parts share its walker. */
import { isIPv4, isIPv6 } from "node:net";
import { Ajv2020 } from "ajv/dist/2020.js";
import fc from "fast-check";
import { beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { Automaton } from "../../src/grammar/automaton.ts";
import { GrammarError } from "../../src/grammar/error.ts";
import { Grammars, type Shape } from "../../src/grammar/grammars.ts";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { Trie } from "../../src/grammar/trie.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

const VOCABULARY = 20480;
const ENDS = [2, 5];
let tokenizer: Tokenizer;
let grammars: Grammars;
/** Tokens that close something: quotes, brackets, the marks within an address. */
let closers: ReadonlySet<number>;
beforeAll(async () => {
  tokenizer = await AutoTokenizer.from_pretrained("default");
  grammars = new Grammars(tokenizer, VOCABULARY, ENDS);
  closers = new Set(allowed(null).filter((id) => /^["\]}@.]$/.test(tokenizer.decode([id]))));
});

function allowed(mask: Int32Array | null): number[] {
  const ids: number[] = [];
  for (let word = 0; word < VOCABULARY / 32; word++)
    for (let bits = mask ? mask[word] : -1; bits !== 0; bits &= bits - 1) ids.push(word * 32 + 31 - Math.clz32(bits & -bits));
  return ids;
}

/** A text that the shape allows, its tokens chosen by `random` (from 0 to 1); after `patience` tokens it ends as soon as it can. */
async function drawn(shape: Shape, random: () => number, options: { patience?: number; insideReasoning?: boolean } = {}): Promise<string> {
  const { patience = 60, insideReasoning = false } = options;
  const constraint = await grammars.constraint(shape, { param: "x", after: insideReasoning ? "</think>" : null });
  const ids: number[] = [];
  for (let step = 0; step < 3000; step++) {
    const all = allowed(await constraint.next());
    expect(all).not.toEqual([]);
    const others = all.filter((id) => !ENDS.includes(id));
    const ends = all.length - others.length;
    if (others.length === 0 || (ends > 0 && step >= patience)) return tokenizer.decode(ids, { skip_special_tokens: false });
    // After a while, prefer tokens that close something, so that it ends.
    const closing = step < patience ? [] : others.filter((id) => closers.has(id));
    const pool = closing.length > 0 ? closing : others;
    const id = pool[Math.min(pool.length - 1, Math.floor(random() * pool.length))];
    ids.push(id);
    constraint.accept(id);
  }
  throw new Error(`no end after ${ids.length} tokens: ${tokenizer.decode(ids).slice(-300)}`);
}

/** Numbers that repeat with their seed (https://en.wikipedia.org/wiki/Linear_congruential_generator). */
function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

const object = (properties: object, required = Object.keys(properties), more: object = { additionalProperties: false }) => ({
  type: "object",
  properties,
  required,
  ...more,
});
const tree = {
  type: "object",
  properties: { name: { type: "string", maxLength: 3 }, children: { type: "array", items: { $ref: "#" }, maxItems: 2 } },
};

const SCHEMAS: Readonly<Record<string, object>> = {
  "any value": {},
  "any object": { type: "object" },
  "text of bounded length, in characters": { type: "string", minLength: 2, maxLength: 5 },
  "text of one length": { type: "string", minLength: 3, maxLength: 3 },
  "whole numbers within bounds": { type: "integer", minimum: -17, maximum: 1203 },
  "whole numbers, one bound excluded": { type: "integer", exclusiveMinimum: 99, maximum: 100 },
  "whole numbers below zero": { type: "integer", maximum: -5 },
  "all safe whole numbers": { type: "integer", minimum: -9007199254740991, maximum: 9007199254740991 },
  "numbers within bounds": { type: "number", minimum: 0, maximum: 1 },
  "numbers between decimals": { type: "number", exclusiveMinimum: 0.25, maximum: 0.5 },
  "numbers of both signs": { type: "number", minimum: -1.5, exclusiveMaximum: 2.25 },
  "any number": { type: "number" },
  "several types": { type: ["integer", "boolean", "null"] },
  "type by keywords": { minLength: 1, maxLength: 4 },
  "enum of everything": { enum: ["a", "ab", 'q"uote', 1, 1.5, true, null, { k: [1, "二"] }, []] },
  "enum by type": { type: ["string", "null"], enum: ["a", 1, null] },
  constant: { const: { a: ["b", 2] } },
  "optional members": object({ a: { type: "boolean" }, b: { const: 1 }, c: { enum: ["x", "y"] } }, ["b"]),
  "no members": object({}),
  "open members, of one type": {
    type: "object",
    additionalProperties: { type: "integer", minimum: 0, maximum: 9 },
    minProperties: 1,
    maxProperties: 3,
  },
  "named and open members": object({ id: { type: "string", maxLength: 4 }, ideal: { type: "null" } }, ["id"], {
    additionalProperties: { type: "boolean" },
  }),
  "required without a schema": { type: "object", required: ["x"], properties: { y: { type: "null" } } },
  "names that need escapes": object({ 'a"b\\c\n': { type: "boolean" }, 名: { type: "null" } }),
  "items within bounds": { type: "array", items: { enum: [1, 2] }, minItems: 2, maxItems: 4 },
  "exactly none": { type: "array", maxItems: 0 },
  tuple: { type: "array", prefixItems: [{ type: "boolean" }, { type: "null" }], items: { const: 7 }, minItems: 1, maxItems: 5 },
  "tuple, open": { type: "array", prefixItems: [{ type: "boolean" }], minItems: 3, maxItems: 3 },
  "a tree": { ...tree, required: ["name"] },
  "definitions that use each other": {
    $ref: "#/$defs/a",
    $defs: { a: object({ b: { anyOf: [{ $ref: "#/$defs/b" }, { type: "null" }] } }), b: object({ a: { $ref: "#/$defs/a" } }, []) },
  },
  "all of": {
    allOf: [object({ a: { type: "integer" } }, ["a"], {}), { properties: { a: { minimum: 3, maximum: 5 } } }, { required: ["a"] }],
  },
  "one of, told apart by a constant": {
    oneOf: [object({ kind: { const: "cat" }, lives: { const: 9 } }), object({ kind: { const: "dog" }, good: { const: true } })],
  },
  "any of beside keywords": {
    type: "object",
    required: ["a"],
    anyOf: [{ properties: { a: { const: 1 } } }, { properties: { a: { const: 2 } } }],
  },
  "pattern, whole": { type: "string", pattern: '^[A-Z]{2,3}(-\\d+|\\+[^a-z"]?)$' },
  "pattern, part": { type: "string", pattern: "^.?a.c" },
  "pattern of what must be escaped": { type: "string", pattern: '^["\\\\\\n]{1,4}\\/$' },
  "pattern of all kinds": { type: "string", pattern: "^(?:[\\w.]{1,3}|\\s\\S\\D\\W|[\\u4e00-\\u9fff]{2}|x{0}y??z*?|[^\\d\\-\\]]+)$" },
  ...Object.fromEntries(
    ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"].map((format) => [
      `format ${format}`,
      { type: "string", format },
    ]),
  ),
};

/** The definition of each format, independent of the grammar. */
const FORMATS: Readonly<Record<string, (text: string) => boolean>> = {
  date: (text) => new Date(`${text}T00:00:00Z`).toISOString().startsWith(text),
  time: (text) => !Number.isNaN(Date.parse(`2000-01-01T${text}`)),
  "date-time": (text) => !Number.isNaN(Date.parse(text)),
  duration: (text) => /^P(?=.)(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?$/.test(text),
  email: (text) => /^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$/.test(text),
  hostname: (text) => new URL(`http://${text}/`).hostname === text,
  ipv4: (text) => isIPv4(text),
  ipv6: (text) => isIPv6(text),
  uri: (text) => URL.canParse(text),
  uuid: (text) => /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(text),
};

describe("any choice from the masks satisfies the schema", () => {
  const ajv = new Ajv2020({ strict: false, formats: FORMATS });
  test.each(Object.entries(SCHEMAS))("%s", async (_name, schema) => {
    const valid = ajv.compile(schema);
    for (let seed = 1; seed <= 6; seed++) {
      const text = await drawn({ kind: "schema", schema: schema as Record<string, unknown> }, seeded(seed), { patience: seed * 9 });
      expect(valid(JSON.parse(text)), `${text}: ${ajv.errorsText(valid.errors)}`).toBe(true);
    }
  });

  test("what zod writes for its formats, maps and unions is understood", async () => {
    const schema = z.object({
      mail: z.email(),
      id: z.uuid(),
      day: z.iso.date(),
      at: z.iso.datetime(),
      address: z.ipv4(),
      counts: z.record(z.string().max(3), z.int().min(0).max(9)),
      either: z.discriminatedUnion("kind", [
        z.object({ kind: z.literal("a") }),
        z.object({ kind: z.literal("b"), n: z.number().min(0).max(1) }),
      ]),
      pair: z.tuple([z.boolean(), z.null()]),
      maybe: z.string().max(4).nullable(),
      size: z.number().positive().optional(),
    });
    const shape = { kind: "schema", schema: z.toJSONSchema(schema) as Record<string, unknown> } as const;
    for (let seed = 1; seed <= 6; seed++) {
      const text = await drawn(shape, seeded(seed), { patience: 40 * seed });
      expect(schema.safeParse(JSON.parse(text)).error?.message, text).toBe(undefined);
    }
  });

  test("json_object is an object", async () => {
    for (let seed = 1; seed <= 20; seed++) {
      const value = JSON.parse(await drawn({ kind: "json" }, seeded(seed), { patience: seed * 4 }));
      expect(Object.prototype.toString.call(value)).toBe("[object Object]");
    }
  });
});

/** Whether the grammar accepts a complete text. */
const writes = async (schema: object, text: string): Promise<boolean> => {
  const constraint = await grammars.constraint({ kind: "schema", schema: schema as Record<string, unknown> }, { param: "x" });
  for (const id of tokenizer.encode(text, { add_special_tokens: false })) {
    const mask = await constraint.next();
    if (mask && !((mask[id >> 5] >>> (id & 31)) & 1)) return false;
    constraint.accept(id);
  }
  const after = allowed(await constraint.next());
  return ENDS.every((id) => after.includes(id));
};

describe("the grammar accepts what is valid", () => {
  test("any JSON, compact, spaced or indented, split into tokens anywhere", async () => {
    await fc.assert(
      fc.asyncProperty(fc.jsonValue({ maxDepth: 4 }), fc.constantFrom(undefined, 1, 2, 4), async (value, indent) => {
        fc.pre(!/\d{16}|e[+-]\d{3}/.test(JSON.stringify(value))); // numbers are written with at most 15 digits
        fc.pre(!/\\u(?!00)/.test(JSON.stringify(value)));
        expect(await writes({}, JSON.stringify(value, null, indent))).toBe(true);
      }),
      { numRuns: 150 },
    );
  });

  test("every integer within bounds, and none beyond", async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: -3000, max: 3000 }), fc.nat(400), fc.integer({ min: -4000, max: 4000 }), async (low, span, n) => {
        const schema = { type: "integer", minimum: low, maximum: low + span };
        expect(await writes(schema, String(n))).toBe(n >= low && n <= low + span);
        expect(await writes(schema, String(low))).toBe(true);
        expect(await writes(schema, String(low + span))).toBe(true);
      }),
      { numRuns: 150 },
    );
  });

  test("texts that a pattern matches, as RegExp says", async () => {
    const patterns = [
      "^a(b|cd)*e?$",
      "^[^x]{2,3}$",
      "b+c",
      "^(a|b)|c$",
      "^\\d{2}(:\\d\\d){0,2}$",
      "^$",
      "^[a-c-]\\.?$",
      "^(a?){3}b$",
      "é|ü$",
    ];
    const texts = fc.oneof(
      fc.stringMatching(/^[a-ex0-2:.\-éü]{0,6}$/),
      fc.constantFrom("abcdcde", "00:11", "00:11:22", "aab", "c", "abc", "-."),
    );
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...patterns), texts, async (pattern, text) => {
        expect(await writes({ type: "string", pattern }, JSON.stringify(text))).toBe(new RegExp(pattern, "u").test(text));
      }),
      { numRuns: 400 },
    );
  });

  test("lengths count characters, not bytes or escapes", async () => {
    for (const text of ["日本語", "😀😀😀", 'a"\n', "é\\b"]) {
      expect(await writes({ type: "string", minLength: 3, maxLength: 3 }, JSON.stringify(text))).toBe(true);
      expect(await writes({ type: "string", maxLength: 2 }, JSON.stringify(text))).toBe(false);
      expect(await writes({ type: "string", minLength: 4 }, JSON.stringify(text))).toBe(false);
    }
  });
});

test.each([
  [{ type: "banana" }, 'type "banana" is not known'],
  [{ type: "string", minLength: 5, maxLength: 2 }, "no text satisfies the lengths"],
  [{ type: "integer", minimum: 5, maximum: 4 }, "no number lies between"],
  [{ type: "number", multipleOf: 0.3 }, "'multipleOf' 0.3 is not supported"],
  [{ type: "array", uniqueItems: true }, "'uniqueItems' is not supported"],
  [{ not: {} }, "no value is valid"],
  [{ not: { format: "date" } }, "'format' within 'not' can't be enforced"],
  [{ type: "object", properties: { a: { if: { format: "date" }, else: true } } }, "at /properties/a/if: 'format' within 'if'"],
  [{ type: "array", contains: {}, maxContains: 2 }, "'maxContains' is not supported"],
  [{ type: "string", pattern: "(?<=a)b" }, "look-around, which is not supported"],
  [{ type: "string", pattern: "(a" }, "is not a regular expression"],
  [{ type: "string", pattern: "\\bword" }, "\\b, which is not supported"],
  [{ type: "string", format: "regex" }, `'format' "regex" is not supported`],
  [{ $ref: "#/$defs/none" }, "leads nowhere"],
  [{ $ref: "#/%" }, `'$ref' "#/%" is not a valid reference`],
  [{ $ref: "#" }, "refers to itself"],
  [{ $ref: "https://example.com/s" }, "only references within the schema"],
  [{ anyOf: [{ $ref: "#" }] }, "refers to itself"],
  [{ type: "object", properties: { a: { $ref: "#" } }, required: ["a"] }, "every value would have to hold another"],
  [{ oneOf: [{ type: "object" }, { type: "object" }] }, "no value is valid"],
  [{ oneOf: [{ format: "date" }, { format: "time" }] }, "'format' within 'oneOf' can't be enforced"],
  [{ allOf: [{ type: "string" }, { type: "null" }] }, "no value is valid"],
  [{ type: "object", required: ["a"], additionalProperties: false }, "no value is valid"],
  [{ type: "object", properties: 3 }, "'properties' must be an object"],
  [{ enum: [] }, "no value is valid"],
  [{ properties: { a: false }, required: ["a"] }, "no value is valid"],
  [{ description: "x".repeat(70_000) }, "more than the 65536 characters"],
  [{ const: 3, enum: [1, 2] }, "no value is valid"],
  [{ enum: [1, 2, 3], anyOf: [{ const: 4 }] }, "no value is valid"],
  [{ type: "string", pattern: "a".repeat(9000) }, "8192 are supported"],
  [{ type: "string", pattern: "a{99999999999999999999999999}" }, "which is not supported"],
  [{ oneOf: [{ const: { a: 1, b: 2 } }, { const: { b: 2, a: 1 } }] }, "no value is valid"],
  [{ oneOf: Array.from({ length: 400 }, (_, i) => ({ minLength: i })) }, "at most 200 are supported"],
  [{ $schema: "http://json-schema.org/draft-07/schema#", prefixItems: [{}] }, "'prefixItems' is not supported: draft-07"],
  [{ $schema: "http://example.com/own" }, "'$schema' \"http://example.com/own\" is not supported"],
  [{ nullable: true }, "'nullable' is not supported"],
  // Small enough to be sent, but each branch would read again what stands beside it.
  [{ enum: Array.from({ length: 3000 }, (_, i) => i), anyOf: new Array(5000).fill({}) }, "too complex"],
])("%j is rejected: %s", async (schema, message) => {
  const refused = grammars.constraint(
    { kind: "schema", schema: schema as Record<string, unknown> },
    { param: "response_format.json_schema.schema" },
  );
  await expect(refused).rejects.toBeInstanceOf(GrammarError);
  await expect(refused).rejects.toMatchObject({
    param: "response_format.json_schema.schema",
    message: expect.stringContaining(message),
  });
});

test("what JSON can't hold is rejected: a bigint, a schema that contains itself", async () => {
  const self: Record<string, unknown> = { type: "array" };
  self["items"] = self;
  for (const [schema, message] of [
    [{ minimum: 1n }, "the schema has the bigint 1"],
    [self, "nested more than 250 deep"],
  ] as const)
    await expect(grammars.constraint({ kind: "schema", schema }, { param: "x" })).rejects.toThrow(message);
});

test("deeply nested schemas are rejected rather than overflowing the stack", async () => {
  let schema: object = { type: "null" };
  for (let depth = 0; depth < 500; depth++) schema = { type: "array", items: schema };
  await expect(grammars.constraint({ kind: "schema", schema: schema as Record<string, unknown> }, { param: "x" })).rejects.toThrow(
    "nested more than 250 deep",
  );
});

test("the grammar rejects what other keywords of the schema forbid", async () => {
  const any = { additionalProperties: true };
  expect(await writes({ type: "object", unevaluatedProperties: false }, '{"x":1}')).toBe(false);
  expect(await writes({ type: "object", unevaluatedProperties: false }, "{}")).toBe(true);
  expect(await writes({ type: "array", unevaluatedItems: false }, "[1]")).toBe(false);
  expect(await writes({ const: "a", enum: ["a", "b"] }, '"a"')).toBe(true);
  for (const name of ['a"b', "a\\b", "a\nb"]) {
    const schema = { type: "object", properties: { [name]: any }, additionalProperties: { type: "null" } };
    for (const text of ['{"a"c":null}', '{"a\\x":null}', '{"a\nc":null}']) expect(await writes(schema, text)).toBe(false);
    expect(await writes(schema, '{"az":null}')).toBe(true);
    expect(await writes(schema, `{${JSON.stringify(name)}:{}}`)).toBe(true);
  }
});

test("a class that excludes thousands of characters excludes each of them", async () => {
  const some = Array.from({ length: 8000 }, (_, i) => String.fromCodePoint(0x4e00 + 2 * i));
  const schema = { type: "string", pattern: `^[^${some.join("")}]$` };
  expect(await writes(schema, JSON.stringify(some[777]))).toBe(false);
  expect(await writes(schema, JSON.stringify(String.fromCodePoint(0x4e01)))).toBe(true);
});

test("memory stays bounded over a long answer to an ambiguous schema", async () => {
  const items = { anyOf: Array.from({ length: 300 }, (_, i) => ({ type: "string", minLength: 3000 + i })) };
  const trie = await Trie.build(tokenizer.vocabulary, VOCABULARY);
  const automaton = new Automaton(schemaGrammar({ type: "array", items }), trie, ENDS, new Map());
  const [open, a] = [...tokenizer.encode('["', { split_special_tokens: true }), ...tokenizer.encode("a")].slice(-2);
  let state = automaton.start;
  for (const id of tokenizer.encode('["', { split_special_tokens: true })) state = automaton.accept(state, id) ?? expect.fail(`${open}`);
  let most = 0;
  let first: Int32Array | null = null;
  for (let step = 0; step < 1500; step++) {
    const mask = automaton.mask(state);
    first ??= mask;
    if (step === 1499) expect(mask).toEqual(first); // and the mask is the same as at first
    state = automaton.accept(state, a) ?? expect.fail("refused");
    most = Math.max(most, automaton.kept);
  }
  expect(most).toBeLessThan(200_000);
  expect(most).toBeGreaterThan(50_000); // it did evict
}, 300_000);

test("deliberately ambiguous patterns cost a bounded number of frames per token", async () => {
  const trie = await Trie.build(tokenizer.vocabulary, VOCABULARY);
  for (const pattern of ["^((a|aa|aaa|.){0,50}){0,50}b$", "^((.{0,99}b){0,9}.){0,99}$", "(a*)*(a*)*(a*)*b"]) {
    const automaton = new Automaton(schemaGrammar({ type: "string", pattern }), trie, ENDS, new Map());
    const random = seeded(7);
    let state = automaton.start;
    let most = 0;
    for (let step = 0; step < 25; step++) {
      const before = automaton.kept;
      const ids = allowed(automaton.mask(state)).filter((id) => !ENDS.includes(id));
      most = Math.max(most, automaton.kept - before);
      if (ids.length === 0) break;
      state = automaton.accept(state, ids[Math.floor(random() * ids.length)]) ?? expect.fail("refused");
    }
    expect(most).toBeLessThan(25_000);
  }
});

describe("calls of tools", () => {
  const tools = [
    { name: "add", strict: true, parameters: object({ a: { type: "integer", minimum: 0, maximum: 9 }, b: { type: "boolean" } }) },
    { name: "stop" },
  ];
  const CALL = /<tool_call>(.*?)<\/tool_call>/gs;
  const check = (text: string) => {
    const calls = [...text.matchAll(CALL)].map(([, body]) => JSON.parse(body) as { name: string; arguments: Record<string, unknown> });
    for (const call of calls) {
      expect(Object.keys(call)).toEqual(["name", "arguments"]);
      if (call.name === "add") expect(call.arguments).toEqual({ a: expect.any(Number), b: expect.any(Boolean) });
      else expect([call.name, typeof call.arguments]).toEqual(["stop", "object"]);
    }
    return calls;
  };

  test("exactly one if one is required, several if allowed, and nothing besides", async () => {
    for (let seed = 1; seed <= 15; seed++) {
      const one = await drawn({ kind: "calls", tools, tags: ["<tool_call>", "</tool_call>"], several: false, free: false }, seeded(seed), {
        patience: 30,
      });
      expect(check(one)).toHaveLength(1);
      const several = await drawn(
        { kind: "calls", tools, tags: ["<tool_call>", "</tool_call>"], several: true, free: false },
        seeded(seed),
        { patience: 60 },
      );
      expect(check(several).length).toBeGreaterThan(0);
      expect(several.replace(CALL, "").trim()).toBe("");
    }
  });

  test.each([
    ["no schema", undefined],
    ["an empty schema", {}],
    ["a title only", { title: "T" }],
    ["any of several types", { type: ["string", "object", "null"] }],
    ["a choice with other types", { anyOf: [{ type: "string" }, { type: "object", properties: { a: { const: 1 } }, required: ["a"] }] }],
    ["a reference to such a choice", { $ref: "#/$defs/x", $defs: { x: { oneOf: [{ type: "null" }, { type: "object" }] } } }],
    ["keywords of other types beside", { minLength: 3, properties: { a: { type: "null" } } }],
    ["constants", { enum: ["two", 2, { a: 1 }] }],
    ["a negation", { not: { type: "string" } }],
  ])("arguments are an object under %s, strict or not, required or free", async (_name, parameters) => {
    for (const [strict, free] of [
      [true, false],
      [false, false],
      [true, true],
    ]) {
      const tool = { name: "t", strict, ...(parameters ? { parameters } : {}) };
      for (let seed = 1; seed <= 4; seed++) {
        const shape = { kind: "calls", tools: [tool], tags: ["<tool_call>", "</tool_call>"], several: false, free } as const;
        const text = await drawn(shape, seeded(seed), { patience: free ? 1 : 25 });
        for (const [, body] of text.matchAll(CALL))
          expect(JSON.parse(body)).toEqual({ name: "t", arguments: expect.objectContaining({}) as unknown });
        for (const [, body] of text.matchAll(CALL))
          expect(Object.prototype.toString.call((JSON.parse(body) as { arguments: unknown }).arguments)).toBe("[object Object]");
        if (!free) expect([...text.matchAll(CALL)]).toHaveLength(1);
      }
    }
  });

  test.each([[{ type: "string" }], [{ enum: ["two"] }], [{ type: "array", items: {} }]])(
    "strict parameters that no object satisfies are refused: %j",
    async (parameters) => {
      const tools = [{ name: "t", strict: true, parameters }];
      const asked = grammars.constraint({ kind: "calls", tools, tags: ["<a>", "</a>"], several: false, free: false }, { param: "tools" });
      await expect(asked).rejects.toMatchObject({
        param: "tools[0].function.parameters",
        message: expect.stringContaining("no value is valid"),
      });
    },
  );

  test("among text: free until a call begins, then held to its schema; an incomplete call cannot end the answer", async () => {
    const { vocabulary } = tokenizer;
    const constraint = await grammars.constraint(
      { kind: "calls", tools, tags: ["<tool_call>", "</tool_call>"], several: true, free: true },
      { param: "tools" },
    );
    for (const id of tokenizer.encode("Let me see <tool", { split_special_tokens: true })) constraint.accept(id);
    const free = allowed(await constraint.next());
    expect(ENDS.every((id) => free.includes(id))).toBe(true);
    expect(free.length).toBeGreaterThan(VOCABULARY * 0.99);
    constraint.accept(vocabulary.id("<tool_call>") ?? -1);
    const bound = allowed(await constraint.next());
    expect(bound.some((id) => ENDS.includes(id))).toBe(false);
    expect(new Set(bound.map((id) => tokenizer.decode([id]).trim()[0]))).toEqual(new Set(["{", undefined]));
  });

  test("a mark that is plain text begins a call as well", async () => {
    const constraint = await grammars.constraint(
      { kind: "calls", tools, tags: ["<tool_call>", "</tool_call>"], several: true, free: true },
      { param: "tools" },
    );
    for (const id of tokenizer.encode("so <<tool_call>", { split_special_tokens: true })) constraint.accept(id);
    expect(allowed(await constraint.next()).length).toBeLessThan(40);
  });

  test("after the reasoning, which is unconstrained but must end", async () => {
    const constraint = await grammars.constraint({ kind: "schema", schema: { enum: ["yes", "no"] } }, { param: "x", after: "</think>" });
    const reasoning = allowed(await constraint.next());
    expect(reasoning.length).toBe(VOCABULARY - ENDS.length);
    for (const id of tokenizer.encode("hmm, well")) constraint.accept(id);
    constraint.accept(tokenizer.vocabulary.id("</think>") ?? -1);
    expect(new Set(allowed(await constraint.next()).map((id) => tokenizer.decode([id])[0]))).toEqual(new Set(["\n", '"']));
  });
});

test("the tree of a vocabulary finds each token by its bytes", async () => {
  const trie = await Trie.build(tokenizer.vocabulary, VOCABULARY);
  for (let id = 0; id < VOCABULARY; id++) {
    if (tokenizer.vocabulary.isSpecial(id)) continue;
    let node = 0;
    for (const byte of tokenizer.vocabulary.bytes(id)) {
      node = trie.child[node];
      while (trie.byte[node] !== byte) node = trie.sibling[node];
    }
    let found = trie.token[node];
    while (found !== id && found >= 0) found = trie.same[found];
    if (found !== id) expect.fail(`token ${id} is not where its bytes lead`);
  }
  expect(trie.words).toBe(640);
});
