/** The errors of this room: an answer format that cannot be enforced, and the part of a schema that is the reason. */

export class GrammarError extends RangeError {
  /** The field that asks for it, like `response_format.json_schema.schema`. */
  readonly param: string;

  constructor(param: string, what: string, options?: ErrorOptions) {
    super(what, options);
    this.name = "GrammarError";
    this.param = param;
  }
}

/** Longest JSON pointer in an error. */
const MAX_SHOWN = 200;

/** Says what in a schema can't be enforced, and where: a JSON pointer. */
export class SchemaError extends Error {
  constructor(path: string, what: string) {
    const shown = path.length > MAX_SHOWN ? `${path.slice(0, MAX_SHOWN)}…` : path;
    super(path === "" ? what : `at ${shown}: ${what}`);
    this.name = "SchemaError";
  }
}

/** Compiling takes too much work, whatever the schema means. */
export class WorkError extends SchemaError {}

/** A value for a one-line error. */
export function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "missing";
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}
