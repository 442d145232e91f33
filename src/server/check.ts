/**
 * Checks a value against a zod schema and returns what the schema lets through. Unlike zod, it stops at the first fault, checks
 * counts before elements, and writes no report for branches that were not meant: what it costs does not grow with how wrong the
 * value is. Its errors say what was seen, what is allowed and what to send; they name fields and kinds, never private content.
 * Knows no route and no protocol.
 */
import { z } from "zod";
import type * as core from "zod/v4/core";
import { nearest, suggestion } from "../tokenizer/nearest.ts";
import { ServerError } from "./errors.ts";

/** What a schema cannot say by itself. */
interface Note {
  /** The most entries of a record. */
  readonly entries?: number;
  /** The most values inside, at any depth. */
  readonly values?: number;
  /** What to send, for errors: `a number from 0 to 2`. Default: derived from the schema. */
  readonly wanted?: string;
  /** Other names that clients know for an object's fields, and what to say of them. */
  readonly elsewhere?: Readonly<Record<string, string>>;
  /** Accepted, whatever it is, and left out of the result. */
  readonly ignored?: boolean;
}

const notes = z.registry<Note>();

/** The schema, with a note. */
export function noted<T extends z.ZodType>(schema: T, note: Note): T {
  notes.add(schema as never, note);
  return schema;
}

/** The most characters of all texts of a value together: those that are accepted are copied between threads. */
export const MOST_TEXT = 2 ** 23;

/** How an error names a field, and what it says of the whole value. */
export interface Naming {
  /** Default: `the body`. */
  readonly whole?: string;
  /** The sentence's name for a field. Default: unchanged. */
  readonly nameOf?: (param: string) => string;
}

/** The value as the schema lets it through: unknown fields of objects that are not strict are left out. Throws ServerError `invalid_request`. */
export function check<T extends z.ZodType>(schema: T, value: unknown, naming: Naming = {}): z.output<T> {
  return new Check(naming).read(schema as unknown as Schema, value) as z.output<T>;
}

/** The kinds of schemas that requests are made of. */
type Schema =
  | core.$ZodString
  | core.$ZodNumber
  | core.$ZodBoolean
  | core.$ZodNull
  | core.$ZodLiteral
  | core.$ZodEnum
  | core.$ZodUnknown
  | core.$ZodArray
  | core.$ZodObject
  | core.$ZodRecord
  | core.$ZodUnion
  | core.$ZodOptional
  | core.$ZodNullable;

const inner = (schema: core.$ZodType): Schema => schema as Schema;
const noteOf = (schema: Schema): Note => notes.get(schema as never) ?? {};

class Check {
  readonly #naming: Naming;
  readonly #path: (string | number)[] = [];
  #text = 0;

  constructor(naming: Naming) {
    this.#naming = naming;
  }

  read(schema: Schema, value: unknown): unknown {
    const { def } = schema._zod;
    const { values, ignored } = noteOf(schema);
    if (ignored) return undefined;
    if (values !== undefined) this.#count(value, values);
    switch (def.type) {
      case "optional":
        return value === undefined ? undefined : this.read(inner(def.innerType), value);
      case "nullable":
        return value === null ? null : this.read(inner(def.innerType), value);
      case "union":
        return this.read(this.#branch(schema as core.$ZodUnion, value), value);
      case "array":
        return this.#list(schema as core.$ZodArray, value);
      case "object":
        return this.#object(schema as core.$ZodObject, value);
      case "record":
        return this.#record(schema as core.$ZodRecord, value);
      case "unknown":
        this.#measure(value);
        return value;
      case "string":
      case "number":
      case "boolean":
      case "null":
      case "literal":
      case "enum":
        return this.#leaf(schema, value);
      default:
        throw new Error(`internal: requests are not checked for ${(def satisfies never as { type: string }).type}`);
    }
  }

  #list(schema: core.$ZodArray, value: unknown): unknown[] {
    if (!Array.isArray(value)) throw this.#mismatch(schema, value);
    const { least, most } = lengths(schema);
    if (value.length < least)
      throw this.#fault(`is an empty list; it must have at least ${least === 1 ? "one element" : `${least} elements`}`);
    if (value.length > most) throw this.#fault(`has ${value.length} elements; at most ${most} are allowed`);
    const element = inner(schema._zod.def.element);
    return value.map((each, i) => this.#at(i, element, each));
  }

  #object(schema: core.$ZodObject, value: unknown): object {
    if (!isObject(value)) throw this.#mismatch(schema, value);
    const { shape, catchall } = schema._zod.def;
    const strict = catchall?._zod.def.type === "never";
    for (const name of Object.keys(value)) if (!Object.hasOwn(shape, name)) this.#unknown(schema, name, value, strict);
    const out: Record<string, unknown> = {};
    for (const [name, field] of Object.entries(shape)) {
      const read = this.#at(name, inner(field), Object.hasOwn(value, name) ? value[name] : undefined);
      if (read !== undefined) out[name] = read;
    }
    return out;
  }

