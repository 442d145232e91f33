/**
 * Regular expressions: reads them, and writes those without look-ahead as grammars. Look-behind, back references and word
 * boundaries are rejected: no text can be written to them from left to right. Knows no schema.
 */
import { characters, choice, type Expression, MANY, type Ranges, repeat, sequence } from "./expression.ts";

/** All code points but surrogates. */
export const ALL: Ranges = [
  [0, 0xd7ff],
  [0xe000, 0x10ffff],
];
const DIGIT: Ranges = [[0x30, 0x39]];
const WORD: Ranges = [...DIGIT, [0x41, 0x5a], [0x5f, 0x5f], [0x61, 0x7a]];
const WHITE: Ranges = [
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
];
const LINE_END: Ranges = [
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
];
const CONTROLS: Readonly<Record<string, number>> = { t: 9, n: 10, v: 11, f: 12, r: 13, "0": 0 };

const MAX_PATTERN = 8192;
/** Groups within each other. */
const MAX_GROUPS = 50;

/** A regular expression over code points. What an anchor leaves open is spelled out as any characters. */
export type Pattern =
  | { readonly kind: "set"; readonly ranges: Ranges }
  | { readonly kind: "sequence"; readonly items: readonly Pattern[] }
  | { readonly kind: "choice"; readonly items: readonly Pattern[] }
  | { readonly kind: "repeat"; readonly item: Pattern; readonly min: number; readonly max: number }
  /** The rest of the text, from here to its end, matches `rest`, or does not. */
  | { readonly kind: "ahead"; readonly rest: Pattern; readonly negated: boolean };

const NOTHING: Pattern = { kind: "sequence", items: [] };
const ANYTHING: Pattern = { kind: "repeat", item: { kind: "set", ranges: ALL }, min: 0, max: MANY };

/**
 * Reads a pattern. With `whole` it must match all of a text, as if it were anchored at both ends; else somewhere in it, as JSON
 * Schema's `pattern` means it. Throws Error that says what in it is not supported.
 */
export function readPattern(source: string, whole: boolean): Pattern {
  if (source.length > MAX_PATTERN) throw new Error(`the pattern has ${source.length} characters; ${MAX_PATTERN} are supported`);
  try {
    new RegExp(source, "u");
  } catch (cause) {
    throw new Error(`the pattern ${shown(source)} is not a regular expression`, { cause });
  }
  return new PatternReader(source, whole).read();
}

const shown = (source: string) => JSON.stringify(source.length > 200 ? `${source.slice(0, 200)}…` : source);

/** The texts that match a pattern as a whole. Throws Error that says what in it is not supported. */
export function patternText(source: string): Expression {
  const pattern = readPattern(source, true);
  if (hasAhead(pattern)) throw new Error(`the pattern ${shown(source)} has look-around, which is not supported here`);
  return written(pattern, characters);
}

/** The grammar of a pattern without look-ahead. @param character one character of these, as it is written */
export function written(pattern: Pattern, character: (ranges: Ranges) => Expression): Expression {
  switch (pattern.kind) {
    case "set":
      return character(pattern.ranges);
    case "sequence":
      return sequence(...pattern.items.map((item) => written(item, character)));
    case "choice":
      return choice(...pattern.items.map((item) => written(item, character)));
    case "repeat":
      return repeat(written(pattern.item, character), pattern.min, pattern.max);
    case "ahead":
      throw new Error("internal: look-ahead has no grammar of its own");
    default:
      return pattern satisfies never;
  }
}

export function hasAhead(pattern: Pattern): boolean {
  switch (pattern.kind) {
    case "set":
      return false;
    case "sequence":
    case "choice":
      return pattern.items.some(hasAhead);
    case "repeat":
      return hasAhead(pattern.item);
    case "ahead":
      return true;
    default:
      return pattern satisfies never;
  }
}

class PatternReader {
  readonly #source: string;
  readonly #whole: boolean;
  readonly #characters: readonly string[];
  #at = 0;
  #groups = 0;

