/**
 * Which schemas hold for a value together: follows references and `allOf`, and spells out choices, conditions and negations as
 * alternatives. Each alternative is a list of schemas without logic of their own. Knows no grammar.
 */
import { type Document, isSchema, type Located, type Schema } from "./document.ts";
import { SchemaError } from "./error.ts";
import { checkKeywords, list, names, record, sharedTypes, type Type, typesNamed } from "./keywords.ts";
import { negations } from "./negation.ts";
import type { Work } from "./work.ts";

/** A schema that holds for a value, and the one that brought it in: what a schema counts as evaluated is what it brought in. */
export interface Held {
  readonly at: Located;
  readonly from: Held | null;
  /** How many brought it in, one by another. */
  readonly depth: number;
  /** It follows from a negation: members and items that it mentions do not count as evaluated. */
  readonly mute: boolean;
}

export type Alternative = readonly Held[];
/** Schemas of which at least one group must hold. */
type Choice = () => readonly (readonly Held[])[];

/** Schemas that hold for one value in a chain of references and `allOf`. */
const MAX_CHAIN = 200;
/** Branches of `oneOf` are compared pairwise, unless a constant or a type tells all apart. */
const MAX_ONE_OF = 200;

/** Whether a list of schemas allows no value. */
export type Excludes = (roots: readonly Located[]) => boolean;

export class Logic {
  readonly #document: Document;
  readonly #work: Work;
  readonly #excludes: Excludes;
  /** Of the branches of a `oneOf`, those that a value might satisfy together with each. */
  readonly #overlaps = new Map<Located, readonly (readonly number[])[]>();

  /** @param excludes proves that schemas allow no value together; false where it can't */
  constructor(document: Document, work: Work, excludes: Excludes) {
    this.#document = document;
    this.#work = work;
    this.#excludes = excludes;
  }