  /** A field that the object does not have: refused, but where clients may add their own; there, only what looks like a slip is. */
  #unknown(schema: core.$ZodObject, name: string, value: Readonly<Record<string, unknown>>, strict: boolean): void {
    const known = Object.keys(schema._zod.def.shape);
    const meant = nearest(
      name,
      known.filter((each) => !(each in value)),
    );
    if (!strict && meant === null) return;
    const elsewhere = noteOf(schema).elsewhere ?? {};
    const hint = Object.hasOwn(elsewhere, name) ? `; ${elsewhere[name]}` : suggestion(name, known);
    const { whole = "the body" } = this.#naming;
    const where = this.#path.length === 0 ? whole : this.#name();
    this.#path.push(name);
    throw this.#refusal(`there is no field '${pathOf([name])}' in ${where}${hint}`);
  }

  #record(schema: core.$ZodRecord, value: unknown): object {
    if (!isObject(value)) throw this.#mismatch(schema, value);
    const { entries = MOST_ENTRIES } = noteOf(schema);
    const names = Object.keys(value);
    if (names.length > entries) throw this.#fault(`has ${names.length} entries; at most ${entries} are allowed`);
    const { keyType, valueType } = schema._zod.def;
    for (const name of names) {
      const wrong = z.safeParse(keyType, name).error?.issues[0];
      if (wrong) throw this.#fault(`has an entry with a wrong name: ${wrong.message}`);
      this.#text += name.length;
    }
    return Object.fromEntries(names.map((name) => [name, this.#at(name, inner(valueType), value[name])]));
  }

  /** The branch that was meant, judged by kinds alone: a tag, or the kind of the value and of its first element. */
  #branch(schema: core.$ZodUnion, value: unknown): Schema {
    const options = schema._zod.def.options.map(inner);
    const { discriminator } = schema._zod.def as { readonly discriminator?: string };
    if (discriminator !== undefined) return this.#tagged(schema, options, discriminator, value);
    const fitting = options.find((option) => fits(option, value));
    if (fitting) return fitting;
    const lists = options.filter((option) => option._zod.def.type === "array") as core.$ZodArray[];
    if (!Array.isArray(value) || lists.length === 0) throw this.#mismatch(schema, value);
    this.#path.push(0);
    throw this.#fault(`is ${kindOf(value[0])}; it must be ${either(lists.map((list) => wantedBy(inner(list._zod.def.element))))}`);
  }

  #tagged(schema: Schema, options: readonly Schema[], tag: string, value: unknown): Schema {
    if (!isObject(value)) throw this.#mismatch(schema, value);
    const tagOf = (option: Schema) => inner((option as core.$ZodObject)._zod.def.shape[tag]);
    const found = options.find((option) => tagsOf(tagOf(option)).includes(value[tag]));
    if (found) return found;
    this.#path.push(tag);
    throw this.#oneOf(
      options.flatMap((option) => tagsOf(tagOf(option))),
      value[tag],
    );
  }

  #leaf(schema: Schema, value: unknown): unknown {
    const { def } = schema._zod;
    if (!fits(schema, value)) throw this.#mismatch(schema, value);
    if (typeof value === "string") this.#measure(value);
    const { error, data } = z.safeParse(schema, value);
    if (!error) return data;
    const [issue] = error.issues;
    if (def.type === "literal" || def.type === "enum")
      throw noteOf(schema).wanted ? this.#mismatch(schema, value) : this.#oneOf(tagsOf(schema), value);
    switch (issue.code) {
      case "too_small":
        if (typeof value === "string") throw this.#mismatch(schema, value);
        throw this.#fault(`is ${String(value)}; it must be ${issue.inclusive === false ? "more than" : "at least"} ${issue.minimum}`);
      case "too_big":
        if (typeof value === "string") throw this.#fault(`has ${value.length} characters; at most ${issue.maximum} are allowed`);
        throw this.#fault(`is ${String(value)}; it must be ${issue.inclusive === false ? "less than" : "at most"} ${issue.maximum}`);
      case "invalid_type":
        throw this.#mismatch(schema, value);
      default:
        throw this.#fault(`is not right: ${issue.message}`);
    }
  }

  #at(key: string | number, schema: Schema, value: unknown): unknown {
    this.#path.push(key);
    const read = this.read(schema, value);
    this.#path.pop();
    return read;
  }

  /** Adds the texts of a value that no schema describes. */
  #measure(value: unknown): void {
    if (typeof value === "string") this.#text += value.length;
    else if (Array.isArray(value)) for (const each of value) this.#measure(each);
    else if (isObject(value))
      for (const [name, each] of Object.entries(value)) {
        this.#text += name.length;
        this.#measure(each);
      }
    if (this.#text > MOST_TEXT)
      throw new ServerError(
        "invalid_request",
        `the texts of ${this.#naming.whole ?? "the body"} have more than ${MOST_TEXT} characters together`,
      );
  }

  #count(value: unknown, most: number): void {
    let left = most;
    const visit = (each: unknown): void => {
      if (typeof each !== "object" || each === null) return;
      const parts = Object.values(each);
      left -= parts.length;
      if (left < 0) throw this.#fault(`holds more than ${most} values, which is the most`);
      for (const part of parts) visit(part);
    };
    visit(value);
  }

  #mismatch(schema: Schema, value: unknown): ServerError {
    const shown = schema._zod.def.type === "literal" || schema._zod.def.type === "enum" ? seen(value) : kindOf(value);
    return this.#fault(`is ${shown}; it must be ${wantedBy(schema)}`);
  }

  #oneOf(allowed: readonly unknown[], value: unknown): ServerError {
    const names = allowed.map(String);
    const hint = typeof value === "string" ? suggestion(value, names) : "";
    return this.#fault(`is ${seen(value)}; it must be ${either(names.map((name) => `'${name}'`))}${hint}`);
  }

  /** An error about the value at the path. */
  #fault(what: string): ServerError {
    return this.#refusal(`${this.#name()} ${what}`);
  }

  #refusal(message: string): ServerError {
    return new ServerError("invalid_request", message, { param: pathOf(this.#path) || undefined });
  }

  /** What errors call the value at the path. */
  #name(): string {
    const { whole = "the body", nameOf = (name: string) => name } = this.#naming;
    return this.#path.length === 0 ? whole : nameOf(pathOf(this.#path));
  }
}

