/** Structured output: whatever the model prefers, the answer parses and satisfies its schema. */
import { Ajv2020 } from "ajv/dist/2020.js";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Running, start } from "../start.ts";

let running: Running;
beforeAll(async () => {
  running = await start();
});
afterAll(() => running.server.stop());

const text = (maxLength: number) => ({ type: "string", maxLength });
const object = (properties: object, required = Object.keys(properties)) => ({
  type: "object",
  properties,
  required,
  additionalProperties: false,
});

const SCHEMAS: Record<string, object> = {
  word: object({ word: text(10) }),
  integer: object({ n: { type: "integer", minimum: 0, maximum: 99 } }),
  boolean: object({ yes: { type: "boolean" } }),
  enum: object({ colour: { enum: ["red", "green", "blue"] } }),
  constant: object({ kind: { const: "hotel" }, name: text(12) }),
  nullable: object({ name: { anyOf: [text(8), { type: "null" }] } }),
  list: object({ tags: { type: "array", items: text(6), minItems: 1, maxItems: 3 } }),
  numbers: object({ point: { type: "array", items: { type: "integer", minimum: 0, maximum: 9 }, minItems: 2, maxItems: 2 } }),
  nested: object({ place: object({ city: text(8), country: { enum: ["FR", "IT"] } }) }),
  deep: object({ a: object({ b: object({ c: { type: "boolean" } }) }) }),
  optional: object({ a: text(5), b: text(5) }, ["a"]),
  union: object({ value: { anyOf: [{ type: "integer", minimum: 1, maximum: 5 }, { enum: ["none"] }] } }),
  objects: object({ rooms: { type: "array", items: object({ beds: { enum: [1, 2] } }), minItems: 1, maxItems: 2 } }),
  pattern: object({ code: { type: "string", pattern: "^[A-Z]{3}-[0-9]{2}$" } }),
  date: object({ day: { type: "string", pattern: "^20[0-9]{2}-(0[1-9]|1[0-2])-[0-2][0-9]$" } }),
  chinese: object({ 名称: text(6), 数量: { type: "integer", minimum: 1, maximum: 9 } }),
  reference: { $defs: { size: { enum: ["S", "M", "L"] } }, ...object({ size: { $ref: "#/$defs/size" } }) },
  array: { type: "array", items: { enum: ["x", "y"] }, minItems: 1, maxItems: 3 },
  tuple: { type: "array", prefixItems: [{ type: "boolean" }, { enum: ["a", "b"] }], items: false, minItems: 2, maxItems: 2 },
  many: object(Object.fromEntries(["a", "b", "c", "d", "e"].map((k) => [k, { type: "boolean" }]))),
};

test("twenty schemas, ten answers each at temperature 1: all parse, all are valid", async () => {
  const ajv = new Ajv2020({ strict: false });
  const problems: string[] = [];
  let count = 0;
  await Promise.all(
    Object.entries(SCHEMAS).map(async ([name, schema]) => {
      const valid = ajv.compile(schema);
      const { choices } = await running.client.chat.completions.create({
        model: "default",
        messages: [{ role: "user", content: `Describe a hotel as JSON: ${name}` }],
        temperature: 1,
        top_p: 1,
        n: 10,
        seed: 1,
        max_tokens: 400,
        response_format: { type: "json_schema", json_schema: { name, schema: schema as Record<string, unknown>, strict: true } },
      });
      for (const { message, finish_reason } of choices) {
        count++;
        let value: unknown;
        try {
          value = JSON.parse(message.content ?? "");
        } catch {
          problems.push(`${name}: ${finish_reason}: does not parse: ${message.content?.slice(0, 200)}`);
          continue;
        }
        if (!valid(value)) problems.push(`${name}: ${message.content}: ${ajv.errorsText(valid.errors)}`);
      }
    }),
  );
  expect(problems).toEqual([]);
  expect(count).toBe(200);
}, 120_000);

test("a schema that cannot be enforced is rejected, without affecting running or later requests", async () => {
  const ask = (schema: Record<string, unknown>, max_tokens: number) =>
    running.client.chat.completions.create({
      model: "default",
      messages: [{ role: "user", content: "JSON" }],
      max_tokens,
      response_format: { type: "json_schema", json_schema: { name: "x", schema } },
    });
  const under = ask(object({ words: { type: "array", items: text(20), minItems: 20, maxItems: 20 } }) as Record<string, unknown>, 1000);
  for (const schema of [{ type: "nonsense" }, { type: "object", properties: 3 }, { $ref: "#/nowhere" }])
    await expect(ask(schema, 10)).rejects.toMatchObject({ status: 400, param: "response_format.json_schema.schema" });
  expect(JSON.parse((await under).choices[0].message.content ?? "").words).toHaveLength(20);
  expect(
    JSON.parse((await ask(object({ yes: { type: "boolean" } }) as Record<string, unknown>, 50)).choices[0].message.content ?? ""),
  ).toHaveProperty("yes");
}, 60_000);

test("json_object: any JSON object; an answer cut off by its length says so", async () => {
  const { choices } = await running.client.chat.completions.create({
    model: "default",
    messages: [{ role: "user", content: "JSON please" }],
    max_tokens: 3,
    temperature: 1,
    response_format: { type: "json_object" },
  });
  expect(choices[0].finish_reason).toBe("length");
});
