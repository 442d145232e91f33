/**
 * A JSON schema as a document: which draft it speaks, where its parts are, and what its references mean. Parts are compared by
 * identity, so that schemas may be recursive. Knows no grammar and no value.
 */
import { SchemaError, show } from "./error.ts";
import type { Steps, Work } from "./work.ts";

export type Schema = Readonly<Record<string, unknown>>;
export type Draft = 4 | 6 | 7 | 2019 | 2020;

/** A part of a document that is a schema of its own: the root, and whatever has an `$id`. */
interface Resource {
  readonly base: string;
  readonly root: unknown;
  readonly path: string;
  readonly draft: Draft;
  readonly anchors: Map<string, unknown>;
  readonly dynamic: Set<string>;
}

/** A schema within a document. The same schema is the same object. */
export interface Located {
  readonly id: number;
  readonly schema: Schema | boolean;
  /** JSON pointer, for errors. */
  readonly path: string;
  readonly resource: Resource;
}

/** Deepest nesting of a schema, values in it included. */
const MAX_DEPTH = 200;
const ROOT = "schema:/";
const DRAFTS: Readonly<Record<string, Draft>> = {
  "json-schema.org/draft-04/schema": 4,
  "json-schema.org/draft-06/schema": 6,
  "json-schema.org/draft-07/schema": 7,
  "json-schema.org/draft/2019-09/schema": 2019,
  "json-schema.org/draft/2020-12/schema": 2020,
  "json-schema.org/schema": 2020,
};
const DRAFT_NAMES: Readonly<Record<Draft, string>> = { 4: "draft-04", 6: "draft-06", 7: "draft-07", 2019: "2019-09", 2020: "2020-12" };

/** Where schemas stand within a schema. */
const words = (text: string): ReadonlySet<string> => new Set(text.split(" "));
const SCHEMAS = words(
  "additionalProperties unevaluatedProperties unevaluatedItems propertyNames items additionalItems contains not if then else",
);
const LISTS = words("allOf anyOf oneOf prefixItems items");
const MAPS = words("properties patternProperties $defs definitions dependentSchemas dependencies");

export class Document {
  readonly #work: Work;
  readonly #resources = new Map<string, Resource>();
  readonly #located = new Map<unknown, Located>();
  readonly #derived = new Map<Located, Map<string, Located>>();
  #ids = 2;

  private constructor(work: Work) {
    this.#work = work;
  }

  /** Reads a schema, which must be plain JSON. Throws SchemaError. */
  static *read(root: unknown, work: Work): Steps<Document> {
    const document = new Document(work);
    yield* document.#scan(root);
    return document;
  }

  get root(): Located {
    const resource = this.#resources.get(ROOT) as Resource;
    return this.at(resource.root, "", resource);
  }

