/**
 * JSON Schema as a grammar. Everything the grammar generates satisfies the schema, but not every valid value can be generated:
 * members come in the schema's order, and members that the schema does not mention are omitted. Keywords that can't be enforced
 * are errors. Knows no tokens.
 */
import { arrayOf, objectOf, type Reader } from "./containers.ts";
import { Document, type Located, type Schema } from "./document.ts";
import { SchemaError, WorkError } from "./error.ts";
import { choice, type Expression, oneOf } from "./expression.ts";
import { BOOLEAN, NULL, VALUE } from "./json.ts";
import { constrains, isOfType, type Type, typesMeant } from "./keywords.ts";
import type { Language, Languages } from "./language.ts";
import { type Alternative, Logic, typesOf } from "./logic.ts";
import { Members } from "./members.ts";
import { isEmpty, numberOf, range } from "./numbers.ts";
import { Patterns } from "./patterns.ts";
import { deadParts } from "./productive.ts";
import { languageOf, stringOf } from "./strings.ts";
import { canonical, Validator } from "./value.ts";
import { run, type Steps, Work } from "./work.ts";

/** How deep members are compared to prove that schemas exclude each other. */
const MAX_PROOF = 3;

/** The grammar of a schema's values. Throws SchemaError. */
export function schemaGrammar(schema: unknown): Expression {
  return run(schemaSteps(schema, new Work()));
}

/** The same, pausing after each slice of work. @param type the values must be of this type, whatever the schema says */
export function* schemaSteps(schema: unknown, work: Work, type?: Type): Steps<Expression> {
  const reader = new SchemaReader(yield* Document.read(schema, work), work);
  yield* work.pause();
  return yield* reader.grammar(type);
}

type Rule = Expression & { kind: "rule" };

class SchemaReader implements Reader {
  readonly languages: Languages;
  readonly #work: Work;
  readonly #document: Document;
  readonly #patterns: Patterns;
  readonly #logic: Logic;
  readonly #validator: Validator;
  /** By the identities of the schemas that hold together. */
  readonly #rules = new Map<string, Rule>();
  readonly #pending: { readonly rule: Rule; readonly schemas: readonly Located[] }[] = [];
  /** Where a value turned out to be impossible first, and why. */
  #impossible: SchemaError | null = null;
  #path = "";

  constructor(document: Document, work: Work) {
    this.#work = work;
    this.#document = document;
    this.#patterns = new Patterns(work);
    this.languages = this.#patterns.languages;
    this.#validator = new Validator(document, this.#patterns, work);
    this.#logic = new Logic(document, work, (schemas) => this.#excludes(schemas, 0));
  }

  *grammar(type: Type | undefined): Steps<Expression> {
    const { root } = this.#document;
    const rule = this.read(type === undefined ? [root] : [root, this.#document.derived(root, "type", () => ({ type }))]);
    // Not recursive: a chain of references may be long.
    for (let next = this.#pending.pop(); next !== undefined; next = this.#pending.pop()) {
      this.#path = next.schemas[0]?.path ?? "";
      next.rule.to = yield* this.#values(next.schemas);
      yield* this.pause();
    }
    if ((yield* deadParts(rule)).has(rule))
      throw this.#impossible ?? new SchemaError("", "every value would have to hold another: no value is valid");
    return rule;
  }

  read(schemas: readonly Located[]): Expression {
    const own = new Map(schemas.filter(({ schema }) => schema !== true).map((each) => [each.id, each]));
    if (own.size === 0) return VALUE;
    const key = [...own.keys()].sort((a, b) => a - b).join();
    this.spend(1 + own.size);
    const known = this.#rules.get(key);
    if (known) return known;
    const rule: Rule = { kind: "rule", to: null };
    this.#rules.set(key, rule);
    this.#pending.push({ rule, schemas: [...own.values()] });
    return rule;
  }

  texts(schemas: readonly Located[]): Language {
    const all = this.#logic.alternatives(schemas).map((held): Language => {
      const values = this.#listed(held);
      if (values) return this.languages.texts(values.filter((each) => typeof each === "string"));
      return (typesOf(held)?.includes("string") ?? true) ? languageOf(held, this.#patterns) : this.languages.none;
    });
    return this.languages.or(...all);
  }

  constants(schemas: readonly Located[]): readonly unknown[] | null {
    const found = new Map<string, unknown>();
    for (const held of this.#logic.alternatives(schemas)) {
      const values = this.#listed(held);
      if (values === null) return null;
      for (const value of values) found.set(canonical(value), value);
    }
    return [...found.values()];
  }

  pattern(source: string, path: string): Language {
    return this.#patterns.language(source, path);
  }

  spend(steps: number): void {
    this.#work.spend(steps, this.#path);
  }

  pause(): Steps<void> {
    return this.#work.pause();
  }

  *#values(schemas: readonly Located[]): Steps<Expression> {
    const texts: string[] = [];
    const found: Expression[] = [];
    for (const held of this.#logic.alternatives(schemas)) {
      yield* this.pause();
      const values = this.#listed(held);
      if (values) for (const value of values) texts.push(JSON.stringify(value));
      else for (const type of this.#types(held)) found.push(...(yield* this.#typed(type, held)));
    }
    this.spend(texts.length >> 2);
    if (texts.length > 0) found.unshift(oneOf(texts));
    if (found.length === 0) this.#impossible ??= new SchemaError(schemas[0].path, "no value is valid");
    return choice(...found);
  }

  /** The values of schemas that list them; null if none does. */
  #listed(held: Alternative): readonly unknown[] | null {
    const lists = held.flatMap(({ at }) => {
      const { enum: values, const: value } = at.schema as Schema;
      return value !== undefined ? [{ values: [value], at }] : values !== undefined ? [{ values, at }] : [];
    });
    const [first] = lists;
    if (!first) return null;
    const { values, at } = lists.reduce((a, b) =>
      Array.isArray(b.values) && Array.isArray(a.values) && b.values.length < a.values.length ? b : a,
    );
    if (!Array.isArray(values)) throw new SchemaError(at.path, "'enum' must be a list of values");
    if (held.length === 1 && Object.keys(at.schema).every((key) => key === "enum" || key === "type" || !constrains(key))) {
      this.spend(values.length >> 3);
      const types = typesOf(held);
      return types === null ? values : values.filter((value) => types.some((type) => isOfType(value, type)));
    }
    // Each schema is checked alone: what it brought in is held as well.
    const alone = held.map(({ at: each }) => this.#own(each));
    return values.filter((value) => alone.every((each) => this.#validator.valid(value, each)));
  }

  /** A schema without the keywords that `Logic` has followed. */
  #own(at: Located): Located {
    const followed = ["$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"];
    const schema = at.schema as Schema;
    if (!followed.some((key) => schema[key] !== undefined)) return at;
    return this.#document.derived(
      at,
      "own",
      () => {
        const own = { ...schema };
        for (const key of followed) delete (own as Record<string, unknown>)[key];
        return own;
      },
      at.resource.draft,
    );
  }

  /** The types of a value: those that schemas name, else those that their keywords apply to; null: any. */
  #types(held: Alternative): readonly (Type | null)[] {
    const named = typesOf(held);
    if (named) return named;
    const meant = [...new Set(held.flatMap(({ at }) => typesMeant(at.schema as Schema)))];
    return meant.length > 0 ? meant : [null];
  }

