/** Keywords of JSON Schema: which there are, since which draft, and what they apply to. Reads them with errors. Knows no grammar. */
import { type Draft, draftName, isSchema, type Located, type Schema } from "./document.ts";
import { SchemaError, show } from "./error.ts";
import { MANY } from "./expression.ts";

export const TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"] as const;
export type Type = (typeof TYPES)[number];

const words = (text: string): readonly string[] => text.split(" ");

/** Keywords that do not constrain values, or say how the schema itself is to be read. */
const SILENT = new Set(
  words(
    "$schema $id id $anchor $dynamicAnchor $recursiveAnchor $comment $defs definitions title description default examples deprecated readOnly writeOnly contentEncoding contentMediaType contentSchema discriminator example externalDocs xml",
  ),
);
const KEYS_OF_TYPE: Readonly<Record<string, readonly string[]>> = {
  object: words(
    "properties required additionalProperties patternProperties propertyNames minProperties maxProperties unevaluatedProperties dependentRequired dependentSchemas dependencies",
  ),
  array: words("items prefixItems additionalItems minItems maxItems contains minContains maxContains uniqueItems unevaluatedItems"),
  string: words("minLength maxLength pattern format"),
  number: words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"),
};
const LOGIC = words("$ref $dynamicRef $recursiveRef enum const anyOf oneOf allOf not if then else type");
const KNOWN = new Set([...SILENT, ...LOGIC, ...Object.values(KEYS_OF_TYPE).flat()]);

/** What negation adds to a schema, under keys that no JSON has: a pattern that must not match, and texts that are excluded. */
export const NOT_PATTERN: unique symbol = Symbol("not pattern");
export const NOT_TEXTS: unique symbol = Symbol("not texts");
export interface Negated {
  readonly [NOT_PATTERN]?: string;
  readonly [NOT_TEXTS]?: readonly string[];
}

/** The first draft with a keyword; draft-04 for all others. */
const SINCE = new Map<string, Draft>([
  ...words("const contains propertyNames").map((key): [string, Draft] => [key, 6]),
  ...words("if then else").map((key): [string, Draft] => [key, 7]),
  ...words("dependentRequired dependentSchemas unevaluatedProperties unevaluatedItems minContains maxContains $recursiveRef").map(
    (key): [string, Draft] => [key, 2019],
  ),
  ...words("prefixItems $dynamicRef").map((key): [string, Draft] => [key, 2020]),
]);

/** Throws SchemaError for a keyword that can't be held: one that is unknown, or that the schema's draft does not have. */
export function checkKeywords(at: Located): void {
  const { schema, path, resource } = at;
  if (typeof schema === "boolean") return;
  for (const key of Object.keys(schema)) {
    if (!KNOWN.has(key) && !key.startsWith("x-")) throw new SchemaError(path, `'${key}' is not supported`);
    if ((SINCE.get(key) ?? 4) > resource.draft)
      throw new SchemaError(path, `'${key}' is not supported: ${draftName(at)}, which '$schema' names, does not have it`);
    if (key === "$recursiveRef" && resource.draft > 2019)
      throw new SchemaError(path, `'${key}' is not supported: ${draftName(at)} has '$dynamicRef' instead`);
    if (key === "additionalItems" && resource.draft > 2019 && schema["prefixItems"] !== undefined)
      throw new SchemaError(path, "'additionalItems' beside 'prefixItems' is not supported: use 'items'");
  }
}

/** Whether a keyword says something about values. */
export function constrains(key: string): boolean {
  return !SILENT.has(key) && !key.startsWith("x-");
}

/** The types that a schema's keywords apply to. */
export function typesMeant(schema: Schema): Type[] {
  return (["object", "array", "string", "number"] as const).filter((each) => KEYS_OF_TYPE[each].some((key) => schema[key] !== undefined));
}

/** The types that a schema names; null if it names none. */
export function typesNamed(schema: Schema, path: string): readonly Type[] | null {
  const { type } = schema;
  if (type === undefined) return null;
  const named: unknown[] = [type].flat();
  const wrong = named.find((each) => !(TYPES as readonly unknown[]).includes(each));
  if (wrong !== undefined || named.length === 0)
    throw new SchemaError(path, `type ${show(wrong ?? type)} is not known; known are ${TYPES.join(", ")}`);
  return named as Type[];
}

/** The types that are in both lists; null stands for all. Whole numbers are numbers. */
export function sharedTypes(a: readonly Type[] | null, b: readonly Type[] | null): readonly Type[] | null {
  if (a === null || b === null) return a ?? b;
  const has = (all: readonly Type[], type: Type) => all.includes(type) || (type === "integer" && all.includes("number"));
  return TYPES.filter((type) => has(a, type) && has(b, type) && !(type === "integer" && a.includes("number") && b.includes("number")));
}

export function isOfType(value: unknown, type: Type): boolean {
  switch (type) {
    case "null":
      return value === null;
    case "array":
      return Array.isArray(value);
    case "object":
      return isSchema(value);
    case "integer":
      return Number.isInteger(value);
    case "boolean":
    case "number":
    case "string":
      return typeof value === type;
    default:
      return type satisfies never;
  }
}

/** A keyword's value as a list. Throws SchemaError if it is not one. */
export function list(schema: Schema, key: string, path: string): readonly unknown[] {
  const value = schema[key];
  if (!Array.isArray(value)) throw new SchemaError(path, `'${key}' must be a list, not ${show(value)}`);
  return value;
}

/** A keyword's value as a list of names; empty if it is missing. */
export function names(schema: Schema, key: string, path: string): readonly string[] {
  if (schema[key] === undefined) return [];
  const all = list(schema, key, path);
  const wrong = all.find((each) => typeof each !== "string");
  if (wrong !== undefined) throw new SchemaError(path, `'${key}' must be a list of names, and has ${show(wrong)}`);
  return all as readonly string[];
}

/** A keyword's value as an object; empty if it is missing. */
export function record(schema: Schema, key: string, path: string): Schema {
  const value = schema[key] ?? {};
  if (!isSchema(value)) throw new SchemaError(path, `'${key}' must be an object, not ${show(value)}`);
  return value;
}

/** A count, as from `minItems`. */
export function count(schema: Schema, key: string, fallback: number, path: string): number {
  const value = schema[key] ?? fallback;
  if (!Number.isInteger(value) || (value as number) < 0)
    throw new SchemaError(path, `'${key}' must be a whole number from 0, and it is ${show(value)}`);
  if (key.startsWith("min") && (value as number) >= MANY)
    throw new SchemaError(path, `'${key}' is ${show(value)}; at most ${MANY - 1} can be held`);
  return Math.min(value as number, MANY);
}

/** A number, as from `minimum`; undefined if it is missing. */
export function bound(schema: Schema, key: string, path: string): number | undefined {
  const value = schema[key];
  if (value === undefined) return undefined;
  if (typeof value !== "number") throw new SchemaError(path, `'${key}' must be a number, and it is ${show(value)}`);
  return value;
}
