/**
 * JSON Schema as a grammar. Everything the grammar generates satisfies the schema, but not every valid value can be generated:
 * members come in the schema's order, and members that the schema does not mention are omitted. Keywords that can't be enforced
 * are errors. Knows no tokens.
 */
import { characters, choice, EMPTY, type Expression, literal, MANY, oneOf, optional, repeat, sequence } from "./expression.ts";
import { BOOLEAN, COLON, COMMA, NULL, object, PLAIN_CHARACTER, SPACE, string, VALUE } from "./json.ts";
import { asserts, canonical, isSchema, list, merged, refuseOverlap, type Schema, SchemaError, SILENT } from "./keywords.ts";
import { counts, numberOf, stringOf } from "./scalar.ts";

const MAX_PARTS = 20_000;
const MAX_DEPTH = 64;

const OBJECT_KEYS = ["properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"];
const ARRAY_KEYS = ["items", "prefixItems", "additionalItems", "minItems", "maxItems"];
const STRING_KEYS = ["minLength", "maxLength", "pattern", "format"];
const NUMBER_KEYS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
const KEYS_OF_TYPE: Readonly<Record<string, readonly string[]>> = {
  object: OBJECT_KEYS,
  array: ARRAY_KEYS,
  string: STRING_KEYS,
  number: NUMBER_KEYS,
  integer: NUMBER_KEYS,
  boolean: [],
  null: [],
};
const LOGIC = ["$ref", "enum", "const", "anyOf", "oneOf", "allOf", "type"];
const KNOWN = new Set([
  ...SILENT,
  ...LOGIC,
  ...Object.values(KEYS_OF_TYPE).flat(),
  "uniqueItems",
  "unevaluatedProperties",
  "unevaluatedItems",
]);

/** The grammar of a schema's values. Throws SchemaError. */
export function schemaGrammar(schema: unknown): Expression {
  return new SchemaReader(schema).read(schema, "", 0);
}

class SchemaReader {
  readonly #root: unknown;
  readonly #rules = new Map<string, Expression & { kind: "rule" }>();
  #parts = 0;

  constructor(root: unknown) {
    this.#root = root;
  }