  constructor(source: string, whole: boolean) {
    this.#source = source;
    this.#whole = whole;
    this.#characters = [...source];
  }

  read(): Pattern {
    const open = this.#whole ? NOTHING : ANYTHING;
    const pattern = this.#choice(open, open);
    if (this.#at < this.#characters.length) throw this.#unsupported(this.#characters[this.#at]);
    return pattern;
  }

  #unsupported(what: string): Error {
    return new Error(`the pattern ${shown(this.#source)} has ${what}, which is not supported here`);
  }

  get #next(): string | undefined {
    return this.#characters[this.#at];
  }

  /** Some characters from here. */
  #ahead(length: number): string {
    return this.#characters.slice(this.#at, this.#at + length).join("");
  }

  #take(text: string): boolean {
    if (this.#ahead(text.length) !== text) return false;
    this.#at += text.length;
    return true;
  }

  /** @param before what may stand before the match unless it is anchored there; null: no anchor may stand there. Likewise `after` */
  #choice(before: Pattern | null, after: Pattern | null): Pattern {
    const items: Pattern[] = [];
    do items.push(this.#sequence(before, after));
    while (this.#take("|"));
    return items.length === 1 ? items[0] : { kind: "choice", items };
  }

  #sequence(before: Pattern | null, after: Pattern | null): Pattern {
    const items: Pattern[] = [];
    const anchored = before !== null && (this.#take("^") || before === NOTHING);
    if (before !== null && !anchored) items.push(before);
    let closed = after === null;
    for (let next = this.#next; next !== undefined && next !== "|" && next !== ")"; next = this.#next) {
      if (next === "$" && after !== null && [undefined, "|", ")"].includes(this.#characters[this.#at + 1])) {
        this.#at++;
        closed = true;
      } else items.push(this.#quantified(this.#atom(anchored && items.every(({ kind }) => kind === "ahead"))));
    }
    if (!closed && after !== null) items.push(after);
    return items.length === 1 ? items[0] : { kind: "sequence", items };
  }

  #quantified(item: Pattern): Pattern {
    let [min, max] = [1, 1];
    if (this.#take("*")) [min, max] = [0, MANY];
    else if (this.#take("+")) [min, max] = [1, MANY];
    else if (this.#take("?")) [min, max] = [0, 1];
    else {
      const counts = this.#next === "{" ? /^\{(\d+)(,(\d*))?\}/.exec(this.#ahead(24)) : null;
      if (!counts && this.#next === "{") throw this.#unsupported("a brace that is not a repetition");
      if (!counts) return item;
      this.#at += counts[0].length;
      min = Number(counts[1]);
      max = counts[2] === undefined ? min : counts[3] === "" ? MANY : Number(counts[3]);
    }
    this.#take("?"); // lazy quantifiers match the same texts
    if (min >= MANY) throw this.#unsupported(`${min} repetitions`);
    if (hasAhead(item)) {
      if (max > 1) throw this.#unsupported("a repetition of look-around");
      return min === 1 ? item : { kind: "choice", items: max === 1 ? [item, NOTHING] : [NOTHING] };
    }
    if (!mayBeEmpty(item)) return { kind: "repeat", item, min, max: Math.min(max, MANY) };
    if (max > 64 && max < MANY) throw this.#unsupported("a counted repetition of a part that may be empty");
    return { kind: "repeat", item, min: 0, max: Math.min(max, MANY) };
  }

  /** @param first at the beginning of the text */
  #atom(first: boolean): Pattern {
    const character = this.#characters[this.#at++];
    switch (character) {
      case "(":
        return this.#group(first);
      case "[":
        return { kind: "set", ranges: this.#class() };
      case ".":
        return { kind: "set", ranges: without(LINE_END) };
      case "\\":
        return { kind: "set", ranges: this.#escape() };
      case "^":
      case "$":
        throw this.#unsupported("an anchor in the middle");
      case "{":
      case "*":
      case "+":
      case "?":
        throw this.#unsupported(`${character} without anything to repeat`);
      default:
        return { kind: "set", ranges: [this.#point(character)] };
    }
  }

  #group(first: boolean): Pattern {
    if (++this.#groups > MAX_GROUPS) throw this.#unsupported(`more than ${MAX_GROUPS} groups within each other`);
    const sign = this.#take("?=") ? "=" : this.#take("?!") ? "!" : null;
    if (sign === null && this.#take("?") && !this.#take(":")) {
      const name = /^<\w+>/.exec(this.#ahead(64))?.[0];
      if (name === undefined) throw this.#unsupported("look-around");
      this.#at += name.length;
    }
    const inner = sign === null ? this.#choice(null, null) : this.#choice(first ? NOTHING : null, ANYTHING);
    this.#take(")");
    this.#groups--;
    return sign === null ? inner : { kind: "ahead", rest: inner, negated: sign === "!" };
  }

  #class(): Ranges {
    const negated = this.#take("^");
    const ranges: (readonly [number, number])[] = [];
    while (!this.#take("]")) {
      const from = this.#classAtom();
      const single = from.length === 1 && from[0][0] === from[0][1];
      if (single && this.#next === "-" && this.#characters[this.#at + 1] !== "]") {
        this.#at++;
        ranges.push([from[0][0], this.#classAtom()[0][1]]);
      } else ranges.push(...from);
    }
    const kept = negated ? without(ranges) : ranges;
    if (kept.length === 0) throw this.#unsupported("an empty class");
    return kept;
  }

  #classAtom(): Ranges {
    const character = this.#characters[this.#at++];
    if (character !== "\\") return [this.#point(character)];
    return this.#take("b") ? [[8, 8]] : this.#escape();
  }

  #escape(): Ranges {
    const character = this.#characters[this.#at++];
    const rest = this.#ahead(10);
    const code = character === "x" ? /^[\da-f]{2}/i.exec(rest) : character === "u" ? /^([\da-f]{4}|\{[\da-f]+\})/i.exec(rest) : null;
    if (code) {
      this.#at += code[0].length;
      const point = Number.parseInt(code[0].replace(/[{}]/g, ""), 16);
      if (point >= 0xd800 && point <= 0xdfff) throw this.#unsupported("a surrogate");
      return [[point, point]];
    }
    switch (character) {
      case "d":
        return DIGIT;
      case "D":
        return without(DIGIT);
      case "w":
        return WORD;
      case "W":
        return without(WORD);
      case "s":
        return WHITE;
      case "S":
        return without(WHITE);
      default:
    }
    const control = CONTROLS[character];
    if (control !== undefined) return [[control, control]];
    if (/[A-Za-z0-9]/.test(character)) throw this.#unsupported(`\\${character}`);
    return [this.#point(character)];
  }

  #point(character: string): readonly [number, number] {
    const point = character.codePointAt(0) ?? 0;
    if (point >= 0xd800 && point <= 0xdfff) throw this.#unsupported("a surrogate");
    return [point, point];
  }
}

/** All code points but these. */
function without(ranges: Ranges): Ranges {
  const taken = [...ranges].sort(([a], [b]) => a - b);
  const left: (readonly [number, number])[] = [];
  for (const [low, high] of ALL) {
    let from = low;
    for (const [first, last] of taken) {
      if (first > from && from <= high) left.push([from, Math.min(first - 1, high)]);
      from = Math.max(from, last + 1);
    }
    if (from <= high) left.push([from, high]);
  }
  return left;
}

function mayBeEmpty(pattern: Pattern): boolean {
  switch (pattern.kind) {
    case "set":
      return false;
    case "sequence":
      return pattern.items.every(mayBeEmpty);
    case "choice":
      return pattern.items.some(mayBeEmpty);
    case "repeat":
      return pattern.min === 0 || mayBeEmpty(pattern.item);
    case "ahead":
      return true;
    default:
      return pattern satisfies never;
  }
}