  /** The values of a type; none where the schemas exclude each other. */
  *#typed(type: Type | null, held: Alternative): Steps<Expression[]> {
    const path = held[0]?.at.path ?? "";
    this.spend(held.length);
    switch (type) {
      case "object":
        return [yield* objectOf(new Members(held, this.#document, this.#patterns, this.#work), path, this)];
      case "array":
        return [yield* arrayOf(new Members(held, this.#document, this.#patterns, this.#work), path, this)];
      case "string":
        return this.#known(
          yield* stringOf(held, this.#patterns, () => this.pause()),
          path,
          "no text satisfies the lengths and patterns together",
        );
      case "number":
      case "integer":
        return this.#known(
          numberOf(held, type === "integer", (steps) => this.spend(steps)),
          path,
          "no number lies between the bounds",
        );
      case "boolean":
        return [BOOLEAN];
      case "null":
        return [NULL];
      case null:
        return [VALUE];
      default:
        return type satisfies never;
    }
  }

  #known(found: Expression | null, path: string, otherwise: string): Expression[] {
    if (found === null) this.#impossible ??= new SchemaError(path, `${otherwise}: no value is valid`);
    return found === null ? [] : [found];
  }

  /** Proves that schemas allow no value together; false where it can't. */
  #excludes(schemas: readonly Located[], depth: number): boolean {
    try {
      return this.#logic.alternatives(schemas, false).every((held) => this.#empty(held, depth));
    } catch (cause) {
      if (cause instanceof SchemaError && !(cause instanceof WorkError)) return false;
      throw cause;
    }
  }

  #empty(held: Alternative, depth: number): boolean {
    this.spend(1 + held.length);
    const types = typesOf(held);
    const lists = held.some(({ at }) => (at.schema as Schema)["enum"] !== undefined || (at.schema as Schema)["const"] !== undefined);
    if (lists) return this.#listed(held)?.every((value) => types !== null && !types.some((type) => isOfType(value, type))) ?? false;
    return types?.every((type) => this.#emptyType(type, held, depth)) ?? false;
  }

  #emptyType(type: Type, held: Alternative, depth: number): boolean {
    switch (type) {
      case "boolean":
      case "null":
        return false;
      case "number":
      case "integer":
        return isEmpty(range(held));
      case "string": {
        const language = languageOf(held, this.#patterns, false);
        return this.languages.isEmpty(language);
      }
      case "array": {
        const [least, most] = new Members(held, this.#document, this.#patterns, this.#work).counts("minItems", "maxItems");
        return least > most;
      }
      case "object": {
        const members = new Members(held, this.#document, this.#patterns, this.#work);
        const [least, most] = members.counts("minProperties", "maxProperties");
        const { required } = members.names();
        if (least > most || required.size > most) return true;
        return [...required].some((name) => {
          const schemas = members.member(name);
          if (schemas.some(({ schema }) => schema === false)) return true;
          return depth < MAX_PROOF && schemas.length > 1 && this.#excludes(schemas, depth + 1);
        });
      }
      default:
        return type satisfies never;
    }
  }
}
