/** Strings and numbers of a JSON schema as a grammar: lengths, patterns, formats, bounds. Knows no objects or arrays. */
import { choice, type Expression, MANY } from "./expression.ts";
import { INTEGER, integers, NUMBER, string } from "./json.ts";
import { type Schema, SchemaError } from "./keywords.ts";
import { patternString } from "./pattern.ts";

/** Formats, as patterns whose matches are always valid. */
const DATE = "(19|20)\\d\\d-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8]))";
const TIME = "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,6})?(Z|[+-](0\\d|1[0-4]):[0-5]\\d)";
const LABEL = "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?";
const BYTE = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
const FORMATS: Readonly<Record<string, string>> = {
  date: `^${DATE}$`,
  time: `^${TIME}$`,
  "date-time": `^${DATE}T${TIME}$`,
  duration: "^P(\\d{1,4}D(T\\d{1,3}H)?|T\\d{1,3}[HMS])$",
  email: `^[a-z0-9_]{1,24}(\\.[a-z0-9_]{1,24}){0,2}@(${LABEL}\\.){1,3}[a-z]{2,8}$`,
  hostname: `^(${LABEL}\\.){1,3}[a-z]{2,8}$`,
  ipv4: `^${BYTE}(\\.${BYTE}){3}$`,
  ipv6: "^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$",
  uri: `^https?://(${LABEL}\\.){1,3}[a-z]{2,8}(/[A-Za-z0-9._~-]{0,24}){0,4}$`,
  uuid: "^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
};

export function stringOf(schema: Schema, path: string): Expression {
  const { pattern, format } = schema;
  const [least, most] = counts(schema, "minLength", "maxLength", path);
  const known = typeof format === "string" && Object.hasOwn(FORMATS, format) ? FORMATS[format] : null;
  if (format !== undefined && known === null && pattern === undefined)
    throw new SchemaError(path, `format ${JSON.stringify(format)} is not supported; supported are ${Object.keys(FORMATS).join(", ")}`);
  if (pattern === undefined && known === null) return string(least, most);
  if (least > 0 || most < MANY)
    throw new SchemaError(
      path,
      `'minLength' and 'maxLength' beside '${pattern === undefined ? "format" : "pattern"}' are not supported: put the length into a pattern`,
    );
  try {
    return patternString(pattern === undefined ? (known ?? "") : String(pattern));
  } catch (cause) {
    // Libraries emit patterns with look-around beside formats that they also name.
    if (known !== null) return patternString(known);
    throw new SchemaError(path, cause instanceof Error ? cause.message : String(cause));
  }
}

export function numberOf(schema: Schema, path: string, whole: boolean): Expression {
  const bound = (key: string): number | undefined => {
    const value = schema[key];
    if (value === undefined) return undefined;
    if (typeof value !== "number") throw new SchemaError(path, `'${key}' must be a number, and it is ${JSON.stringify(value)}`);
    return value;
  };
  const step = bound("multipleOf");
  if (step !== undefined && step !== 1) throw new SchemaError(path, "'multipleOf' is not supported, but for 1");
  const [min, above, max, below] = ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"].map(bound);
  if (min === undefined && above === undefined && max === undefined && below === undefined) return whole || step === 1 ? INTEGER : NUMBER;
  // Bounds are enforced by writing a fixed number of decimals and no exponent: one more than the bounds have.
  const places = Math.max(...[min, above, max, below].map((value) => decimalsOf(value ?? 0)));
  if (places > 6) throw new SchemaError(path, "bounds with more than 6 decimals are not supported");
  const inRange = (decimals: number): Expression | null => {
    const scale = 10 ** decimals;
    const widest = 10 ** 15 - 1;
    const lows = [
      min === undefined ? -widest : Math.ceil(round(min * scale)),
      above === undefined ? -widest : Math.floor(round(above * scale)) + 1,
    ];
    const highs = [
      max === undefined ? widest : Math.floor(round(max * scale)),
      below === undefined ? widest : Math.ceil(round(below * scale)) - 1,
    ];
    const [low, high] = [Math.max(-widest, ...lows), Math.min(widest, ...highs)];
    return low > high ? null : integers(low, high, decimals);
  };
  const found = (whole || step === 1 ? [0] : [0, Math.max(places, 1), places + 2]).flatMap((decimals) => inRange(decimals) ?? []);
  if (found.length === 0) throw new SchemaError(path, "no number lies between the bounds");
  return choice(...found);
}

function decimalsOf(value: number): number {
  const [, fraction = "", exponent = "0"] = /^-?\d+(?:\.(\d+))?(?:e([+-]\d+))?$/.exec(String(value)) ?? [];
  return Math.max(0, fraction.length - Number(exponent));
}

/** Removes the binary rounding error of a decimal scaled to a whole number. */
function round(value: number): number {
  const nearest = Math.round(value);
  return Math.abs(value - nearest) < 1e-6 ? nearest : value;
}

/** Minimum and maximum, from two keywords. */
export function counts(schema: Schema, min: string, max: string, path: string): [number, number] {
  const count = (key: string, fallback: number): number => {
    const value = schema[key] ?? fallback;
    if (!Number.isInteger(value) || (value as number) < 0)
      throw new SchemaError(path, `'${key}' must be a whole number from 0, and it is ${JSON.stringify(value)}`);
    return value as number;
  };
  const [least, most] = [count(min, 0), Math.min(count(max, MANY), MANY)];
  if (least >= MANY) throw new SchemaError(path, `'${min}' is ${least}; at most ${MANY - 1} can be held`);
  if (least > most) throw new SchemaError(path, `'${min}' is ${least}, which is more than '${max}', ${most}`);
  return [least, most];
}
