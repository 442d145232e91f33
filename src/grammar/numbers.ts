/**
 * Numbers of a JSON schema as a grammar: bounds and multiples. Computes with the decimals that the schema shows, not with their
 * binary values. Knows no other type.
 */
import { isSchema, type Schema } from "./document.ts";
import { SchemaError, show } from "./error.ts";
import { choice, EMPTY, type Expression, literal, oneOf, sequence } from "./expression.ts";
import { INTEGER, integers, NUMBER } from "./json.ts";
import type { Alternative } from "./logic.ts";
import { bounds } from "./value.ts";

/** Numbers are written with at most 15 digits, which a double represents exactly. */
const WIDEST = 10n ** 15n - 1n;
const MAX_PLACES = 10;
/** Multiples of small numbers are written digit by digit; of larger ones, at most this many are listed. */
const MAX_STEP = 100;
const MAX_LISTED = 1000;
/** Integer formats of OpenAPI; floating-point formats hold for every number. */
const RANGES: Readonly<Record<string, readonly [number, number]>> = {
  int8: [-128, 127],
  uint8: [0, 255],
  int16: [-32768, 32767],
  uint16: [0, 65535],
  int32: [-2147483648, 2147483647],
  uint32: [0, 4294967295],
  int64: [-Infinity, Infinity],
  uint64: [0, Infinity],
  float: [-Infinity, Infinity],
  double: [-Infinity, Infinity],
};

/** Bounds of numbers that satisfy all of these. */
export function range(held: Alternative): { min: number; above: number; max: number; below: number } {
  let [min, above, max, below] = [-Infinity, -Infinity, Infinity, Infinity];
  for (const { at } of held) {
    if (!isSchema(at.schema)) continue;
    const own = bounds(at.schema, at.path, at.resource.draft === 4);
    [min, above] = [Math.max(min, own.min), Math.max(above, own.above)];
    [max, below] = [Math.min(max, own.max), Math.min(below, own.below)];
  }
  return { min, above, max, below };
}

/** Whether no number lies within bounds. */
export function isEmpty({ min, above, max, below }: ReturnType<typeof range>): boolean {
  return min > max || min >= below || above >= max || above >= below;
}

/** The numbers that satisfy all of these; null if none does. Throws SchemaError. @param spend charges work */
export function numberOf(held: Alternative, integer: boolean, spend: (steps: number) => void): Expression | null {
  let { min, above, max, below } = range(held);
  let whole = integer;
  let step = 1n;
  for (const { at } of held) {
    const { multipleOf, format } = at.schema as Schema;
    if (multipleOf !== undefined) {
      if (!Number.isSafeInteger(multipleOf) || (multipleOf as number) <= 0)
        throw new SchemaError(at.path, `'multipleOf' ${show(multipleOf)} is not supported: whole numbers from 1 are`);
      const next = BigInt(multipleOf as number);
      step = (step * next) / divisor(step, next);
      whole = true;
    }
    if (format === undefined) continue;
    const known = typeof format === "string" && Object.hasOwn(RANGES, format) ? RANGES[format] : null;
    // A format of strings says nothing about numbers.
    if (known && !format?.toString().match(/float|double/)) whole = true;
    if (known) [min, max] = [Math.max(min, known[0]), Math.min(max, known[1])];
  }
  if (isEmpty({ min, above, max, below })) return null;
  const finite = [min, above, max, below].filter(Number.isFinite);
  if (finite.length === 0 && step === 1n) return whole ? INTEGER : NUMBER;
  // Bounds are enforced by writing a fixed number of decimals and no exponent: one more than the bounds have.
  const places = Math.max(0, ...finite.map((value) => decimalOf(value).places));
  if (places > MAX_PLACES) throw new SchemaError(held[0].at.path, `bounds with more than ${MAX_PLACES} decimals are not supported`);
  const found = (whole ? [0] : [...new Set([0, Math.max(places, 1), places + 2])]).flatMap((decimals) => {
    const lows = [
      -WIDEST,
      ...(min === -Infinity ? [] : [scaled(min, decimals).up]),
      ...(above === -Infinity ? [] : [scaled(above, decimals).down + 1n]),
    ];
    const highs = [
      WIDEST,
      ...(max === Infinity ? [] : [scaled(max, decimals).down]),
      ...(below === Infinity ? [] : [scaled(below, decimals).up - 1n]),
    ];
    const low = lows.reduce((a, b) => (a > b ? a : b));
    const high = highs.reduce((a, b) => (a < b ? a : b));
    if (low > high) return [];
    return step === 1n ? [integers(Number(low), Number(high), decimals)] : (multiples(low, high, step, spend, held[0].at.path) ?? []);
  });
  if (found.length > 0) return choice(...found);
  if (finite.some((value) => Math.abs(value) > Number(WIDEST)))
    throw new SchemaError(held[0].at.path, "bounds that only numbers of more than 15 digits satisfy are not supported");
  if (whole) return null;
  throw new SchemaError(held[0].at.path, "bounds that are this close to each other are not supported");
}

