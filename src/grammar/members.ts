/**
 * What schemas say together about the members of an object and the items of an array: which names there are, and which schemas
 * hold for one of them. Knows no grammar.
 */
import { type Document, isSchema, type Located, type Schema } from "./document.ts";
import { SchemaError } from "./error.ts";
import { MANY } from "./expression.ts";
import { count, list, names, record } from "./keywords.ts";
import type { Alternative, Held } from "./logic.ts";
import type { Patterns } from "./patterns.ts";
import type { Work } from "./work.ts";

/** The schemas that `held` brought in, itself included. */
function broughtIn(all: Alternative, held: Held): Held[] {
  return all.filter((each) => {
    for (let above: Held | null = each; above !== null; above = above.from) if (above === held) return true;
    return false;
  });
}

interface Part {
  readonly held: Held;
  readonly at: Located;
  readonly schema: Schema;
  readonly properties: Schema;
  readonly patterns: readonly string[];
  readonly prefix: number;
  /** Keywords of leading items and of all others: they differ between drafts. */
  readonly prefixKey: "items" | "prefixItems";
  readonly restKey: "additionalItems" | "items";
}

/** Schemas that hold together, as they apply to members and items. */
export class Members {
  readonly #document: Document;
  readonly #patterns: Patterns;
  readonly #work: Work;
  readonly #parts: readonly Part[];
  /** Schemas with `unevaluatedProperties` or `unevaluatedItems`, with the parts whose members they count as evaluated. */
  readonly #unevaluated: readonly { readonly part: Part; readonly seen: readonly Part[] }[];

  constructor(held: Alternative, document: Document, patterns: Patterns, work: Work) {
    this.#document = document;
    this.#patterns = patterns;
    this.#work = work;
    this.#parts = held.map((each): Part => {
      const { at } = each;
      const schema = at.schema as Schema;
      const old = Array.isArray(schema["items"]);
      const prefixKey = old ? "items" : "prefixItems";
      return {
        held: each,
        at,
        schema,
        properties: record(schema, "properties", at.path),
        patterns: Object.keys(record(schema, "patternProperties", at.path)),
        prefix: schema[prefixKey] === undefined ? 0 : list(schema, prefixKey, at.path).length,
        prefixKey,
        restKey: old ? "additionalItems" : "items",
      };
    });
    this.#unevaluated = this.#parts
      .filter(({ schema }) => schema["unevaluatedProperties"] !== undefined || schema["unevaluatedItems"] !== undefined)
      .map((part) => {
        const brought = new Set(broughtIn(held, part.held));
        work.spend(held.length, part.at.path);
        return { part, seen: this.#parts.filter((each) => brought.has(each.held) && (each === part || !each.held.mute)) };
      });
  }

  /** Names that the schemas mention, in their order, and those of them that they require. */
  names(): { readonly all: readonly string[]; readonly required: ReadonlySet<string> } {
    const required = new Set(this.#parts.flatMap(({ schema, at }) => names(schema, "required", at.path)));
    const all = new Set([...this.#parts.flatMap(({ properties }) => Object.keys(properties)), ...required]);
    return { all: [...all], required };
  }

  /** Patterns of names, each with where it stands. */
  patterns(): ReadonlyMap<string, string> {
    return new Map(this.#parts.flatMap(({ patterns, at }) => patterns.map((pattern): [string, string] => [pattern, at.path])));
  }

  /** The schemas that hold for every name. */
  nameSchemas(): Located[] {
    return this.#parts.flatMap(({ schema, at }) =>
      schema["propertyNames"] === undefined ? [] : [this.#document.sub(at, "propertyNames")],
    );
  }

  /** The schemas that hold for the member of a name. */
  member(name: string): Located[] {
    return this.#member(
      ({ properties }) => Object.hasOwn(properties, name),
      (pattern, path) => this.#patterns.matches(pattern, name, path),
      name,
    );
  }

  /** The schemas that hold for a member that no schema names and exactly these patterns match. */
  otherMember(matching: ReadonlySet<string>): Located[] {
    return this.#member(
      () => false,
      (pattern) => matching.has(pattern),
      "",
    );
  }

  #member(isOwn: (part: Part) => boolean, matches: (pattern: string, path: string) => boolean, name: string): Located[] {
    this.#work.spend(1 + this.#parts.length, this.#parts[0]?.at.path ?? "");
    const evaluated = new Set<Part>();
    const found: Located[] = [];
    for (const part of this.#parts) {
      const { at, schema, patterns } = part;
      const own = isOwn(part);
      if (own) found.push(this.#document.sub(at, "properties", name));
      const matching = patterns.filter((pattern) => matches(pattern, at.path));
      found.push(...matching.map((pattern) => this.#document.sub(at, "patternProperties", pattern)));
      const additional = schema["additionalProperties"] !== undefined;
      if (!own && matching.length === 0 && additional) found.push(this.#document.sub(at, "additionalProperties"));
      if (own || matching.length > 0 || additional) evaluated.add(part);
    }
    return [...found, ...this.#rest("unevaluatedProperties", evaluated)];
  }

  /** How many leading items have schemas of their own. */
  get prefix(): number {
    return Math.max(0, ...this.#parts.map(({ prefix }) => prefix));
  }

  /** The schemas that hold for the item at an index. */
  item(index: number): Located[] {
    this.#work.spend(1 + this.#parts.length, this.#parts[0]?.at.path ?? "");
    const evaluated = new Set<Part>();
    const found: Located[] = [];
    for (const part of this.#parts) {
      const { at, schema, prefix, prefixKey, restKey } = part;
      if (index < prefix) found.push(this.#document.sub(at, prefixKey, index));
      else if (schema[restKey] !== undefined) found.push(this.#document.sub(at, restKey));
      if (index < prefix || schema[restKey] !== undefined) evaluated.add(part);
    }
    return [...found, ...this.#rest("unevaluatedItems", evaluated)];
  }

  #rest(key: "unevaluatedProperties" | "unevaluatedItems", evaluated: ReadonlySet<Part>): Located[] {
    const has = ({ schema }: Part) => schema[key] !== undefined;
    return this.#unevaluated
      .filter(({ part, seen }) => has(part) && !seen.some((each) => evaluated.has(each) || (each !== part && has(each))))
      .map(({ part }) => this.#document.sub(part.at, key));
  }

  /** Whether a schema has a say on members that none names, or on items that none places, beyond allowing or refusing them. */
  describesOthers(...keys: readonly string[]): boolean {
    return this.#parts.some(({ schema }) => keys.some((key) => isSchema(schema[key])));
  }

  /** The largest minimum and the smallest maximum of counts. */
  counts(min: string, max: string): [number, number] {
    let [least, most] = [0, MANY];
    for (const { schema, at } of this.#parts) {
      least = Math.max(least, count(schema, min, 0, at.path));
      most = Math.min(most, count(schema, max, MANY, at.path));
    }
    return [least, most];
  }

  /** The schemas of items that must be contained, each with how often at least. */
  contained(): { readonly at: Located; readonly least: number }[] {
    return this.#parts.flatMap(({ schema, at }) => {
      if (schema["contains"] === undefined) return [];
      if (schema["maxContains"] !== undefined) throw new SchemaError(at.path, "'maxContains' is not supported");
      return [{ at: this.#document.sub(at, "contains"), least: count(schema, "minContains", 1, at.path) }];
    });
  }

  /** Where items must differ; null: nowhere. */
  unique(): string | null {
    return this.#parts.find(({ schema }) => schema["uniqueItems"] === true)?.at.path ?? null;
  }
}