/** The most entries of a record that has no note. */
const MOST_ENTRIES = 1024;

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether a value is of the kind that a schema takes; looks no deeper than a list's first element. */
function fits(schema: Schema, value: unknown): boolean {
  const { def } = schema._zod;
  switch (def.type) {
    case "optional":
      return value === undefined || fits(inner(def.innerType), value);
    case "nullable":
      return value === null || fits(inner(def.innerType), value);
    case "union":
      return def.options.some((option) => fits(inner(option), value));
    case "array":
      return Array.isArray(value) && (value.length === 0 || fits(inner(def.element), value[0]));
    case "object":
    case "record":
      return isObject(value);
    case "literal":
    case "enum":
      return tagsOf(schema).some((tag) => typeof tag === typeof value);
    case "null":
      return value === null;
    case "unknown":
      return true;
    case "string":
    case "number":
    case "boolean":
      return typeof value === def.type;
    default:
      return def satisfies never;
  }
}

/** Values of a literal or an enumeration. */
function tagsOf(schema: Schema): readonly unknown[] {
  const { def } = schema._zod;
  if (def.type === "literal") return def.values;
  return def.type === "enum" ? Object.values(def.entries) : [];
}

function lengths(schema: core.$ZodArray): { readonly least: number; readonly most: number } {
  let [least, most]: [number, number | null] = [0, null];
  for (const rule of rulesOf(schema)) {
    if (rule.check === "min_length") least = (rule as core.$ZodCheckMinLengthDef).minimum;
    if (rule.check === "max_length") most = (rule as core.$ZodCheckMaxLengthDef).maximum;
  }
  if (most === null) throw new Error("internal: a list of a request has no greatest length");
  return { least, most };
}

