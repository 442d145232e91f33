/** What must hold where a schema must not: alternatives, each a schema. Knows no grammar. */
import { type Document, isSchema, type Located, type Schema } from "./document.ts";
import { SchemaError } from "./error.ts";
import { bound, constrains, count, list, NOT_PATTERN, NOT_TEXTS, names, record, type Type, typesNamed } from "./keywords.ts";

const ALL: readonly Type[] = ["object", "array", "string", "number", "boolean", "null"];
/**
 * Schemas of which one holds for every value that the grammar should write and `of` does not allow. Some values may be missing,
 * none too many. Throws SchemaError, naming `keyword` and the keyword under it, for what can't be negated.
 */
export function negations(of: Located, schema: Schema | boolean, document: Document, keyword: string): (Schema | boolean)[] {
  if (typeof schema === "boolean") return [!schema];
  const at = of.path;
  const refuse = (key: string) =>
    new SchemaError(at, `'${key}' within '${keyword}' can't be enforced, so that '${keyword}' is not supported`);
  if (schema["$ref"] !== undefined) {
    if (Object.keys(schema).some((key) => key !== "$ref" && constrains(key))) throw refuse("$ref");
    return [{ not: document.resolve(of, "$ref").schema }];
  }
  const negate = (sub: unknown): Schema => ({ not: sub });
  const found: (Schema | boolean)[] = [];
  for (const key of Object.keys(schema)) {
    const value = schema[key];
    switch (key) {
      case "type":
        found.push(...otherTypes(typesNamed(schema, at) ?? []));
        break;
      case "const":
        found.push(...otherValues([value]));
        break;
      case "enum":
        found.push(...otherValues(list(schema, key, at)));
        break;
      case "required":
        found.push(...names(schema, key, at).map((name) => ({ type: "object", properties: one(name, false) })));
        break;
      case "properties":
        for (const [name, sub] of Object.entries(record(schema, key, at)))
          found.push({ type: "object", required: [name], properties: one(name, negate(sub)) });
        break;
      case "items":
        if (Array.isArray(value) || schema["prefixItems"] !== undefined || of.resource.draft < 6) throw refuse(key);
        found.push({ type: "array", contains: negate(value) });
        break;
      case "minLength":
      case "minItems":
      case "minProperties": {
        const least = count(schema, key, 0, at);
        if (least > 0) found.push({ type: TYPE_OF[key.slice(3)], [`max${key.slice(3)}`]: least - 1 });
        break;
      }
      case "maxLength":
      case "maxItems":
      case "maxProperties":
        found.push({ type: TYPE_OF[key.slice(3)], [`min${key.slice(3)}`]: count(schema, key, 0, at) + 1 });
        break;
      case "minimum":
      case "maximum":
      case "exclusiveMinimum":
      case "exclusiveMaximum":
        if (of.resource.draft === 4) throw refuse(key);
        found.push({ type: "number", [OPPOSITE[key]]: bound(schema, key, at) });
        break;
      case "pattern":
        found.push({ type: "string", [NOT_PATTERN]: String(value) } as Schema);
        break;
      case "allOf":
        found.push(...list(schema, key, at).map(negate));
        break;
      case "anyOf":
        found.push({ allOf: list(schema, key, at).map(negate) });
        break;
      case "not":
        found.push(value as Schema | boolean);
        break;
      case "if":
      case "then":
      case "else":
        if (schema["if"] !== undefined) throw refuse(key);
        break;
      default:
        if (constrains(key)) throw refuse(key);
    }
  }
  return found.length > 0 ? found : [false];
}

const TYPE_OF: Readonly<Record<string, string>> = { Length: "string", Items: "array", Properties: "object" };
const OPPOSITE: Readonly<Record<string, string>> = {
  minimum: "exclusiveMaximum",
  maximum: "exclusiveMinimum",
  exclusiveMinimum: "maximum",
  exclusiveMaximum: "minimum",
};

function one(name: string, value: unknown): Schema {
  return Object.fromEntries([[name, value]]);
}

/** Numbers that are not whole are left out where whole numbers are excluded. */
function otherTypes(types: readonly Type[]): Schema[] {
  const others = ALL.filter((type) => !types.includes(type) && !(type === "number" && types.includes("integer")));
  return others.length > 0 ? [{ type: others }] : [];
}

/** Objects and arrays are left out where one of them is excluded. */
function otherValues(values: readonly unknown[]): Schema[] {
  const found: Schema[] = [];
  const typeOf = (value: unknown): Type =>
    value === null ? "null" : Array.isArray(value) ? "array" : isSchema(value) ? "object" : (typeof value as Type);
  const types = ALL.filter((type) => !values.some((value) => typeOf(value) === type));
  if (types.length > 0) found.push({ type: types });
  const texts = values.filter((value) => typeof value === "string");
  if (texts.length > 0) found.push({ type: "string", [NOT_TEXTS]: texts } as Schema);
  for (const value of [true, false]) if (values.includes(!value) && !values.includes(value)) found.push({ const: value });
  const numbers = [...new Set(values.filter((value) => typeof value === "number"))].sort((a, b) => a - b);
  for (const [i, value] of numbers.entries()) {
    if (i === 0) found.push({ type: "number", exclusiveMaximum: value });
    found.push({ type: "number", exclusiveMinimum: value, ...(i + 1 < numbers.length ? { exclusiveMaximum: numbers[i + 1] } : {}) });
  }
  return found;
}
