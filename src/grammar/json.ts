/** JSON as a grammar: strings, bounded numbers, any value. Allows limited white space where people write it. Knows no schema. */
import { characters, choice, EMPTY, type Expression, literal, MANY, oneOf, optional, type Ranges, repeat, sequence } from "./expression.ts";

const digits = (min: number, max: number): Expression => repeat({ kind: "byte", ranges: [[0x30, 0x39]] }, min, max);
const firstDigit: Expression = { kind: "byte", ranges: [[0x31, 0x39]] };
const hex: Expression = {
  kind: "byte",
  ranges: [
    [0x30, 0x39],
    [0x41, 0x46],
    [0x61, 0x66],
  ],
};

/** Between values and punctuation: nothing, a space, or a line break with indentation. */
export const SPACE = optional(choice(literal(" "), sequence(literal("\n"), repeat(literal(" "), 0, 24))));
export const COMMA = sequence(literal(","), SPACE);
export const COLON = sequence(literal(":"), optional(literal(" ")));

/** Code points that need no escape in a string. */
const PLAIN: Ranges = [
  [0x20, 0x21],
  [0x23, 0x5b],
  [0x5d, 0x10ffff],
];
/** A code point as \u escape, except surrogates: half a pair is not a character. */
const numbered = sequence(
  literal("u"),
  choice(
    sequence(
      {
        kind: "byte",
        ranges: [
          [0x30, 0x39],
          [0x41, 0x43],
          [0x45, 0x46],
          [0x61, 0x63],
          [0x65, 0x66],
        ],
      },
      hex,
      hex,
      hex,
    ),
    sequence(oneOf(["d", "D"]), { kind: "byte", ranges: [[0x30, 0x37]] }, hex, hex),
  ),
);
/** One character of a string, plain or escaped. */
export const CHARACTER = choice(characters(PLAIN), sequence(literal("\\"), choice(oneOf([...'"\\/bfnrt']), numbered)));
/** One character that needs no escape. */
export const PLAIN_CHARACTER = characters(PLAIN);

/** A string of `min` to `max` characters. */
export function string(min = 0, max = MANY): Expression {
  return sequence(literal('"'), { kind: "text", character: CHARACTER, min, max: Math.min(max, MANY) });
}

/** One character of these, as written in a JSON string. */
export function stringCharacters(ranges: Ranges): Expression {
  const plain = ranges.flatMap(([from, to]) =>
    PLAIN.map(([low, high]): [number, number] => [Math.max(from, low), Math.min(to, high)]).filter(([low, high]) => low <= high),
  );
  const escaped = Array.from({ length: 0x20 }, (_, code) => code)
    .concat(0x22, 0x5c)
    .filter((code) => ranges.some(([from, to]) => code >= from && code <= to))
    .map((code) => JSON.stringify(String.fromCharCode(code)).slice(1, -1));
  const items = [...(plain.length > 0 ? [characters(plain)] : []), ...(escaped.length > 0 ? [oneOf(escaped)] : [])];
  return choice(...items);
}

/** Whole numbers of at most 15 digits, which a double represents exactly. */
export const INTEGER = sequence(optional(literal("-")), choice(literal("0"), sequence(firstDigit, digits(0, 14))));
/** Numbers that do not overflow a double. */
export const NUMBER = sequence(
  INTEGER,
  optional(sequence(literal("."), digits(1, 15))),
  optional(sequence(oneOf(["e", "E"]), optional(oneOf(["-", "+"])), digits(1, 2))),
);
export const BOOLEAN = oneOf(["true", "false"]);
export const NULL = literal("null");

/** Whole numbers from `low` to `high`, written with their last `decimals` digits after a decimal point. */
export function integers(low: number, high: number, decimals = 0): Expression {
  const items: Expression[] = [];
  if (low < 0) items.push(sequence(literal("-"), unsigned(Math.max(1, -high), -low, decimals)));
  if (high >= 0) items.push(unsigned(Math.max(0, low), high, decimals));
  return choice(...items);
}

function unsigned(low: number, high: number, decimals: number): Expression {
  const items: Expression[] = [];
  for (let from = low; from <= high; ) {
    const length = Math.max(String(from).length, decimals + 1);
    const to = Math.min(high, 10 ** length - 1);
    items.push(sameLength(padded(from, length), padded(to, length), length - decimals));
    from = to + 1;
  }
  return choice(...items);
}

const padded = (n: number, length: number) => String(n).padStart(length, "0");

/** Digit strings from `low` to `high`, which have the same length, with a point after `point` digits. */
function sameLength(low: string, high: string, point: number): Expression {
  if (low === "") return EMPTY;
  const after = (from: string, to: string) => {
    const rest = sameLength(from, to, point - 1);
    return point === 1 && from !== "" ? sequence(literal("."), rest) : rest;
  };
  const [a, b] = [Number(low[0]), Number(high[0])];
  const [lows, highs] = [low.slice(1), high.slice(1)];
  const [least, most] = ["0".repeat(lows.length), "9".repeat(lows.length)];
  const digit = (from: number, to: number): Expression => ({ kind: "byte", ranges: [[0x30 + from, 0x30 + to]] });
  if (a === b) return sequence(digit(a, a), after(lows, highs));
  const [first, last] = [lows === least ? a : a + 1, highs === most ? b : b - 1];
  return choice(
    ...(lows === least ? [] : [sequence(digit(a, a), after(lows, most))]),
    ...(first <= last ? [sequence(digit(first, last), after(least, most))] : []),
    ...(highs === most ? [] : [sequence(digit(b, b), after(least, highs))]),
  );
}

const value: Expression & { kind: "rule" } = { kind: "rule", to: null };
export const OBJECT = object(string(), value);
const ARRAY = sequence(literal("["), SPACE, optional(sequence(value, repeat(sequence(COMMA, value), 0), SPACE)), literal("]"));
value.to = choice(string(), NUMBER, OBJECT, ARRAY, BOOLEAN, NULL);
/** Any JSON value. */
export const VALUE: Expression = value;

/** An object of any members, `min` (0 or 1) to `max` of them. */
export function object(key: Expression, member: Expression, min = 0, max = MANY): Expression {
  const one = sequence(key, COLON, member);
  const all = sequence(one, repeat(sequence(COMMA, one), 0, max === MANY ? MANY : Math.max(max - 1, 0)), SPACE);
  return sequence(literal("{"), SPACE, ...(max === 0 ? [] : [min > 0 ? all : optional(all)]), literal("}"));
}
