/** Schemas as zod 4, pydantic 2 and OpenAI's documentation write them: all are enforced, and what is written parses. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { z } from "zod";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { Sampler, seeded } from "./sampling.ts";
import { type Draft, validators } from "./validators.ts";

function holds(schema: unknown, draft: Draft, parses: (value: unknown) => boolean = () => true): void {
  const plain: unknown = JSON.parse(JSON.stringify(schema));
  const sampler = new Sampler(schemaGrammar(plain));
  const checks = validators(plain, draft);
  let drawn = 0;
  for (let seed = 1; seed <= 12; seed++) {
    const text = sampler.draw(seeded(seed), 10 + seed * 12);
    if (text === null) continue;
    drawn++;
    const value: unknown = JSON.parse(text);
    for (const { name, check } of checks) expect([name, text, check?.(value) ?? null]).toEqual([name, text, null]);
    expect([text, parses(value)]).toEqual([text, true]);
  }
  expect(drawn).toBeGreaterThan(5);
}

const cat = z.object({ kind: z.literal("cat"), lives: z.int() });
const dog = z.object({ kind: z.literal("dog"), good: z.boolean() });
const list = z.object({
  v: z.number(),
  get next() {
    return list.nullable().optional();
  },
});
const ZOD: Readonly<Record<string, z.ZodType>> = {
  string: z.string().min(2).max(4),
  email: z.email(),
  "email of bounded length": z.email().max(60),
  url: z.url(),
  uuid: z.uuid(),
  "uuid version 4": z.uuidv4(),
  guid: z.guid(),
  date: z.iso.date(),
  time: z.iso.time(),
  datetime: z.iso.datetime(),
  "datetime with offset": z.iso.datetime({ offset: true }),
  "local datetime": z.iso.datetime({ local: true }),
  duration: z.iso.duration(),
  ipv4: z.ipv4(),
  ipv6: z.ipv6(),
  cidrv4: z.cidrv4(),
  cidrv6: z.cidrv6(),
  base64: z.base64(),
  base64url: z.base64url(),
  nanoid: z.nanoid(),
  cuid: z.cuid(),
  cuid2: z.cuid2(),
  ulid: z.ulid(),
  e164: z.e164(),
  hostname: z.hostname(),
  hex: z.hex(),
  lowercase: z.string().lowercase(),
  uppercase: z.string().uppercase(),
  "starts, ends and includes": z.string().startsWith("ab").endsWith("yz").includes("m").max(20),
  "regex and lengths": z
    .string()
    .min(3)
    .max(20)
    .regex(/^[a-z-]+$/),
  "two regexes": z
    .string()
    .max(9)
    .regex(/^[a-z]/)
    .regex(/[0-9]$/),
  password: z.string().regex(/^(?=.*[A-Z])(?=.*\d)[\w!]{8,12}$/),
  "template literal": z.templateLiteral(["v", z.number(), "-", z.enum(["a", "b"])]),
  number: z.number(),
  int: z.int(),
  int32: z.int32(),
  uint32: z.uint32(),
  float32: z.float32(),
  positive: z.number().positive(),
  "range of numbers": z.number().gte(-1.5).lt(2),
  "multiple of": z.int().multipleOf(5),
  "multiple of, within a range": z.int().min(0).max(100).multipleOf(7),
  boolean: z.boolean(),
  null: z.null(),
  unknown: z.unknown(),
  literals: z.literal(["a", 1, true, null]),
  enum: z.enum(["a", "b"]),
  "native enum": z.enum({ A: 1, B: "x" } as const),
  optional: z.object({ a: z.string().optional() }),
  nullable: z.string().nullable(),
  nullish: z.object({ a: z.number().nullish() }),
  default: z.object({ a: z.string().default("x") }),
  array: z.array(z.int()).min(1).max(3),
  tuple: z.tuple([z.string(), z.number()]),
  "tuple with rest": z.tuple([z.string()], z.boolean()),
  "tuple with an optional item": z.tuple([z.string(), z.number().optional()]),
  "strict object": z.strictObject({ a: z.string() }),
  "loose object": z.looseObject({ a: z.string() }),
  catchall: z.object({ a: z.string() }).catchall(z.number()),
  record: z.record(z.string(), z.int()),
  "record of an enum": z.record(z.enum(["a", "b"]), z.int()),
  "partial record": z.partialRecord(z.enum(["a", "b"]), z.int()),
  "record of a regex": z.record(z.string().regex(/^x-/), z.int()),
  "record of literals": z.record(z.literal(["p", "q"]), z.boolean()),
  "discriminated union": z.discriminatedUnion("kind", [cat, dog]),
  union: z.union([cat, dog, z.string()]),
  "nested union": z.union([z.union([cat, dog]), z.array(cat), z.null()]),
  "union within a union": z.discriminatedUnion("t", [
    z.object({
      t: z.literal("a"),
      u: z.discriminatedUnion("k", [z.object({ k: z.literal(1) }), z.object({ k: z.literal(2), n: z.null() })]),
    }),
    z.object({ t: z.literal("b") }),
  ]),
  intersection: z.intersection(z.object({ a: z.string() }), z.object({ b: z.number() })),
  recursive: list,
  "never, optional": z.object({ a: z.never().optional() }),
  json: z.json(),
  meta: z.string().meta({ title: "T", examples: ["x"], deprecated: true }),
};

test.each(Object.entries(ZOD))("zod: %s", (_name, type) => {
  holds(z.toJSONSchema(type), "2020-12", (value) => type.safeParse(value).success);
  holds(z.toJSONSchema(type, { target: "draft-7" }), "7");
});

/** Written by pydantic 2.13: `model_json_schema()` of models of all its kinds of fields. */
const PYDANTIC = JSON.parse(readFileSync(new URL("pydantic.json", import.meta.url), "utf8")) as Record<string, object>;
/** Sets of what is not listed can't be enforced. */
const { Frozen, ...ENFORCED } = PYDANTIC;