  read(schema: unknown, path: string, depth: number): Expression {
    this.#spend(1, path);
    if (depth > MAX_DEPTH) throw tooLarge(path);
    if (schema === true) return VALUE;
    if (schema === false) throw new SchemaError(path, "no value is valid");
    if (!isSchema(schema)) throw new SchemaError(path, `a schema must be an object, not ${JSON.stringify(schema)}`);
    const unknown = Object.keys(schema).find((key) => !KNOWN.has(key) && !key.startsWith("x-"));
    if (unknown !== undefined) throw new SchemaError(path, `'${unknown}' is not supported`);
    if (schema["uniqueItems"] === true) throw new SchemaError(path, "'uniqueItems' is not supported");
    for (const key of ["unevaluatedProperties", "unevaluatedItems"])
      if (schema[key] !== undefined && typeof schema[key] !== "boolean")
        throw new SchemaError(path, `'${key}' is supported as true or false only`);

    if (schema["$ref"] !== undefined) {
      const { $ref: reference, ...others } = schema;
      if (asserts(others)) return this.read(merged(others, this.#resolve(reference, path), path), path, depth + 1);
      return this.#rule(String(reference), path, depth);
    }
    if (schema["allOf"] !== undefined) {
      const { allOf, ...others } = schema;
      const all = list(allOf, `${path}/allOf`).map((each, i) => this.#flat(each, `${path}/allOf/${i}`));
      this.#spend(
        all.reduce((sum, each) => sum + sizeOf(each), 0),
        path,
      );
      return this.read(
        all.reduce<Schema>((sum, each) => merged(sum, each, path), others),
        path,
        depth + 1,
      );
    }
    for (const key of ["anyOf", "oneOf"] as const) {
      if (schema[key] === undefined) continue;
      const { [key]: branches, ...others } = schema;
      const all = list(branches, `${path}/${key}`).map((each, i) => this.#flat(each, `${path}/${key}/${i}`));
      this.#spend(all.length * sizeOf(others), path);
      if (key === "oneOf") refuseOverlap(all, `${path}/oneOf`);
      return choice(...all.map((each, i) => this.read(merged(others, each, path), `${path}/${key}/${i}`, depth + 1)));
    }
    if (schema["const"] !== undefined) {
      const { enum: values, const: value } = schema;
      if (values !== undefined && !list(values, `${path}/enum`).some((each) => canonical(each) === canonical(value)))
        throw new SchemaError(path, "'const' is not one of 'enum': no value is valid");
      return this.#values([value], schema, path);
    }
    if (schema["enum"] !== undefined) return this.#values(list(schema["enum"], `${path}/enum`), schema, path);
    return choice(...this.#types(schema, path).map((type) => this.#typed(type, schema, path, depth)));
  }

  /** Counts work against the limit. Parts that are read repeatedly, like the siblings of each branch of a choice, count each time. */
  #spend(parts: number, path: string): void {
    this.#parts += parts;
    if (this.#parts > MAX_PARTS) throw tooLarge(path);
  }

  /** The types of a schema: those it names, else those that its keywords apply to. */
  #types(schema: Schema, path: string): string[] {
    const { type } = schema;
    const named = type === undefined ? [] : [type].flat();
    const wrong = named.find((each) => typeof each !== "string" || !Object.hasOwn(KEYS_OF_TYPE, each));
    if (wrong !== undefined || (type !== undefined && named.length === 0))
      throw new SchemaError(path, `type ${JSON.stringify(wrong ?? type)} is not known; known are ${Object.keys(KEYS_OF_TYPE).join(", ")}`);
    if (named.length > 0) return named as string[];
    const meant = ["object", "array", "string", "number"].filter((each) => KEYS_OF_TYPE[each].some((key) => schema[key] !== undefined));
    return meant.length > 0 ? meant : ["any"];
  }

  #typed(type: string, schema: Schema, path: string, depth: number): Expression {
    switch (type) {
      case "object":
        return this.#object(schema, path, depth);
      case "array":
        return this.#array(schema, path, depth);
      case "string":
        return stringOf(schema, path);
      case "number":
      case "integer":
        return numberOf(schema, path, type === "integer");
      case "boolean":
        return BOOLEAN;
      case "null":
        return NULL;
      default:
        return VALUE;
    }
  }

  #object(schema: Schema, path: string, depth: number): Expression {
    const properties = schema["properties"] ?? {};
    if (!isSchema(properties)) throw new SchemaError(`${path}/properties`, "properties must be an object of schemas");
    const required = list(schema["required"] ?? [], `${path}/required`).map(String);
    const more = schema["additionalProperties"] ?? (schema["unevaluatedProperties"] === false ? false : undefined);
    const keys = schema["propertyNames"];
    if (keys !== undefined && !isSchema(keys)) throw new SchemaError(`${path}/propertyNames`, "a schema must be an object");
    const [least, most] = counts(schema, "minProperties", "maxProperties", path);
    const names = [...Object.keys(properties), ...required.filter((name) => !Object.hasOwn(properties, name))];
    const member = (key: Expression, value: Expression) => sequence(key, COLON, value);
    const value = (name: string) => {
      if (Object.hasOwn(properties, name)) return this.read(properties[name], `${path}/properties/${name}`, depth + 1);
      if (more === false) throw new SchemaError(path, `'${name}' is required, but no such property is allowed`);
      return this.read(more ?? true, `${path}/additionalProperties`, depth + 1);
    };
    // Additional properties are generated only if they have a schema, or if the schema mentions no properties at all.
    const open = isSchema(more) || (names.length === 0 && more !== false);
    if (names.length === 0) {
      if (!open) return sequence(literal("{"), SPACE, literal("}"));
      if (least > 1) throw new SchemaError(path, "'minProperties' above 1 is not supported: a name might come twice");
      const key = keys === undefined ? string() : this.read({ type: "string", ...keys }, `${path}/propertyNames`, depth + 1);
      return object(key, more === undefined || more === true ? VALUE : value(""), least, most);
    }
    if (keys !== undefined && Object.keys(keys).some((key) => !SILENT.has(key) && key !== "type"))
      throw new SchemaError(path, "'propertyNames' beside 'properties' is not supported");
    if (required.length < least) throw new SchemaError(path, `'minProperties' is ${least}, and only ${required.length} are required`);
    if (most < names.length || (open && most < MANY))
      throw new SchemaError(path, "'maxProperties' is not supported with fewer than there are properties");
    const members = names.map((name) => ({ needed: required.includes(name), text: member(literal(JSON.stringify(name)), value(name)) }));
    const another = open ? member(otherName(names), this.read(more, `${path}/additionalProperties`, depth + 1)) : null;

    // From last to first: what may follow if a member has been written already, and if none has.
    let following: Expression = another ? sequence(repeat(sequence(COMMA, another), 0), SPACE) : SPACE;
    let leading: Expression = another ? optional(sequence(another, repeat(sequence(COMMA, another), 0), SPACE)) : EMPTY;
    for (const { needed, text } of members.reverse()) {
      const [here, first] = [sequence(COMMA, text, following), sequence(text, following)];
      leading = needed ? first : choice(first, leading);
      following = needed ? here : choice(here, following);
    }
    return sequence(literal("{"), SPACE, leading, literal("}"));
  }

  #array(schema: Schema, path: string, depth: number): Expression {
    const { items, prefixItems } = schema;
    const old = Array.isArray(items); // drafts before 2020-12
    const first = list((old ? items : prefixItems) ?? [], `${path}/prefixItems`);
    const rest = (old ? schema["additionalItems"] : items) ?? (schema["unevaluatedItems"] === false ? false : undefined);
    const [least, longest] = counts(schema, "minItems", "maxItems", path);
    const most =
      rest === false || (rest === undefined && first.length > 0 && least <= first.length) ? Math.min(longest, first.length) : longest;
    if (most < least) throw new SchemaError(path, `at least ${least} items are required, but at most ${most} are allowed`);
    const leading = first.slice(0, most).map((each, i) => this.read(each, `${path}/prefixItems/${i}`, depth + 1));
    const left = most === MANY ? MANY : most - leading.length;
    const other = left > 0 ? this.read(rest ?? true, `${path}/items`, depth + 1) : EMPTY;
    let tail = left > 0 ? repeat(sequence(COMMA, other), Math.max(least - leading.length, 0), left) : EMPTY;
    for (const [i, each] of [...leading.entries()].reverse()) {
      if (i === 0) tail = sequence(each, tail);
      else tail = i >= least ? optional(sequence(COMMA, each, tail)) : sequence(COMMA, each, tail);
    }
    if (leading.length === 0 && left > 0)
      tail = sequence(other, repeat(sequence(COMMA, other), Math.max(least - 1, 0), left === MANY ? MANY : left - 1));
    const filled = sequence(tail, SPACE);
    return sequence(literal("["), SPACE, ...(most === 0 ? [] : [least > 0 ? filled : optional(filled)]), literal("]"));
  }

