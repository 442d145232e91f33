/** Whether a value satisfies a schema: for constants, whose other keywords are checked rather than written. Knows no grammar. */
import { type Document, isSchema, type Located, type Schema } from "./document.ts";
import { SchemaError } from "./error.ts";
import {
  bound,
  checkKeywords,
  constrains,
  count,
  isOfType,
  list,
  type Negated,
  NOT_PATTERN,
  NOT_TEXTS,
  names,
  record,
  typesNamed,
} from "./keywords.ts";
import type { Patterns } from "./patterns.ts";
import type { Work } from "./work.ts";

const MAX_DEPTH = 100;

export class Validator {
  readonly #document: Document;
  readonly #patterns: Patterns;
  readonly #work: Work;

  constructor(document: Document, patterns: Patterns, work: Work) {
    this.#document = document;
    this.#patterns = patterns;
    this.#work = work;
  }

  /** Throws SchemaError for a keyword whose effect on the value is not known. */
  valid(value: unknown, at: Located, depth = 0): boolean {
    const { schema, path } = at;
    this.#work.spend(1, path);
    if (typeof schema === "boolean") return schema;
    if (depth > MAX_DEPTH) throw new SchemaError(path, "the schema refers to itself too often for a constant");
    checkKeywords(at);
    const sub = (key: string, within?: string | number) => this.#document.sub(at, key, within);
    const holds = (to: Located, of: unknown = value) => this.valid(of, to, depth + 1);
    for (const key of ["$ref", "$dynamicRef", "$recursiveRef"] as const) {
      if (schema[key] === undefined) continue;
      if (!holds(this.#document.resolve(at, key))) return false;
      // Validators differ on these.
      const beside = at.resource.draft <= 7 ? Object.keys(schema).find((each) => each !== key && constrains(each)) : undefined;
      if (beside !== undefined) throw new SchemaError(path, `'${beside}' beside '${key}' is not supported for a constant`);
    }
    const types = typesNamed(schema, path);
    if (types && !types.some((type) => isOfType(value, type))) return false;
    if (schema["enum"] !== undefined || schema["const"] !== undefined) {
      const text = canonical(value);
      const same = (each: unknown) => {
        this.#work.spend(1, path);
        return canonical(each) === text;
      };
      if (schema["enum"] !== undefined && !list(schema, "enum", path).some(same)) return false;
      if (schema["const"] !== undefined && !same(schema["const"])) return false;
    }
    const all = (key: string) => (schema[key] === undefined ? [] : list(schema, key, path).map((_, i) => holds(sub(key, i))));
    if (all("allOf").includes(false)) return false;
    if (schema["anyOf"] !== undefined && !all("anyOf").includes(true)) return false;
    if (schema["oneOf"] !== undefined && all("oneOf").filter(Boolean).length !== 1) return false;
    if (schema["not"] !== undefined && holds(sub("not"))) return false;
    if (schema["if"] !== undefined) {
      const key = holds(sub("if")) ? "then" : "else";
      if (schema[key] !== undefined && !holds(sub(key))) return false;
    }
    if (typeof value === "string") return this.#text(value, at);
    if (typeof value === "number") return number(value, schema, path, at.resource.draft === 4);
    if (Array.isArray(value)) return this.#array(value, at, holds);
    return isSchema(value) ? this.#object(value, at, holds) : true;
  }

  #text(value: string, { schema, path }: Located): boolean {
    const { pattern, format, [NOT_PATTERN]: notPattern, [NOT_TEXTS]: notTexts } = schema as Schema & Negated;
    const length = [...value].length;
    if (length < count(schema as Schema, "minLength", 0, path)) return false;
    if ((schema as Schema)["maxLength"] !== undefined && length > count(schema as Schema, "maxLength", 0, path)) return false;
    if (pattern !== undefined && !this.#patterns.matches(this.#patterns.source(pattern, path), value, path)) return false;
    if (notPattern !== undefined && this.#patterns.matches(notPattern, value, path)) return false;
    if (notTexts?.includes(value)) return false;
    if (format !== undefined && !this.#patterns.hasFormat(format, value, path))
      throw new SchemaError(path, `'format' beside a constant that may not have it is not supported`);
    return true;
  }

  #array(value: readonly unknown[], at: Located, holds: (to: Located, of: unknown) => boolean): boolean {
    const { schema, path } = at as Located & { readonly schema: Schema };
    if (value.length < count(schema, "minItems", 0, path)) return false;
    if (schema["maxItems"] !== undefined && value.length > count(schema, "maxItems", 0, path)) return false;
    if (schema["unevaluatedItems"] !== undefined) throw new SchemaError(path, "'unevaluatedItems' beside a constant is not supported");
    if (schema["uniqueItems"] === true && new Set(value.map(canonical)).size < value.length) return false;
    const old = Array.isArray(schema["items"]);
    const key = old ? "items" : "prefixItems";
    const first = schema[key] === undefined ? 0 : list(schema, key, path).length;
    const rest = old ? "additionalItems" : "items";
    for (const [i, item] of value.entries()) {
      if (
        i < first ? !holds(this.#document.sub(at, key, i), item) : schema[rest] !== undefined && !holds(this.#document.sub(at, rest), item)
      )
        return false;
    }
    if (schema["contains"] === undefined) return true;
    const found = value.filter((item) => holds(this.#document.sub(at, "contains"), item)).length;
    if (found < count(schema, "minContains", 1, path)) return false;
    return schema["maxContains"] === undefined || found <= count(schema, "maxContains", 0, path);
  }

  #object(value: Schema, at: Located, holds: (to: Located, of: unknown) => boolean): boolean {
    const { schema, path } = at as Located & { readonly schema: Schema };
    const keys = Object.keys(value);
    if (keys.length < count(schema, "minProperties", 0, path)) return false;
    if (schema["maxProperties"] !== undefined && keys.length > count(schema, "maxProperties", 0, path)) return false;
    if (schema["unevaluatedProperties"] !== undefined)
      throw new SchemaError(path, "'unevaluatedProperties' beside a constant is not supported");
    if (names(schema, "required", path).some((name) => !Object.hasOwn(value, name))) return false;
    const patterns = Object.keys(record(schema, "patternProperties", path));
    for (const key of keys) {
      const own = Object.hasOwn(record(schema, "properties", path), key);
      if (own && !holds(this.#document.sub(at, "properties", key), value[key])) return false;
      const matching = patterns.filter((pattern) => this.#patterns.matches(pattern, key, path));
      if (matching.some((pattern) => !holds(this.#document.sub(at, "patternProperties", pattern), value[key]))) return false;
      if (!own && matching.length === 0 && schema["additionalProperties"] !== undefined)
        if (!holds(this.#document.sub(at, "additionalProperties"), value[key])) return false;
      if (schema["propertyNames"] !== undefined && !holds(this.#document.sub(at, "propertyNames"), key)) return false;
    }
    for (const key of ["dependentRequired", "dependentSchemas", "dependencies"])
      for (const [name, needs] of Object.entries(record(schema, key, path))) {
        if (!Object.hasOwn(value, name)) continue;
        if (
          Array.isArray(needs)
            ? needs.some((each) => !Object.hasOwn(value, String(each)))
            : !holds(this.#document.sub(at, key, name), value)
        )
          return false;
      }
    return true;
  }
}

function number(value: number, schema: Schema, path: string, booleans: boolean): boolean {
  const { multipleOf } = schema;
  if (multipleOf !== undefined) {
    if (!Number.isSafeInteger(multipleOf) || !Number.isSafeInteger(value))
      throw new SchemaError(path, "'multipleOf' beside a constant is supported for whole numbers only");
    if (value % (multipleOf as number) !== 0) return false;
  }
  const { min, above, max, below } = bounds(schema, path, booleans);
  return !(value < min || value <= above || value > max || value >= below);
}

/** Bounds of a number. In draft-04 (`booleans`), `exclusiveMinimum` says whether `minimum` is excluded. */
export function bounds(schema: Schema, path: string, booleans: boolean): { min: number; above: number; max: number; below: number } {
  const [min, max] = [bound(schema, "minimum", path) ?? -Infinity, bound(schema, "maximum", path) ?? Infinity];
  if (!booleans)
    return {
      min,
      max,
      above: bound(schema, "exclusiveMinimum", path) ?? -Infinity,
      below: bound(schema, "exclusiveMaximum", path) ?? Infinity,
    };
  for (const key of ["exclusiveMinimum", "exclusiveMaximum"])
    if (schema[key] !== undefined && typeof schema[key] !== "boolean")
      throw new SchemaError(path, `'${key}' must be true or false in draft-04`);
  const [low, high] = [schema["exclusiveMinimum"] === true, schema["exclusiveMaximum"] === true];
  return { min, max, above: low ? min : -Infinity, below: high ? max : Infinity };
}

/** A canonical text of a JSON value, independent of the order of members. */
export function canonical(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value);
  return JSON.stringify(value, (_key, each: unknown) =>
    isSchema(each) ? Object.fromEntries(Object.entries(each).sort(([a], [b]) => (a < b ? -1 : 1))) : each,
  );
}
