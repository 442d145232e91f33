/** Which grammar an answer must follow: that of its response format, of required calls, or of strict tools. Knows no tokens. */
import type { ConstraintOptions, Shape } from "../grammar/grammars.ts";
import { TAGS } from "./dialect.ts";
import type { Prompt } from "./prompt.ts";

export type ResponseFormat = { readonly kind: "text" } | Exclude<Shape, { readonly kind: "calls" }>;

/** The shape that an answer must have and the field that asks for it; null: none. */
export function shapeOf(format: ResponseFormat, prompt: Prompt): ({ readonly shape: Shape } & Pick<ConstraintOptions, "param">) | null {
  switch (format.kind) {
    case "json":
      return { shape: format, param: "response_format" };
    case "schema":
      return { shape: format, param: "response_format.json_schema.schema" };
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