  #values(values: readonly unknown[], schema: Schema, path: string): Expression {
    const other = Object.keys(schema).find((key) => !SILENT.has(key) && !["enum", "const", "type"].includes(key));
    if (other !== undefined)
      throw new SchemaError(path, `'${other}' beside 'enum' or 'const' is not supported: list the values that remain`);
    this.#spend(values.length, path);
    const types = schema["type"] === undefined ? null : this.#types(schema, path);
    const allowed = values.filter((value) => !types || types.some((type) => isOfType(value, type)));
    if (allowed.length === 0) throw new SchemaError(path, "no value is valid");
    return oneOf(allowed.map((value) => JSON.stringify(value)));
  }

  /** A rule for a reference, so that schemas may be recursive. */
  #rule(reference: string, path: string, depth: number): Expression {
    const known = this.#rules.get(reference);
    if (known) return known;
    const rule: Expression & { kind: "rule" } = { kind: "rule", to: null };
    this.#rules.set(reference, rule);
    rule.to = this.read(this.#resolve(reference, path), reference, depth + 1);
    if (leadsBack(rule.to, rule)) throw new SchemaError(path, `'${reference}' refers to itself and to nothing else`);
    return rule;
  }

  #resolve(reference: unknown, path: string): unknown {
    if (typeof reference !== "string" || !/^#(\/|$)/.test(reference))
      throw new SchemaError(
        path,
        `$ref ${JSON.stringify(reference)} is not supported: only references within the schema, like #/$defs/name`,
      );
    let at: unknown = this.#root;
    for (const part of reference.split("/").slice(1)) {
      const key = decodeURIComponent(part).replaceAll("~1", "/").replaceAll("~0", "~");
      at = typeof at === "object" && at !== null && Object.hasOwn(at, key) ? (at as Schema)[key] : undefined;
    }
    if (at === undefined) throw new SchemaError(path, `$ref '${reference}' leads nowhere`);
    return at;
  }

  /** A branch of a choice, with references at its top resolved. */
  #flat(schema: unknown, path: string): Schema {
    let at = schema;
    for (let hops = 0; isSchema(at) && at["$ref"] !== undefined; hops++) {
      if (hops > MAX_DEPTH) throw new SchemaError(path, "$ref refers to itself and to nothing else");
      const { $ref: reference, ...others } = at;
      // A bare reference stays one, since it may be recursive.
      if (!asserts(others)) return at;
      at = merged(others, this.#resolve(reference, path), path);
    }
    if (at === true) return {};
    if (!isSchema(at)) throw new SchemaError(path, at === false ? "no value is valid" : "a schema must be an object");
    return at;
  }
}

