/**
 * Each keyword of JSON Schema: what a grammar writes satisfies two validators, valid texts can be written, and invalid ones can't.
 * Texts are drawn byte by byte, without a tokenizer.
 */
import { describe, expect, test } from "vitest";
import { FORMATS } from "../../src/grammar/formats.ts";
import { Languages } from "../../src/grammar/language.ts";
import { readPattern } from "../../src/grammar/regex.ts";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { Sampler, seeded } from "./sampling.ts";
import { type Draft, validators } from "./validators.ts";

type Case = readonly [schema: unknown, valid: readonly unknown[], invalid: readonly unknown[], draft?: Draft];

const closed = { unevaluatedProperties: false };
const kind = (value: unknown, more: object = {}) => ({
  type: "object",
  properties: { kind: { const: value }, ...more },
  required: ["kind"],
});
const DRAFT_4 = { $schema: "http://json-schema.org/draft-04/schema#" };
const DRAFT_7 = { $schema: "http://json-schema.org/draft-07/schema#" };
const DRAFT_2019 = { $schema: "https://json-schema.org/draft/2019-09/schema" };

const CASES: Readonly<Record<string, Case>> = {
  "propertyNames of a type that no name has": [{ type: "object", propertyNames: { type: "number" } }, [{}], [{ a: 1 }, { 0: 1 }]],
  "propertyNames that lists names": [
    { type: "object", propertyNames: { enum: ["a", "b"] }, additionalProperties: { type: "null" } },
    [{}, { a: null }, { a: null, b: null }],
    [{ c: null }, { a: 1 }],
  ],
  "propertyNames beside properties": [
    { type: "object", properties: { a: {}, bcd: {} }, propertyNames: { maxLength: 2 }, additionalProperties: { type: "null" } },
    [{ a: 1 }, { zz: null }],
    [{ bcd: 1 }, { zzz: null }],
  ],
  "propertyNames with a pattern": [{ type: "object", propertyNames: { pattern: "^x-" } }, [{ "x-a": 1 }], [{ y: 1 }]],
  patternProperties: [
    { type: "object", patternProperties: { "^n": { type: "integer" }, s$: { maximum: 5 } } },
    [{ n1: 7 }, { ns: 3 }, {}],
    [{ n1: "x" }, { ns: 7 }],
  ],
  "patternProperties beside properties and additionalProperties": [
    {
      type: "object",
      properties: { na: { minimum: 3 } },
      patternProperties: { "^n": { type: "integer" } },
      additionalProperties: { type: "null" },
    },
    [{ na: 4 }, { na: 3, n2: 1 }, { z: null }],
    [{ na: 2 }, { na: 3.5 }, { z: 1 }, { n2: null }],
  ],
  "additionalProperties in one of several schemas": [
    {
      allOf: [{ properties: { a: { type: "integer" } } }, { properties: { b: {} }, additionalProperties: { minimum: 3 } }],
      type: "object",
    },
    [{ a: 3, b: 0 }, { b: "x" }],
    [{ a: 2 }],
  ],
  "unevaluatedProperties sees what its own schema brings in": [
    {
      type: "object",
      allOf: [{ properties: { a: {} } }, { $ref: "#/$defs/b" }],
      ...closed,
      $defs: { b: { properties: { b: { type: "null" } } } },
    },
    [{ a: 1, b: null }],
    [{ a: 1, c: 1 }, { b: 1 }],
  ],
  "unevaluatedProperties does not see its cousins": [
    {
      type: "object",
      allOf: [
        { properties: { a: {} }, required: [] },
        { properties: { b: {} }, ...closed },
      ],
    },
    [{}, { b: 1 }],
    [{ a: 1 }],
  ],
  "unevaluatedProperties within anyOf": [
    {
      type: "object",
      properties: { a: {} },
      anyOf: [
        { properties: { b: { const: 1 } }, ...closed },
        { properties: { c: {} }, required: ["c"] },
      ],
    },
    [{ b: 1 }, { a: 1, c: 2 }],
    [{ a: 1, b: 1 }, { a: 1 }],
  ],
  "unevaluatedProperties behind a reference": [
    { type: "object", properties: { a: {} }, $ref: "#/$defs/x", $defs: { x: { properties: { b: {} }, ...closed } } },
    [{ b: 1 }],
    [{ a: 1 }],
  ],
  "unevaluatedProperties with a schema": [
    { type: "object", properties: { a: {} }, unevaluatedProperties: { type: "null" } },
    [{ a: 1, z: null }],
    [{ z: 1 }],
  ],
  "unevaluatedProperties is not fooled by what must not hold": [
    { type: "object", not: { properties: { a: { const: 1 } }, required: ["a"] }, properties: { b: {} }, ...closed },
    [{}, { b: 1 }],
    [{ a: 2 }],
  ],
  unevaluatedItems: [
    { type: "array", allOf: [{ prefixItems: [{ type: "null" }] }], unevaluatedItems: { type: "integer" } },
    [[null], [null, 1, 2], []],
    [[1], [null, null]],
  ],
  "unevaluatedItems does not see its cousins": [
    { type: "array", allOf: [{ prefixItems: [{}] }, { unevaluatedItems: false }] },
    [[]],
    [[1]],
  ],
  "prefixItems in one schema and items in another": [
    { allOf: [{ prefixItems: [{ type: "integer" }] }, { items: { minimum: 3 } }], type: "array" },
    [[3], [4]],
    [[2], ["a"], [3, 1]],
  ],
  "prefixItems, some of them impossible": [{ type: "array", prefixItems: [{ const: 1 }, false] }, [[], [1]], [[1, 2], [2]]],
  contains: [{ type: "array", items: { type: "integer" }, contains: { minimum: 5 } }, [[5], [1, 7]], [[], [1], ["a", 6]]],
  minContains: [
    { type: "array", contains: { const: "x" }, minContains: 2, maxItems: 3 },
    [
      ["x", "x"],
      [1, "x", "x"],
    ],
    [["x"], []],
  ],
  "minContains of none": [{ type: "array", items: { type: "null" }, contains: { const: 1 }, minContains: 0 }, [[], [null]], [[1]]],
  "uniqueItems of listed values": [
    { type: "array", items: { enum: ["a", "b", "c"] }, uniqueItems: true, minItems: 2 },
    [
      ["a", "b"],
      ["a", "b", "c"],
    ],
    [["a", "a"], ["a"], ["b", "b", "c"]],
  ],
  "uniqueItems of at most one": [{ type: "array", uniqueItems: true, maxItems: 1 }, [[], [1]], [[1, 1]]],
  not: [{ type: ["integer", "string", "null"], not: { type: "string" } }, [1, null], ["a"]],
  "not a constant": [{ type: ["string", "integer"], not: { enum: ["ab", 3] } }, ["a", "abc", "", 2, 4], ["ab", 3]],
  "not a pattern": [{ type: "string", not: { pattern: "^a|b$" } }, ["", "xa"], ["a", "xb", "abc"]],
  "not a range": [{ type: "integer", not: { minimum: 3, maximum: 7 } }, [2, 8], [3, 7, 5]],
  "not a member": [{ type: "object", properties: { a: { type: "integer" }, b: {} }, not: { required: ["a"] } }, [{}, { b: 1 }], [{ a: 1 }]],
  "not not": [{ not: { not: { type: "null" } } }, [null], [1]],
  "if, then, else": [
    {
      type: "object",
      properties: { country: { enum: ["US", "DE"] }, code: { type: "string" } },
      required: ["country", "code"],
      if: { properties: { country: { const: "US" } } },
      // biome-ignore lint/suspicious/noThenProperty: a keyword
      then: { properties: { code: { pattern: "^\\d{5}$" } } },
      else: { properties: { code: { pattern: "^D" } } },
    },
    [
      { country: "US", code: "12345" },
      { country: "DE", code: "D1" },
    ],
    [
      { country: "US", code: "D1" },
      { country: "DE", code: "12345" },
    ],
  ],
  "if without then": [{ type: "integer", if: { minimum: 5 }, else: { const: 1 } }, [1, 5, 6], [2, 4]],
  dependentRequired: [
    { type: "object", properties: { a: {}, b: {} }, dependentRequired: { a: ["b"] } },
    [{}, { b: 1 }, { a: 1, b: 2 }],
    [{ a: 1 }],
  ],
  dependentSchemas: [
    { type: "object", properties: { a: {}, b: {} }, dependentSchemas: { a: { properties: { b: { type: "null" } } } } },
    [{ b: 1 }, { a: 1, b: null }],
    [{ a: 1, b: 1 }],
  ],
  minProperties: [
    { type: "object", properties: { a: {}, b: {}, c: {} }, minProperties: 2 },
    [
      { a: 1, c: 1 },
      { b: 1, c: 1 },
      { a: 1, b: 1, c: 1 },
    ],
    [{}, { a: 1 }],
  ],
  maxProperties: [
    { type: "object", properties: { a: {}, b: {}, c: {} }, required: ["b"], maxProperties: 2, additionalProperties: { type: "null" } },
    [{ b: 1 }, { a: 1, b: 1 }, { b: 1, z: null }],
    [{ a: 1, b: 1, c: 1 }, { a: 1, b: 1, z: null }, { a: 1 }],
  ],
  "a member that no value satisfies": [{ type: "object", properties: { a: false, b: {} } }, [{}, { b: 1 }], [{ a: 1 }]],
  "names of Object's own": [
    {
      type: "object",
      properties: { constructor: { const: 1 }, hasOwnProperty: { const: 2 } },
      required: ["constructor"],
      additionalProperties: false,
    },
    [{ constructor: 1 }, { constructor: 1, hasOwnProperty: 2 }],
    [{}, { toString: 1, constructor: 1 }],
  ],
  multipleOf: [{ type: "integer", multipleOf: 7 }, [0, 7, -14, 700000], [1, 15, -8]],
  "multipleOf within bounds": [{ multipleOf: 5, type: "number", exclusiveMinimum: 5, maximum: 20 }, [10, 15, 20], [5, 25, 12, 7.5]],
  "several multipleOf": [{ allOf: [{ multipleOf: 4 }, { multipleOf: 6 }], type: "number" }, [12, 24, -36], [4, 6, 18]],
  "bounds of many digits": [
    { type: "number", minimum: 123456789.123456, maximum: 123456789.123457 },
    [123456789.123456],
    [123456789, 123456790],
  ],
  "bounds with exponents": [{ type: "number", minimum: 1e-7, exclusiveMaximum: 2.5e-7 }, [], [0, 1, 0.1]],
  "bounds of draft-04": [{ ...DRAFT_4, type: "integer", minimum: 3, exclusiveMinimum: true, maximum: 9 }, [4, 9], [3, 10], "4"],
  "const and enum as values": [{ enum: [1, 2, { b: 1, a: [2] }], const: 1.0 }, [1], [2]],
  "enum beside other keywords": [{ enum: ["a", "abc", 5, null], minLength: 2, type: ["string", "integer"] }, ["abc", 5], ["a", null]],
  "enum of objects beside properties": [{ enum: [{ a: 1 }, { a: "x" }], properties: { a: { type: "string" } } }, [{ a: "x" }], [{ a: 1 }]],
  "pattern and lengths": [{ type: "string", pattern: "^[a-z]+$", minLength: 2, maxLength: 4 }, ["ab", "abcd"], ["a", "abcde", "A1"]],
  "several patterns": [
    { allOf: [{ pattern: "^a" }, { pattern: "b$" }, { pattern: "\\d" }], type: "string", maxLength: 5 },
    ["a1b"],
    ["ab", "1b"],
  ],
  "look-ahead": [{ type: "string", pattern: "^(?=.*[A-Z])(?!.*\\s)(?=.*\\d).{3,5}$" }, ["aB1", "1B2x"], ["ab1", "B 12", "B1"]],
  "lengths in code points": [{ type: "string", minLength: 2, maxLength: 2 }, ["😀😀", "né"], ["😀", "a"]],
  "oneOf that overlaps": [{ type: "integer", oneOf: [{ minimum: 3 }, { maximum: 5 }] }, [2, 6], [3, 4, 5]],
  "oneOf told apart by a reference's constant": [
    { oneOf: [{ $ref: "#/$defs/a" }, { $ref: "#/$defs/b" }], $defs: { a: kind("a"), b: kind("b", { n: { type: "null" } }) } },
    [{ kind: "a" }, { kind: "b", n: null }],
    [{ kind: "c" }, { kind: "b", n: 1 }],
  ],
  "oneOf told apart by what is required": [
    {
      oneOf: ["a", "b"].map((name) => ({ type: "object", properties: { [name]: {} }, required: [name], additionalProperties: false })),
    },
    [{ a: 1 }, { b: 1 }],
    [{}, { a: 1, b: 1 }],
  ],
  "oneOf whose branches need no object": [
    { type: ["integer", "object"], oneOf: [kind("a"), { ...kind("b"), type: undefined }] },
    [{ kind: "a" }, { kind: "b" }, 1],
    [{ kind: "c" }],
  ],
  "a recursive union": [
    {
      $ref: "#/$defs/e",
      $defs: {
        e: { oneOf: [kind("n", { v: { type: "integer" } }), { ...kind("s", { l: { $ref: "#/$defs/e" } }), required: ["kind", "l"] }] },
      },
    },
    [
      { kind: "n", v: 1 },
      { kind: "s", l: { kind: "n" } },
    ],
    [{ kind: "s" }],
  ],
  "a reference and its siblings": [{ $ref: "#/$defs/x", maximum: 5, $defs: { x: { type: "integer", minimum: 3 } } }, [3, 5], [2, 6]],
  "a reference whose siblings draft-07 ignores, and validators hold": [
    { ...DRAFT_7, properties: { a: { $ref: "#/definitions/x", maximum: 5 } }, required: ["a"], definitions: { x: { type: "integer" } } },
    [{ a: 5 }],
    [{ a: "x" }, { a: 9 }],
    "7",
  ],
  "$id, $anchor and relative references": [
    {
      $id: "https://example.com/root",
      type: "object",
      properties: { a: { $ref: "item" }, b: { $ref: "#here" }, c: { $ref: "item#inner" } },
      required: ["a", "b", "c"],
      $defs: { x: { $id: "item", $defs: { y: { $anchor: "inner", type: "boolean" } }, type: "null" }, z: { $anchor: "here", const: 1 } },
    },
    [{ a: null, b: 1, c: true }],
    [
      { a: 1, b: 1, c: true },
      { a: null, b: 1, c: 1 },
    ],
  ],
  "an $id within a constant": [
    {
      type: "object",
      properties: { a: { enum: [{ $id: "#x", type: "null" }] }, b: { $ref: "#/$defs/x" } },
      $defs: { x: { type: "string" } },
    },
    [{ a: { $id: "#x", type: "null" }, b: "s" }],
    [{ b: 1 }],
  ],
  "$dynamicRef with one meaning": [
    {
      $dynamicAnchor: "node",
      type: "object",
      properties: { v: { type: "null" }, next: { $dynamicRef: "#node" } },
      additionalProperties: false,
    },
    [{}, { next: { v: null } }],
    [{ next: 1 }, { next: { v: 1 } }],
  ],
  "$recursiveRef with one meaning": [
    { ...DRAFT_2019, type: "object", properties: { next: { $recursiveRef: "#" } }, additionalProperties: false },
    [{ next: { next: {} } }],
    [{ next: 1 }],
    "2019-09",
  ],
  "items as a list, before 2020-12": [
    { ...DRAFT_7, type: "array", items: [{ type: "null" }], additionalItems: { type: "integer" } },
    [[null], [null, 3]],
    [[1], [null, "a"]],
    "7",
  ],
  "dependencies, before 2019-09": [
    { ...DRAFT_7, type: "object", properties: { a: {}, b: {} }, dependencies: { a: ["b"], b: { maxProperties: 2 } } },
    [{ b: 1 }, { a: 1, b: 1 }],
    [{ a: 1 }],
    "7",
  ],
  "boolean schemas": [{ type: "object", properties: { a: true, b: false }, additionalProperties: false }, [{ a: [1] }, {}], [{ b: 1 }]],
  "recursion that may end": [
    { type: "object", properties: { a: { anyOf: [{ $ref: "#" }, { type: "null" }] } }, required: ["a"] },
    [{ a: null }, { a: { a: null } }],
    [{}, { a: 1 }],
  ],
};

