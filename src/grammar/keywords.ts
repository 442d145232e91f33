/** Keywords of JSON Schema: which ones constrain values, and how two schemas merge. Knows no grammar. */

export type Schema = Readonly<Record<string, unknown>>;

/** Says what in a schema can't be enforced, and where. */
export class SchemaError extends Error {
  constructor(path: string, what: string) {
    super(path === "" ? what : `at ${path}: ${what}`);
    this.name = "SchemaError";
  }
}

/** Keywords that do not constrain values, or only in ways that always hold. */
export const SILENT = new Set(
  "$schema $id $anchor $comment $defs definitions title description default examples deprecated readOnly writeOnly contentEncoding contentMediaType".split(
    " ",
  ),
);
/** The conjunction of two schemas. Throws SchemaError when merging keyword by keyword is not enough. */
export function merged(a: Schema, b: unknown, path: string): Schema {
  if (b === true) return a;
  if (!isSchema(b)) throw new SchemaError(path, b === false ? "no value is valid" : "a schema must be an object");
  const sum: Record<string, unknown> = { ...a };
  for (const [key, value] of Object.entries(b)) {
    const mine = sum[key];
    if (mine === undefined || SILENT.has(key) || JSON.stringify(mine) === JSON.stringify(value)) sum[key] = value;
    else if (key === "properties" && isSchema(mine) && isSchema(value)) {
      const both = Object.keys(value).filter((name) => Object.hasOwn(mine, name));
      sum[key] = { ...mine, ...value, ...Object.fromEntries(both.map((name) => [name, { allOf: [mine[name], value[name]] }])) };
    } else if (key === "required") sum[key] = [...new Set([...list(mine, path), ...list(value, path)])];
    else if (key === "additionalProperties" && (mine === true || value === true)) sum[key] = mine === true ? value : mine;
    else if (key.startsWith("min") || key === "exclusiveMinimum") sum[key] = Math.max(Number(mine), Number(value));
    else if (key.startsWith("max") || key === "exclusiveMaximum") sum[key] = Math.min(Number(mine), Number(value));
    else if (key === "type") {
      const shared = [mine].flat().flatMap((type) => {
        const theirs = [value].flat();
        if (theirs.includes(type)) return [type];
        return (type === "number" && theirs.includes("integer")) || (type === "integer" && theirs.includes("number")) ? ["integer"] : [];
      });
      if (shared.length === 0) throw new SchemaError(path, `no value is of type ${JSON.stringify(mine)} and ${JSON.stringify(value)}`);
      sum[key] = shared;
    } else throw new SchemaError(path, `two values of '${key}' at once are not supported`);
  }
  // A rule for all other members also applies to members that only the other schema mentions.
  for (const [closed, other] of [
    [a, b],
    [b, a],
  ]) {
    const more = closed["additionalProperties"] ?? true;
    if (more !== true && !(isSchema(more) && !asserts(more)) && isSchema(other["properties"])) {
      const mine = isSchema(closed["properties"]) ? closed["properties"] : {};
      if (Object.keys(other["properties"]).some((name) => !Object.hasOwn(mine, name)))
        throw new SchemaError(path, "'additionalProperties' in one of several schemas that add properties is not supported");
    }
    if (closed["items"] !== undefined && closed["prefixItems"] === undefined && other["prefixItems"] !== undefined)
      throw new SchemaError(path, "'items' in one of several schemas and 'prefixItems' in another is not supported");
  }
  return sum;
}

/** Branches are compared pairwise. */
const MAX_ONE_OF = 200;

/** For `oneOf`, the branches must be disjoint: they must differ in type or in a required constant. */
export function refuseOverlap(branches: readonly Schema[], path: string): void {
  if (branches.length > MAX_ONE_OF)
    throw new SchemaError(path, `${branches.length} branches; at most ${MAX_ONE_OF} are supported: use anyOf`);
  const known = new Map(branches.map((branch) => [branch, constants(branch)]));
  const apart = (a: Schema, b: Schema): boolean => {
    const [x, y] = [known.get(a), known.get(b)];
    if (x && y) return !meet(x, y);
    const [types, others] = [a, b].map((s) => [s["type"] ?? []].flat() as string[]);
    const wide = (all: string[]) => (all.includes("integer") ? [...all, "number"] : all);
    if (types.length > 0 && others.length > 0 && !wide(types).some((type) => wide(others).includes(type))) return true;
    const [mine, theirs] = [a["properties"], b["properties"]];
    if (!isSchema(mine) || !isSchema(theirs)) return false;
    return [a["required"] ?? []].flat().some((name) => {
      const key = String(name);
      if (![b["required"] ?? []].flat().includes(name)) return false;
      const [p, q] = [constants(mine[key]), constants(theirs[key])];
      return p !== null && q !== null && !meet(p, q);
    });
  };
  for (const [i, a] of branches.entries())
    for (const b of branches.slice(i + 1))
      if (!apart(a, b))
        throw new SchemaError(path, "branches that may overlap are not supported: use anyOf, or a required constant in each");
}

function meet(a: ReadonlySet<string>, b: ReadonlySet<string>): boolean {
  for (const value of a) if (b.has(value)) return true;
  return false;
}

function constants(schema: unknown): ReadonlySet<string> | null {
  if (!isSchema(schema)) return null;
  const values = schema["const"] !== undefined ? [schema["const"]] : schema["enum"];
  return Array.isArray(values) ? new Set(values.map(canonical)) : null;
}

/** A canonical text of a JSON value, independent of the order of members. */
export function canonical(value: unknown): string {
  return JSON.stringify(value, (_key, each: unknown) =>
    isSchema(each) ? Object.fromEntries(Object.entries(each).sort(([a], [b]) => (a < b ? -1 : 1))) : each,
  );
}

export function isSchema(value: unknown): value is Schema {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether a schema constrains values at all. */
export function asserts(schema: Schema): boolean {
  return Object.keys(schema).some((key) => !SILENT.has(key));
}

/** The value as a list. Throws SchemaError if it is not one. */
export function list(value: unknown, path: string): readonly unknown[] {
  if (!Array.isArray(value)) throw new SchemaError(path, `expected a list, found ${JSON.stringify(value)}`);
  return value;
}
