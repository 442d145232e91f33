/**
 * The format an answer must have: reads OpenAI's `response_format`, and finds the grammar that an answer must follow, be it of
 * its format, of required calls, or of strict tools. Knows no tokens.
 */
import { GrammarError, show } from "../grammar/error.ts";
import type { ConstraintOptions, Shape } from "../grammar/grammars.ts";
import { TAGS } from "./dialect.ts";
import type { Prompt } from "./prompt.ts";

export type ResponseFormat =
  | { readonly kind: "text" }
  | Exclude<Shape, { readonly kind: "calls" | "schema" }>
  /** `param` is the field that has the schema, for errors; by default that of OpenAI's `json_schema`. */
  | (Extract<Shape, { readonly kind: "schema" }> & { readonly param?: string });

const SCHEMA_PARAM = "response_format.json_schema.schema";

/** A format as users write it: OpenAI's, and a regular expression that the whole answer matches. */
export type ResponseFormatOption =
  | { readonly type: "text" }
  /** Any JSON object, or one that satisfies a schema. */
  | { readonly type: "json_object"; readonly schema?: Readonly<Record<string, unknown>> }
  /** JSON that satisfies a schema. Further fields of OpenAI's (`name`, `strict`, `description`) are accepted; the schema always holds. */
  | { readonly type: "json_schema"; readonly json_schema: { readonly schema: Readonly<Record<string, unknown>>; readonly name?: string } }
  | { readonly type: "regex"; readonly pattern: string };

/** The fields of each type of format. Others are errors: they would be constraints that don't hold. */
const FIELDS: Readonly<Record<string, readonly string[]>> = {
  text: [],
  json_object: ["schema"],
  json_schema: ["json_schema"],
  regex: ["pattern"],
};
const SCHEMA_FIELDS = ["name", "description", "schema", "strict"];

/** Reads a format. Throws GrammarError that names the field; undefined and null mean text. */
export function readFormat(option: ResponseFormatOption | null | undefined): ResponseFormat {
  if (option === undefined || option === null) return { kind: "text" };
  if (!isObject(option)) throw new GrammarError("response_format", `response_format is ${show(option)}; it must be an object with a type`);
  const { type } = option as { readonly type?: unknown };
  if (typeof type === "string" && Object.hasOwn(FIELDS, type)) refuseOthers(option, "response_format", ["type", ...FIELDS[type]]);
  switch (option.type) {
    case "text":
      return { kind: "text" };
    case "json_object":
      if (option.schema === undefined || option.schema === null) return { kind: "json" };
      return { kind: "schema", ...schemaIn(option.schema, "response_format.schema") };
    case "json_schema": {
      const wanted: unknown = option.json_schema;
      if (isObject(wanted)) refuseOthers(wanted, "response_format.json_schema", SCHEMA_FIELDS);
      return { kind: "schema", ...schemaIn(isObject(wanted) ? wanted["schema"] : undefined, SCHEMA_PARAM) };
    }
    case "regex":
      if (typeof option.pattern !== "string")
        throw new GrammarError("response_format.pattern", `response_format.pattern is ${show(option.pattern)}; it must be a text`);
      return { kind: "regex", pattern: option.pattern };
    default:
      option satisfies never;
      throw new GrammarError(
        "response_format.type",
        `response_format.type is ${show(type)}; it must be one of ${Object.keys(FIELDS).join(", ")}`,
      );
  }
}

/** Whether a grammar holds the calls of an answer: where they are required, or one of the tools is strict. */
export function holdsCalls({ tools, toolChoice }: Extract<Prompt, { readonly kind: "chat" }>): boolean {
  return toolChoice !== "none" && (toolChoice !== "auto" || tools.some((tool) => tool.strict));
}

function schemaIn(schema: unknown, param: string): { readonly schema: Readonly<Record<string, unknown>>; readonly param: string } {
  if (!isObject(schema)) throw new GrammarError(param, `${param} is ${show(schema)}; it must be a JSON schema: an object`);
  return { schema, param };
}

/** Throws GrammarError for a field with a value that nothing reads. */
function refuseOthers(option: object, param: string, fields: readonly string[]): void {
  for (const [key, value] of Object.entries(option))
    if (!fields.includes(key) && value !== undefined)
      throw new GrammarError(`${param}.${key}`, `${param}.${key} is not a field of this format; it has ${fields.join(", ")}`);
}

/** The shape that an answer must have and the field that asks for it; null: none. */
export function shapeOf(format: ResponseFormat, prompt: Prompt): ({ readonly shape: Shape } & Pick<ConstraintOptions, "param">) | null {
  switch (format.kind) {
    case "json":
      return { shape: format, param: "response_format" };
    case "schema": {
      const { param = SCHEMA_PARAM, ...shape } = format;
      return { shape, param };
    }
    case "regex":
      return { shape: format, param: "response_format.pattern" };
    case "text":
      break;
    default:
      return format satisfies never;
  }
  if (prompt.kind !== "chat" || prompt.tools.length === 0 || !holdsCalls(prompt)) return null;
  const { tools, toolChoice, oneToolCall } = prompt;
  const calls = { kind: "calls", tags: TAGS.call } as const;
  if (toolChoice === "auto") {
    return { shape: { ...calls, tools, several: !oneToolCall, free: true }, param: "tools" };
  }
  const named = typeof toolChoice === "object" ? tools.filter((tool) => tool.name === toolChoice.name) : tools;
  return { shape: { ...calls, tools: named, several: toolChoice === "required" && !oneToolCall, free: false }, param: "tools" };
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