  /** A schema by its value. `like` has the resource, unless the value is known from the document. */
  at(value: unknown, path: string, resource: Resource): Located {
    if (typeof value === "boolean") return { id: value ? 1 : 0, schema: value, path, resource };
    const known = this.#located.get(value);
    if (known) return known;
    if (!isSchema(value)) throw new SchemaError(path, `a schema must be an object, not ${show(value)}`);
    const located: Located = { id: this.#ids++, schema: value, path, resource };
    this.#located.set(value, located);
    return located;
  }

  /** The schema under a keyword, or one within a keyword's list or object. */
  sub(at: Located, keyword: string, within?: string | number): Located {
    const value = (at.schema as Schema)[keyword];
    const path = `${at.path}/${keyword}${within === undefined ? "" : `/${escaped(String(within))}`}`;
    return this.at(within === undefined ? value : (value as Record<string | number, unknown>)[within], path, at.resource);
  }

  /**
   * A schema that follows from another, made on first use. `label` tells what follows from one schema apart.
   * @param draft in whose words it is written
   */
  derived(from: Located, label: string, make: () => Schema, draft: Draft = 2020): Located {
    const all = this.#derived.get(from) ?? new Map<string, Located>();
    this.#derived.set(from, all);
    const known = all.get(label);
    if (known) return known;
    const located = this.at(make(), from.path, { ...from.resource, draft });
    all.set(label, located);
    return located;
  }

  /** What a reference in `at` means. `$dynamicRef` and `$recursiveRef` are followed where the schema leaves only one way to read them. */
  resolve(at: Located, keyword: "$ref" | "$dynamicRef" | "$recursiveRef"): Located {
    const reference = (at.schema as Schema)[keyword];
    const refuse = (why: string) => new SchemaError(at.path, `'${keyword}' ${show(reference)} ${why}`);
    if (typeof reference !== "string") throw refuse("is not a text");
    let base: string;
    let fragment: string;
    try {
      const url = new URL(reference, at.resource.base).href;
      const hash = url.indexOf("#");
      base = hash < 0 ? url : url.slice(0, hash);
      fragment = decodeURIComponent(hash < 0 ? "" : url.slice(hash + 1));
    } catch {
      throw refuse("is not a valid reference");
    }
    const resource = this.#resources.get(base);
    if (!resource) throw refuse("is not supported: only references within the schema, like #/$defs/name");
    const found = fragment === "" || fragment.startsWith("/") ? this.#pointed(resource, fragment) : resource.anchors.get(fragment);
    if (found === undefined) throw refuse("leads nowhere");
    const dynamic = ({ root, dynamic: names }: Resource) =>
      keyword === "$dynamicRef" ? names.has(fragment) : isSchema(root) && root["$recursiveAnchor"] === true;
    if (keyword !== "$ref" && dynamic(resource)) {
      const meant = new Set([...this.#resources.values()].filter(dynamic).map(({ root }) => root));
      if (meant.size > 1) throw refuse("may mean several anchors, which is not supported");
    }
    return this.at(found, fragment.startsWith("/") ? resource.path + fragment : resource.path, resource);
  }

  #pointed(resource: Resource, pointer: string): unknown {
    let at: unknown = resource.root;
    for (const part of pointer.split("/").slice(1)) {
      this.#work.spend(1, resource.path);
      const key = part.replaceAll("~1", "/").replaceAll("~0", "~");
      at = typeof at === "object" && at !== null && Object.hasOwn(at, key) ? (at as Schema)[key] : undefined;
    }
    return at;
  }

  /** Finds resources and anchors. Only what stands where a schema may stand counts: `$id` within a constant is a value. */
  *#scan(root: unknown): Steps<void> {
    const pending: { value: unknown; path: string; within: Resource | null; depth: number }[] = [];
    pending.push({ value: root, path: "", within: null, depth: 0 });
    if (!isSchema(root)) this.#resource(ROOT, root, "", 2020);
    for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
      const { value, path, within, depth } = next;
      if (!isSchema(value)) continue;
      yield* this.#work.pause();
      const entries = Object.entries(value);
      this.#work.spend(1 + entries.length, path);
      if (depth > MAX_DEPTH) throw new SchemaError(path, `the schema is nested more than ${MAX_DEPTH} deep`);
      const resource = this.#enter(value, path, within);
      this.at(value, path, resource);
      const push = (sub: unknown, ...keys: string[]) =>
        pending.push({ value: sub, path: `${path}/${keys.map(escaped).join("/")}`, within: resource, depth: depth + 1 });
      for (const [key, inner] of entries) {
        if (LISTS.has(key) && Array.isArray(inner)) for (const [i, each] of inner.entries()) push(each, key, String(i));
        else if (SCHEMAS.has(key)) push(inner, key);
        else if (MAPS.has(key) && isSchema(inner)) for (const [name, each] of Object.entries(inner)) push(each, key, name);
      }
    }
  }

  /** The resource that a schema belongs to: its own if it has an identifier. */
  #enter(schema: Schema, path: string, within: Resource | null): Resource {
    const draft = schema["$schema"] === undefined ? (within?.draft ?? 2020) : draftOf(schema["$schema"], path);
    const referring = draft <= 7 && schema["$ref"] !== undefined; // whatever stands beside a reference is ignored
    const key = draft === 4 ? "id" : "$id";
    const id = referring ? undefined : schema[key];
    let resource = within ?? this.#resource(ROOT, schema, path, draft);
    if (id !== undefined) {
      if (typeof id !== "string") throw new SchemaError(path, `'${key}' is ${show(id)}; it must be a text`);
      if (draft <= 7 && id.startsWith("#")) resource.anchors.set(id.slice(1), schema);
      else {
        let base: string;
        try {
          base = new URL(id, resource.base).href.replace(/#$/, "");
        } catch {
          throw new SchemaError(path, `'${key}' ${show(id)} is not a valid reference`);
        }
        if (within && this.#resources.has(base)) throw new SchemaError(path, `'${key}' ${show(id)} comes twice`);
        resource = this.#resource(base, schema, path, draft);
      }
    }
    for (const name of ["$anchor", "$dynamicAnchor"]) {
      const anchor = schema[name];
      if (typeof anchor !== "string" || referring) continue;
      resource.anchors.set(anchor, schema);
      if (name === "$dynamicAnchor") resource.dynamic.add(anchor);
    }
    return resource;
  }

  #resource(base: string, root: unknown, path: string, draft: Draft): Resource {
    const resource = { base, root, path, draft, anchors: new Map<string, unknown>(), dynamic: new Set<string>() };
    this.#resources.set(base, resource);
    return resource;
  }
}

function draftOf(name: unknown, path: string): Draft {
  const known = typeof name === "string" ? name.replace(/^https?:\/\//, "").replace(/#$/, "") : "";
  if (!Object.hasOwn(DRAFTS, known))
    throw new SchemaError(
      path,
      `'$schema' ${show(name)} is not supported; supported are the drafts ${Object.values(DRAFT_NAMES).join(", ")}`,
    );
  return DRAFTS[known];
}

export function draftName({ resource }: Located): string {
  return DRAFT_NAMES[resource.draft];
}

export function isSchema(value: unknown): value is Schema {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A key as part of a JSON pointer. */
function escaped(key: string): string {
  return key.replaceAll("~", "~0").replaceAll("/", "~1");
}
