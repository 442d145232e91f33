/**
 * The format an answer must have: reads OpenAI's `response_format`, and finds the grammar that an answer must follow, be it of
 * its format, of required calls, or of strict tools. Knows no tokens.
 */
import { GrammarError } from "../grammar/error.ts";
import type { ConstraintOptions, Shape } from "../grammar/grammars.ts";
import { TAGS } from "./dialect.ts";
import type { Prompt } from "./prompt.ts";

export type ResponseFormat = { readonly kind: "text" } | Exclude<Shape, { readonly kind: "calls" }>;

/** A format as users write it: OpenAI's, and a regular expression that the whole answer matches. */
export type ResponseFormatOption =
  | { readonly type: "text" }
  /** Any JSON object. */
  | { readonly type: "json_object" }
  /** JSON that satisfies a schema. Further fields of OpenAI's (`name`, `strict`, `description`) are accepted; the schema always holds. */
  | { readonly type: "json_schema"; readonly json_schema: { readonly schema: Readonly<Record<string, unknown>>; readonly name?: string } }
  | { readonly type: "regex"; readonly pattern: string };

const TYPES = ["text", "json_object", "json_schema", "regex"];

/** Reads a format. Throws GrammarError that names the field; undefined and null mean text. */
export function readFormat(option: ResponseFormatOption | null | undefined): ResponseFormat {
  if (option === undefined || option === null) return { kind: "text" };
  if (!isObject(option)) throw new GrammarError("response_format", `response_format is ${show(option)}; it must be an object with a type`);
  switch (option.type) {
    case "text":
      return { kind: "text" };
    case "json_object":
      return { kind: "json" };
    case "json_schema": {
      const schema: unknown = (option.json_schema as { readonly schema?: unknown } | undefined)?.schema;
      if (!isObject(schema)) {
        const param = "response_format.json_schema.schema";
        throw new GrammarError(param, `${param} is ${show(schema)}; it must be a JSON schema: an object`);
      }
      return { kind: "schema", schema };
    }
    case "regex":
      if (typeof option.pattern !== "string")
        throw new GrammarError("response_format.pattern", `response_format.pattern is ${show(option.pattern)}; it must be a text`);
      return { kind: "regex", pattern: option.pattern };
    default: {
      const { type } = option satisfies never as { readonly type?: unknown };
      throw new GrammarError("response_format.type", `response_format.type is ${show(type)}; it must be one of ${TYPES.join(", ")}`);
    }
  }
}

/** The shape that an answer must have and the field that asks for it; null: none. */
export function shapeOf(format: ResponseFormat, prompt: Prompt): ({ readonly shape: Shape } & Pick<ConstraintOptions, "param">) | null {
  switch (format.kind) {
    case "json":
      return { shape: format, param: "response_format" };
    case "schema":
      return { shape: format, param: "response_format.json_schema.schema" };
    case "regex":
      return { shape: format, param: "response_format.pattern" };
    case "text":
      break;
    default:
      return format satisfies never;
  }
  if (prompt.kind !== "chat" || prompt.tools.length === 0 || prompt.toolChoice === "none") return null;
  const { tools, toolChoice, oneToolCall } = prompt;
  const calls = { kind: "calls", tags: TAGS.call } as const;
  if (toolChoice === "auto") {
    if (!tools.some((tool) => tool.strict)) return null;
    return { shape: { ...calls, tools, several: !oneToolCall, free: true }, param: "tools" };
  }
  const named = typeof toolChoice === "object" ? tools.filter((tool) => tool.name === toolChoice.name) : tools;
  return { shape: { ...calls, tools: named, several: toolChoice === "required" && !oneToolCall, free: false }, param: "tools" };
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A value for a one-line error. */
function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "missing";
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}