test.each(Object.entries(ENFORCED))("pydantic: %s", (_name, schema) => holds(schema, "2020-12"));

test("pydantic: a set of integers is refused by name", () => {
  expect(() => schemaGrammar(Frozen)).toThrow("at /properties/f: 'uniqueItems' is not supported");
});

const OPENAI: Readonly<Record<string, object>> = {
  "steps of a solution": {
    type: "object",
    properties: {
      steps: {
        type: "array",
        items: {
          type: "object",
          properties: { explanation: { type: "string" }, output: { type: "string" } },
          required: ["explanation", "output"],
          additionalProperties: false,
        },
      },
      final_answer: { type: "string" },
    },
    required: ["steps", "final_answer"],
    additionalProperties: false,
  },
  "a user interface, recursive by its root": {
    type: "object",
    properties: {
      type: { type: "string", description: "The type of the component", enum: ["div", "button", "header", "section", "field", "form"] },
      label: { type: "string" },
      children: { type: "array", items: { $ref: "#" } },
      attributes: {
        type: "array",
        items: {
          type: "object",
          properties: { name: { type: "string" }, value: { type: "string" } },
          additionalProperties: false,
          required: ["name", "value"],
        },
      },
    },
    required: ["type", "label", "children", "attributes"],
    additionalProperties: false,
  },
  "a linked list, recursive by a definition": {
    type: "object",
    properties: { linked_list: { $ref: "#/$defs/linked_list_node" } },
    $defs: {
      linked_list_node: {
        type: "object",
        properties: { value: { type: "number" }, next: { anyOf: [{ $ref: "#/$defs/linked_list_node" }, { type: "null" }] } },
        additionalProperties: false,
        required: ["next", "value"],
      },
    },
    additionalProperties: false,
    required: ["linked_list"],
  },
  "a choice of items": {
    type: "object",
    properties: {
      item: {
        anyOf: [
          {
            type: "object",
            properties: { name: { type: "string" }, age: { type: "number", minimum: 0, maximum: 130 } },
            additionalProperties: false,
            required: ["name", "age"],
          },
          {
            type: "object",
            properties: { number: { type: "string", pattern: "^[0-9]+$" }, city: { type: ["string", "null"] } },
            additionalProperties: false,
            required: ["number", "city"],
          },
        ],
      },
    },
    additionalProperties: false,
    required: ["item"],
  },
};

test.each(Object.entries(OPENAI))("OpenAI's documentation: %s", (_name, schema) => holds(schema, "2020-12"));
