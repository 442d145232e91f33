/** The format of an answer, as users write it: every field is read, or refused by its name. */
import { describe, expect, test } from "vitest";
import { type ResponseFormatOption, readFormat, shapeOf } from "../../src/chat/format.ts";
import { GrammarError } from "../../src/grammar/error.ts";
import { checkShape } from "../../src/grammar/grammars.ts";

const schema = { type: "object", properties: { a: { type: "integer" } }, required: ["a"] };
const read = (option: object) => readFormat(option as ResponseFormatOption);

describe("a format", () => {
  test("of any object is one of a schema where it has a schema", () => {
    expect(read({ type: "json_object" })).toEqual({ kind: "json" });
    expect(read({ type: "json_object", schema })).toEqual({ kind: "schema", schema, param: "response_format.schema" });
    const prompt = { kind: "text", text: "" } as never;
    expect(shapeOf(read({ type: "json_object", schema }), prompt)).toEqual({
      shape: { kind: "schema", schema },
      param: "response_format.schema",
    });
    expect(() => checkShape({ kind: "schema", schema: { type: "nonsense" } }, "response_format.schema")).toThrow(GrammarError);
  });

  test("of a schema takes OpenAI's fields", () => {
    expect(read({ type: "json_schema", json_schema: { schema, name: "n", strict: true, description: "d" } })).toMatchObject({ schema });
  });

  test.each([
    [{ type: "text", schema }, "response_format.schema"],
    [{ type: "json_object", json_schema: { schema } }, "response_format.json_schema"],
    [{ type: "json_object", schema: "{}" }, "response_format.schema"],
    [{ type: "json_schema", schema }, "response_format.schema"],
    [{ type: "json_schema", json_schema: { schema, pattern: "a" } }, "response_format.json_schema.pattern"],
    [{ type: "json_schema", json_schema: [schema] }, "response_format.json_schema.schema"],
    [{ type: "regex", pattern: "a", flags: "i" }, "response_format.flags"],
    [{ type: "__proto__" }, "response_format.type"],
    [{ type: ["json_object"] }, "response_format.type"],
  ])("%j is refused", (option, param) => {
    expect(() => read(option)).toThrow(expect.objectContaining({ name: "GrammarError", param }) as Error);
  });
});