  /**
   * The alternatives in which a value can satisfy all these schemas.
   * @param exact false: what is hard to follow is left out, so that they allow more than the schemas do, never less
   */
  alternatives(roots: readonly Located[], exact = true): Alternative[] {
    const found: Alternative[] = [];
    const visit = (pending: Held[], held: Held[], choices: Choice[]): void => {
      this.#work.spend(1 + ((pending.length + held.length + choices.length) >> 3), roots[0]?.path ?? "");
      for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
        if (next.at.schema === false) return;
        if (next.at.schema === true) continue;
        if (exact || !mayBeIgnored(next.at)) held.push(next);
        this.#open(next, pending, choices, exact);
      }
      if (typesOf(held)?.length === 0) return;
      const choice = choices.pop();
      if (!choice) found.push(held);
      else for (const group of choice()) visit([...group], [...held], [...choices]);
    };
    const start = roots.map((at): Held => ({ at, from: null, depth: 0, mute: false }));
    visit(start.reverse(), [], []);
    return found;
  }

  #open(held: Held, pending: Held[], choices: Choice[], exact: boolean): void {
    const { at } = held;
    const schema = at.schema as Schema;
    this.#work.spend(1, at.path);
    if (exact) checkKeywords(at);
    if (held.depth > MAX_CHAIN)
      throw new SchemaError(at.path, "'$ref' leads back to itself, or through too many schemas, before it says anything");
    const holds = (sub: Located, mute = held.mute): Held => ({ at: sub, from: held, depth: held.depth + 1, mute });
    for (const key of ["$ref", "$dynamicRef", "$recursiveRef"] as const)
      if (schema[key] !== undefined) {
        const target = this.#document.resolve(at, key);
        for (let above: Held | null = held; above !== null; above = above.from)
          if (above.at === target) throw new SchemaError(at.path, `'${key}' refers to itself before it says anything`);
        pending.push(holds(target));
        if (!exact && mayBeIgnored(at)) return;
      }
    const subs = (key: string) => {
      const all = list(schema, key, at.path);
      if (all.length === 0) throw new SchemaError(at.path, `'${key}' must not be empty`);
      return all.map((_, i) => this.#document.sub(at, key, i));
    };
    if (schema["allOf"] !== undefined)
      pending.push(
        ...subs("allOf")
          .map((sub) => holds(sub))
          .reverse(),
      );
    if (schema["anyOf"] !== undefined) choices.push(() => subs("anyOf").map((sub) => [holds(sub)]));
    if (schema["oneOf"] !== undefined)
      choices.push(() => {
        const branches = subs("oneOf");
        const overlaps = exact ? this.#overlapping(at, branches) : [];
        return branches.map((branch, i) => [
          holds(branch),
          ...(overlaps[i] ?? []).map((j) => holds(this.#not(branches[j], "oneOf"), true)),
        ]);
      });
    if (!exact) return;
    if (schema["not"] !== undefined) pending.push(holds(this.#not(this.#document.sub(at, "not"), "not"), true));
    if (schema["if"] !== undefined && (schema["then"] !== undefined || schema["else"] !== undefined)) {
      const condition = this.#document.sub(at, "if");
      const branch = (key: string) => (schema[key] === undefined ? [] : [holds(this.#document.sub(at, key))]);
      choices.push(() => [
        [holds(condition), ...branch("then")],
        [holds(this.#not(condition, "if"), true), ...branch("else")],
      ]);
    }
    this.#dependents(held, choices, holds);
  }

  /** `dependentRequired`, `dependentSchemas` and, as drafts before 2019-09 call both, `dependencies`. */
  #dependents({ at }: Held, choices: Choice[], holds: (sub: Located, mute?: boolean) => Held): void {
    for (const key of ["dependentRequired", "dependentSchemas", "dependencies"])
      for (const [name, needs] of Object.entries(record(at.schema as Schema, key, at.path))) {
        const without = this.#document.derived(at, `without ${name}`, () => ({ properties: named(name, false) }));
        const needed = Array.isArray(needs) ? names({ [key]: needs }, key, at.path) : [];
        const present = this.#document.derived(at, `with ${name} by ${key}`, () => ({ required: [name, ...needed] }));
        if (key === "dependentRequired" && !Array.isArray(needs)) throw new SchemaError(at.path, `'${key}' must hold lists of names`);
        const also = Array.isArray(needs) ? [] : [holds(this.#document.sub(at, key, name))];
        choices.push(() => [[holds(present, true), ...also], [holds(without, true)]]);
      }
  }

  /** For each branch, the others that a value might satisfy as well. */
  #overlapping(at: Located, branches: readonly Located[]): readonly (readonly number[])[] {
    const known = this.#overlaps.get(at);
    if (known) return known;
    const overlaps = branches.map((): number[] => []);
    if (branches.length > 1 && !this.#toldApart(branches)) {
      const { type } = at.schema as Schema;
      const beside = type === undefined ? [] : [this.#document.derived(at, "type", () => ({ type }))];
      if (branches.length > MAX_ONE_OF)
        throw new SchemaError(
          at.path,
          `'oneOf' has ${branches.length} branches that no constant and no type tell apart; at most ${MAX_ONE_OF} are supported: use anyOf`,
        );
      for (const [i, a] of branches.entries())
        for (let j = i + 1; j < branches.length; j++)
          if (!this.#excludes([...beside, a, branches[j]])) {
            overlaps[i].push(j);
            overlaps[j].push(i);
          }
    }
    this.#overlaps.set(at, overlaps);
    return overlaps;
  }

  /** Whether each branch has its own constants: of the value itself, or of a member that all require. */
  #toldApart(branches: readonly Located[]): boolean {
    const flat = branches.map((branch) => this.#flat(branch));
    const [first] = flat;
    const keys = [null, ...names(first ?? {}, "required", branches[0].path)];
    return keys.some((key) => {
      const seen = new Set<string>();
      return flat.every((branch, i) => {
        this.#work.spend(1, branches[i].path);
        const requires = branch["type"] === "object" && Array.isArray(branch["required"]) && branch["required"].includes(key);
        if (key !== null && !requires) return false;
        const properties = branch["properties"];
        const value = key === null ? branch : isSchema(properties) && Object.hasOwn(properties, key) ? properties[key] : undefined;
        if (!isSchema(value) || value["$ref"] !== undefined) return false;
        const all = value["const"] === undefined ? value["enum"] : [value["const"]];
        if (!Array.isArray(all)) return false;
        this.#work.spend(all.length, branches[i].path);
        const known = all.map((each) => (typeof each === "object" && each !== null ? "" : JSON.stringify(each)));
        if (known.some((each) => each === "" || seen.has(each))) return false;
        for (const each of known) seen.add(each);
        return true;
      });
    });
  }

  /** A schema, or what a bare reference means. */
  #flat(at: Located): Schema {
    let target = at;
    for (let hops = 0; hops < MAX_CHAIN && isSchema(target.schema) && typeof target.schema["$ref"] === "string"; hops++)
      target = this.#document.resolve(target, "$ref");
    return isSchema(target.schema) ? target.schema : {};
  }

  /** A schema that holds only where another does not. Throws SchemaError, naming `keyword`, where that can't be said. */
  #not(of: Located, keyword: string): Located {
    const { schema } = of;
    return this.#document.derived(of, "not", () => ({ anyOf: negations(of, schema, this.#document, keyword) }));
  }
}

/** An object with one member, which may have any name. */
export function named(name: string, value: unknown): Schema {
  return Object.fromEntries([[name, value]]);
}

/** The types that all of these allow; null: any. */
export function typesOf(held: Alternative): readonly Type[] | null {
  let types: readonly Type[] | null = null;
  for (const { at } of held) types = sharedTypes(types, typesNamed(at.schema as Schema, at.path));
  return types;
}

/**
 * In drafts up to 7, what stands beside `$ref` is ignored, and some validators hold it nevertheless. It is held where that makes
 * a grammar write less, and ignored in proofs.
 */
function mayBeIgnored({ schema, resource }: Located): boolean {
  return resource.draft <= 7 && isSchema(schema) && schema["$ref"] !== undefined;
}
