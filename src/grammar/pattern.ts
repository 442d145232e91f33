/**
 * Regular expressions as grammars: of JSON strings in which one matches, as JSON Schema's `pattern` means it, or of texts that
 * match as a whole. Look-around, back references and word boundaries are rejected: no text can be written to them from left to
 * right.
 */
import { characters, choice, EMPTY, type Expression, literal, MANY, type Ranges, repeat, sequence } from "./expression.ts";
import { stringCharacters } from "./json.ts";

const ALL: Ranges = [
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

/** The JSON strings, quotes included, in which a pattern matches. Throws Error that says what in it is not supported. */
export function patternString(source: string): Expression {
  check(source);
  return sequence(literal('"'), new PatternReader(source, { character: stringCharacters, whole: false }).read(), literal('"'));
}

/** The texts that match a pattern as a whole. Throws Error that says what in it is not supported. */
export function patternText(source: string): Expression {
  check(source);
  return new PatternReader(source, { character: characters, whole: true }).read();
}

function check(source: string): void {
  if (source.length > MAX_PATTERN) throw new Error(`the pattern has ${source.length} characters; ${MAX_PATTERN} are supported`);
  try {
    new RegExp(source, "u");
  } catch (cause) {
    throw new Error(`the pattern ${JSON.stringify(source)} is not a regular expression`, { cause });
  }
}

interface Target {
  /** One character of these, as it is written. */
  readonly character: (ranges: Ranges) => Expression;
  /** The pattern must match all of the text, as if it were anchored at both ends. */
  readonly whole: boolean;
}

class PatternReader {
  readonly #source: string;
  readonly #target: Target;
  readonly #characters: readonly string[];
  #at = 0;

  constructor(source: string, target: Target) {
    this.#source = source;
    this.#target = target;
    this.#characters = [...source];
  }

  read(): Expression {
    const whole = this.#choice(true);
    if (this.#at < this.#characters.length) throw this.#unsupported(this.#characters[this.#at]);
    return whole;
  }

  #unsupported(what: string): Error {
    return new Error(`the pattern ${JSON.stringify(this.#source)} has ${what}, which is not supported here`);
  }

  get #next(): string | undefined {
    return this.#characters[this.#at];
  }

  #take(text: string): boolean {
    if (
      !this.#characters
        .slice(this.#at, this.#at + text.length)
        .join("")
        .startsWith(text)
    )
      return false;
    this.#at += text.length;
    return true;
  }

  /** @param outer not inside a group: anchors may stand here and, unless the whole text must match, other text may surround it */
  #choice(outer: boolean): Expression {
    const items: Expression[] = [];
    do items.push(this.#sequence(outer));
    while (this.#take("|"));
    return choice(...items);
  }

  #sequence(outer: boolean): Expression {
    const { character, whole } = this.#target;
    const anything = whole ? EMPTY : repeat(character(ALL), 0);
    const items: Expression[] = [];
    if (outer && !this.#take("^")) items.push(anything);
    for (let next = this.#next; next !== undefined && next !== "|" && next !== ")"; next = this.#next) {
      if (next === "$" && outer && [undefined, "|"].includes(this.#characters[this.#at + 1])) {
        this.#at++;
        return sequence(...items);
      }
      items.push(this.#quantified(this.#atom()));
    }
    if (outer) items.push(anything);
    return items.length === 0 ? EMPTY : sequence(...items);
  }

  #quantified(item: Expression): Expression {
    let [min, max] = [1, 1];
    if (this.#take("*")) [min, max] = [0, MANY];
    else if (this.#take("+")) [min, max] = [1, MANY];
    else if (this.#take("?")) [min, max] = [0, 1];
    else {
      const counts = this.#next === "{" ? /^\{(\d+)(,(\d*))?\}/.exec(this.#characters.slice(this.#at, this.#at + 24).join("")) : null;
      if (!counts && this.#next === "{") throw this.#unsupported("a brace that is not a repetition");
      if (!counts) return item;
      this.#at += counts[0].length;
      min = Number(counts[1]);
      max = counts[2] === undefined ? min : counts[3] === "" ? MANY : Number(counts[3]);
    }
    this.#take("?"); // lazy quantifiers match the same texts
    if (min >= MANY) throw this.#unsupported(`${min} repetitions`);
    if (!mayBeEmpty(item)) return repeat(item, min, max);
    if (max > 64 && max < MANY) throw this.#unsupported("a counted repetition of a part that may be empty");
    return repeat(item, 0, max);
  }

  #atom(): Expression {
    const character = this.#characters[this.#at++];
    switch (character) {
      case "(": {
        if (this.#take("?") && !this.#take(":")) {
          const name = /^<\w+>/.exec(this.#characters.slice(this.#at, this.#at + 64).join(""))?.[0];
          if (name === undefined) throw this.#unsupported("look-around");
          this.#at += name.length;
        }
        const inner = this.#choice(false);
        this.#take(")");
        return inner;
      }
      case "[":
        return this.#target.character(this.#class());
      case ".":
        return this.#target.character(without(LINE_END));
      case "\\":
        return this.#target.character(this.#escape());
      case "^":
      case "$":
        throw this.#unsupported("an anchor in the middle");
      default:
        return this.#target.character([pointOf(character)]);
    }
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
    if (character !== "\\") return [pointOf(character)];
    return this.#take("b") ? [[8, 8]] : this.#escape();
  }

  #escape(): Ranges {
    const character = this.#characters[this.#at++];
    const rest = this.#characters.slice(this.#at, this.#at + 10).join("");
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
    return [pointOf(character)];
  }
}

function pointOf(character: string): readonly [number, number] {
  const point = character.codePointAt(0) ?? 0;
  return [point, point];
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

function mayBeEmpty(e: Expression): boolean {
  switch (e.kind) {
    case "sequence":
      return e.items.every(mayBeEmpty);
    case "choice":
      return e.items.some(mayBeEmpty);
    case "repeat":
      return e.min === 0 || mayBeEmpty(e.item);
    case "bytes":
      return e.bytes.length === 0;
    default:
      return false;
  }
}