describe("what is written satisfies two validators", () => {
  test.each(Object.entries(CASES))("%s", (_name, [given, valid, invalid, draft = "2020-12"]) => {
    const schema: unknown = JSON.parse(JSON.stringify(given));
    const sampler = new Sampler(schemaGrammar(schema));
    const checks = validators(schema, draft).flatMap(({ name, check }) => (check ? [{ name, check }] : []));
    expect(checks.length).toBeGreaterThan(0);
    for (const value of valid)
      expect([JSON.stringify(value), sampler.accepts(JSON.stringify(value))]).toEqual([JSON.stringify(value), true]);
    for (const value of invalid)
      expect([JSON.stringify(value), sampler.accepts(JSON.stringify(value))]).toEqual([JSON.stringify(value), false]);
    let drawn = 0;
    for (let seed = 1; seed <= 40; seed++) {
      const text = sampler.draw(seeded(seed), seed * 2);
      if (text === null) continue;
      drawn++;
      for (const { name, check } of checks) expect([name, text, check(JSON.parse(text))]).toEqual([name, text, null]);
    }
    expect(drawn).toBeGreaterThan(10);
  });

  test("a member named __proto__ is held like any other", () => {
    const schema: unknown = JSON.parse(
      '{"type":"object","properties":{"__proto__":{"const":1}},"required":["__proto__"],"additionalProperties":false}',
    );
    const sampler = new Sampler(schemaGrammar(schema));
    expect(sampler.accepts('{"__proto__":1}')).toBe(true);
    for (const text of ["{}", '{"__proto__":2}', '{"__proto__":1,"__proto__":1}', '{"\\u005f_proto__":1}'])
      expect(sampler.accepts(text)).toBe(false);
  });
});

describe("formats", () => {
  const languages = new Languages(() => undefined);
  const forms = Object.entries(FORMATS).flatMap(([format, all]) => all.map((form) => ({ format, ...form })));
  test.each(forms)("$format: $pattern implies the patterns that need no check", ({ pattern, implies }) => {
    const form = languages.pattern(readPattern(pattern, false));
    expect(languages.isEmpty(form)).toBe(false);
    for (const each of implies) {
      const beyond = languages.and(form, languages.not(languages.pattern(readPattern(each, false))));
      expect([each, languages.isEmpty(beyond)]).toEqual([each, true]);
    }
  });
});