function rulesOf({ _zod: { def } }: core.$ZodType): readonly core.$ZodCheckDef[] {
  return (def.checks ?? []).map((rule) => rule._zod.def);
}

/** What a schema takes, for errors. */
function wantedBy(schema: Schema): string {
  const { wanted } = noteOf(schema);
  if (wanted !== undefined) return wanted;
  const { def } = schema._zod;
  switch (def.type) {
    case "optional":
    case "nullable":
      return wantedBy(inner(def.innerType));
    case "union":
      return either(def.options.map((option) => wantedBy(inner(option))));
    case "array":
      return "a list";
    case "object":
    case "record":
      return "an object";
    case "literal":
    case "enum":
      return either(tagsOf(schema).map((tag) => (typeof tag === "string" ? `'${tag}'` : String(tag))));
    case "null":
      return "null";
    case "unknown":
      return "any value";
    case "string":
      return "a text";
    case "number":
      return rulesOf(schema).some(({ check }) => check === "number_format") ? "a whole number" : "a number";
    case "boolean":
      return "true or false";
    default:
      return def satisfies never;
  }
}

function either(texts: readonly string[]): string {
  const all = [...new Set(texts)];
  return all.length < 2 ? all.join("") : `${all.slice(0, -1).join(", ")} or ${all.at(-1)}`;
}

/** A value's kind, for errors: never its content. */
function kindOf(value: unknown): string {
  if (value === undefined) return "missing";
  if (value === null) return "null";
  if (value === "") return "an empty text";
  if (Array.isArray(value)) return value.length === 0 ? "an empty list" : "a list";
  switch (typeof value) {
    case "string":
      return "a text";
    case "number":
      return Number.isInteger(value) ? "a number" : "a number with decimals";
    case "boolean":
      return String(value);
    default:
      return "an object";
  }
}

/** A value where one of a few names belongs: shown if it looks like a name. */
function seen(value: unknown): string {
  return typeof value === "string" && /^[\w.:-]{1,40}$/.test(value) ? `'${value}'` : kindOf(value);
}

/** The longest name of a field that errors repeat. */
const LONGEST_NAME = 64;

/** A path as people write it: `messages[2].content`. */
function pathOf(path: readonly (string | number)[]): string {
  return path.reduce<string>((at, key) => {
    const whole = String(key);
    const name = whole.length > LONGEST_NAME ? `${whole.slice(0, LONGEST_NAME)}…` : whole;
    if (/^\d+$/.test(name)) return `${at}[${name}]`;
    return at ? `${at}.${name}` : name;
  }, "");
}