function tooLarge(path: string): SchemaError {
  return new SchemaError(path, `the schema is too large: at most ${MAX_PARTS} parts, ${MAX_DEPTH} within each other`);
}

/** How much work it is to merge a schema with another. */
function sizeOf(schema: Schema): number {
  const widths = Object.values(schema).map((value) => (typeof value === "object" && value !== null ? Object.keys(value).length : 0));
  return widths.reduce((sum, width) => sum + width, 1);
}

/** A key other than these names, written without escapes. */
function otherName(names: readonly string[]): Expression {
  const rest: Expression = { kind: "text", character: PLAIN_CHARACTER, min: 0, max: MANY };
  const differing = (tails: readonly string[][]): Expression => {
    const heads = [...new Set(tails.flatMap(([head]) => head ?? []))];
    const points = heads.map((head) => head.codePointAt(0) ?? 0).concat(0x22, 0x5c);
    const free: [number, number][] = [];
    let from = 0x20;
    for (const point of points.sort((x, y) => x - y)) {
      if (point > from) free.push([from, point - 1]);
      from = Math.max(from, point + 1);
    }
    free.push([from, 0x10ffff]);
    // Keys that share a prefix with a name containing a quote would need escapes, so they are omitted.
    const plain = heads.filter((head) => (head.codePointAt(0) ?? 0) >= 0x20 && head !== '"' && head !== "\\");
    const longer = plain.map((head) => sequence(literal(head), differing(tails.filter((t) => t[0] === head).map((t) => t.slice(1)))));
    const ended = tails.some((tail) => tail.length === 0);
    return choice(sequence(characters(free), rest), ...(ended ? [] : [literal('"')]), ...longer);
  };
  return sequence(literal('"'), differing(names.map((name) => [...name])));
}

/** Whether an expression begins with a rule before anything else. */
function leadsBack(e: Expression, rule: Expression, seen = new Set<Expression>()): boolean {
  if (e === rule) return true;
  if (seen.has(e)) return false;
  seen.add(e);
  if (e.kind === "choice") return e.items.every((item) => leadsBack(item, rule, seen));
  return e.kind === "rule" && e.to !== null && leadsBack(e.to, rule, seen);
}

function isOfType(value: unknown, type: string): boolean {
  switch (type) {
    case "null":
      return value === null;
    case "array":
      return Array.isArray(value);
    case "object":
      return isSchema(value);
    case "integer":
      return Number.isInteger(value);
    case "any":
      return true;
    default:
      return typeof value === type;
  }
}