/** A double as the decimal that is written for it: digits / 10^places. */
function decimalOf(value: number): { readonly digits: bigint; readonly places: number } {
  const [, sign = "", whole = "0", fraction = "", exponent = "0"] = /^(-?)(\d+)(?:\.(\d+))?(?:e([+-]\d+))?$/.exec(String(value)) ?? [];
  const places = fraction.length - Number(exponent);
  const digits = BigInt(sign + whole + fraction);
  return places < 0 ? { digits: digits * 10n ** BigInt(-places), places: 0 } : { digits, places };
}

/** A decimal times 10^decimals, rounded down and up. */
function scaled(value: number, decimals: number): { readonly down: bigint; readonly up: bigint } {
  const { digits, places } = decimalOf(value);
  if (decimals >= places) {
    const exact = digits * 10n ** BigInt(decimals - places);
    return { down: exact, up: exact };
  }
  const unit = 10n ** BigInt(places - decimals);
  const down = floorDivided(digits, unit);
  return { down, up: down * unit === digits ? down : down + 1n };
}

function floorDivided(a: bigint, b: bigint): bigint {
  const quotient = a / b;
  return a % b < 0n ? quotient - 1n : quotient;
}

function divisor(a: bigint, b: bigint): bigint {
  return b === 0n ? a : divisor(b, a % b);
}

/** The multiples of a step from `low` to `high`; null if there are none. */
function multiples(low: bigint, high: bigint, step: bigint, spend: (steps: number) => void, path: string): Expression | null {
  const first = -floorDivided(-low, step);
  const last = floorDivided(high, step);
  if (first > last) return null;
  if (last - first < MAX_LISTED) {
    spend(Number(last - first));
    return oneOf(Array.from({ length: Number(last - first) + 1 }, (_, i) => String((first + BigInt(i)) * step)));
  }
  if (step > MAX_STEP)
    throw new SchemaError(path, `'multipleOf' ${step} is not supported with more than ${MAX_LISTED} multiples within the bounds`);
  const items: Expression[] = [];
  const digits = new Multiples(Number(step), spend);
  if (low < 0n) items.push(sequence(literal("-"), digits.unsigned(high < 0n ? -high : 1n, -low)));
  if (high >= 0n) items.push(digits.unsigned(low > 0n ? low : 0n, high));
  return choice(...items.filter((item) => item.kind !== "choice" || item.items.length > 0));
}

/** Multiples of a small number, digit by digit: what matters of the digits so far is their remainder. */
class Multiples {
  readonly #step: number;
  readonly #spend: (steps: number) => void;
  readonly #free = new Map<string, Expression | null>();

  constructor(step: number, spend: (steps: number) => void) {
    this.#step = step;
    this.#spend = spend;
  }

  unsigned(low: bigint, high: bigint): Expression {
    const items: Expression[] = [];
    for (let from = low; from <= high; ) {
      const length = String(from).length;
      const end = 10n ** BigInt(length) - 1n;
      const to = end < high ? end : high;
      const found = this.#between(String(from), String(to), 0);
      if (found) items.push(found);
      from = to + 1n;
    }
    return choice(...items);
  }

  /** Digits from `low` to `high`, which have the same length, that make `remainder` a multiple; null if there are none. */
  #between(low: string, high: string, remainder: number): Expression | null {
    if (low === "") return remainder === 0 ? EMPTY : null;
    const free = /^0*$/.test(low) && /^9*$/.test(high);
    const key = `${low.length} ${remainder}`;
    if (free && this.#free.has(key)) return this.#free.get(key) ?? null;
    this.#spend(1);
    const [a, b] = [Number(low[0]), Number(high[0])];
    const items: Expression[] = [];
    for (let digit = a; digit <= b; digit++) {
      const from = digit === a ? low.slice(1) : "0".repeat(low.length - 1);
      const to = digit === b ? high.slice(1) : "9".repeat(low.length - 1);
      const rest = this.#between(from, to, (remainder * 10 + digit) % this.#step);
      if (rest) items.push(sequence(literal(String(digit)), rest));
    }
    const found = items.length > 0 ? choice(...items) : null;
    if (free) this.#free.set(key, found);
    return found;
  }
}
