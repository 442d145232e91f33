/** Keywords of JSON Schema: which say something of values, and what two schemas say at once. Knows no grammar. */

export type Schema = Readonly<Record<string, unknown>>;

/** Says what of a schema can't be held, and where in it. */
export class SchemaError extends Error {
  constructor(path: string, what: string) {
    super(path === "" ? what : `at ${path}: ${what}`);
    this.name = "SchemaError";
  }
}

/** Keywords that say nothing about which values are valid, or nothing that is not held anyway. */
export const SILENT = new Set(
  "$schema $id $anchor $comment $defs definitions title description default examples deprecated readOnly writeOnly contentEncoding contentMediaType".split(
    " ",
  ),
);
/** Both schemas at once. Throws SchemaError where that is more than putting their keywords together. */
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
  // Each of them forbids what the other alone mentions.
  for (const [closed, other] of [
    [a, b],
    [b, a],
  ])
    if (closed["additionalProperties"] === false && isSchema(other["properties"])) {
      const mine = isSchema(closed["properties"]) ? closed["properties"] : {};
      if (Object.keys(other["properties"]).some((name) => !Object.hasOwn(mine, name)))
        throw new SchemaError(path, "'additionalProperties' is false in one of several schemas that add properties");
    }
  return sum;
}

/** For `oneOf`, what fits one branch must fit no other: they differ in type, or in a required constant. */
export function refuseOverlap(branches: readonly Schema[], path: string): void {
  const apart = (a: Schema, b: Schema): boolean => {
    const [x, y] = [constants(a), constants(b)];
    if (x && y) return !x.some((value) => y.includes(value));
    const [types, others] = [a, b].map((s) => [s["type"] ?? []].flat() as string[]);
    const wide = (all: string[]) => (all.includes("integer") ? [...all, "number"] : all);
    if (types.length > 0 && others.length > 0 && !wide(types).some((type) => wide(others).includes(type))) return true;
    const [mine, theirs] = [a["properties"], b["properties"]];
    if (!isSchema(mine) || !isSchema(theirs)) return false;
    return [a["required"] ?? []].flat().some((name) => {
      const key = String(name);
      if (![b["required"] ?? []].flat().includes(name)) return false;
      const [p, q] = [constants(mine[key]), constants(theirs[key])];
      return p !== null && q !== null && !p.some((value) => q.includes(value));
    });
  };
  for (const [i, a] of branches.entries())
    for (const b of branches.slice(i + 1))
      if (!apart(a, b))
        throw new SchemaError(path, "branches that may overlap are not supported: use anyOf, or a required constant in each");
}

function constants(schema: unknown): string[] | null {
  if (!isSchema(schema)) return null;
  const values = schema["const"] !== undefined ? [schema["const"]] : schema["enum"];
  return Array.isArray(values) ? values.map((value) => JSON.stringify(value)) : null;
}

export function isSchema(value: unknown): value is Schema {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whether a schema says anything of values. */
export function asserts(schema: Schema): boolean {
  return Object.keys(schema).some((key) => !SILENT.has(key));
}

/** A list, or an error that says that it is none. */
export function list(value: unknown, path: string): readonly unknown[] {
  if (!Array.isArray(value)) throw new SchemaError(path, `a list is wanted, and this is ${JSON.stringify(value)}`);
  return value;
}
