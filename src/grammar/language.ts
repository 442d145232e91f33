/**
 * Sets of texts, closed under and, or and not: what several patterns, lengths and names allow together. Follows a text character
 * by character (derivatives of regular expressions, Brzozowski 1964). Equal sets that are built alike are one object. Knows no
 * schema.
 */
import { choice, type Expression, literal, MANY, type Ranges, sequence } from "./expression.ts";
import { CHARACTER, stringCharacters } from "./json.ts";
import { ALL, type Pattern } from "./regex.ts";
import type { Steps } from "./work.ts";

export type Language = { readonly id: number /** The empty text is in it. */; readonly nullable: boolean } & (
  | { readonly kind: "none" }
  | { readonly kind: "empty" }
  | { readonly kind: "set"; readonly ranges: Ranges }
  | { readonly kind: "then"; readonly first: Language; readonly rest: Language }
  | { readonly kind: "or" | "and"; readonly items: readonly Language[] }
  | { readonly kind: "not"; readonly item: Language }
  | { readonly kind: "repeat"; readonly item: Language; readonly min: number; readonly max: number }
);

const LAST = 0x10ffff;

/** Builds and follows languages. Each step is charged to `spend`, which may throw. */
export class Languages {
  readonly #spend: (steps: number) => void;
  readonly #known = new Map<string, Language>();
  readonly #derived = new Map<Language, Map<number, Language>>();
  readonly #cuts = new Map<Language, readonly number[]>();
  /** One character of some ranges, as it is written. */
  readonly #characters = new Map<string, Expression>();
  readonly none: Language;
  readonly empty: Language;
  /** Every text. */
  readonly all: Language;

  constructor(spend: (steps: number) => void) {
    this.#spend = spend;
    this.none = this.#made("none", (id) => ({ id, kind: "none", nullable: false }));
    this.empty = this.#made("empty", (id) => ({ id, kind: "empty", nullable: true }));
    this.all = this.repeat(this.set(ALL), 0, MANY);
  }

  #made(key: string, make: (id: number) => Language): Language {
    this.#spend(1);
    const known = this.#known.get(key);
    if (known) return known;
    const made = make(this.#known.size);
    this.#known.set(key, made);
    return made;
  }

  set(ranges: Ranges): Language {
    if (ranges.length === 0) return this.none;
    const sorted = ranges.length === 1 ? ranges : [...ranges].sort(([a], [b]) => a - b);
    this.#spend(ranges.length >> 4);
    return this.#made(`[${sorted.join(" ")}`, (id) => ({ id, kind: "set", ranges: sorted, nullable: false }));
  }

  concat(first: Language, rest: Language): Language {
    if (first === this.none || rest === this.none) return this.none;
    if (first === this.empty) return rest;
    if (rest === this.empty) return first;
    if (first === this.all && rest === this.all) return this.all;
    if (first.kind === "then") return this.concat(first.first, this.concat(first.rest, rest));
    const nullable = first.nullable && rest.nullable;
    return this.#made(`.${first.id} ${rest.id}`, (id) => ({ id, kind: "then", first, rest, nullable }));
  }

  or(...parts: readonly Language[]): Language {
    const items = this.#parts(parts, "or", this.none);
    if (items.includes(this.all)) return this.all;
    if (items.length < 2) return items[0] ?? this.none;
    return this.#made(`|${items.map(({ id }) => id).join()}`, (id) => ({ id, kind: "or", items, nullable: items.some((e) => e.nullable) }));
  }

  and(...parts: readonly Language[]): Language {
    const items = this.#parts(parts, "and", this.all);
    if (items.includes(this.none)) return this.none;
    if (items.length < 2) return items[0] ?? this.all;
    return this.#made(`&${items.map(({ id }) => id).join()}`, (id) => ({
      id,
      kind: "and",
      items,
      nullable: items.every((e) => e.nullable),
    }));
  }

  not(item: Language): Language {
    if (item.kind === "not") return item.item;
    if (item === this.none) return this.all;
    if (item === this.all) return this.none;
    return this.#made(`!${item.id}`, (id) => ({ id, kind: "not", item, nullable: !item.nullable }));
  }

  repeat(item: Language, least: number, max: number): Language {
    const min = item.nullable ? 0 : least;
    if (max === 0 || item === this.empty) return this.empty;
    if (item === this.none) return min === 0 ? this.empty : this.none;
    if (min === 1 && max === 1) return item;
    return this.#made(`*${item.id} ${min} ${max}`, (id) => ({ id, kind: "repeat", item, min, max, nullable: min === 0 }));
  }

  /** Texts of `min` to `max` characters. */
  length(min: number, max: number): Language {
    return this.repeat(this.set(ALL), min, max);
  }

  /** Exactly these texts. */
  texts(texts: readonly string[]): Language {
    return this.#texts([...new Set(texts)].map((text) => [...text].map((each) => each.codePointAt(0) ?? 0)));
  }

  #texts(texts: readonly (readonly number[])[]): Language {
    this.#spend(texts.length);
    if (texts.length === 1) return texts[0].reduceRight((rest, point) => this.concat(this.set([[point, point]]), rest), this.empty);
    const byFirst = new Map<number, number[][]>();
    for (const [first, ...rest] of texts) if (first !== undefined) (byFirst.get(first) ?? byFirst.set(first, []).get(first))?.push(rest);
    const longer = [...byFirst].map(([first, rests]) => this.concat(this.set([[first, first]]), this.#texts(rests)));
    return this.or(...(texts.some((text) => text.length === 0) ? [this.empty] : []), ...longer);
  }

  /** The texts that match a pattern. */
  pattern(pattern: Pattern, rest: Language = this.empty): Language {
    switch (pattern.kind) {
      case "set":
        return this.concat(this.set(pattern.ranges), rest);
      case "sequence":
        return pattern.items.reduceRight((after, item) => this.pattern(item, after), rest);
      case "choice":
        return this.or(...pattern.items.map((item) => this.pattern(item, rest)));
      case "repeat":
        return this.concat(this.repeat(this.pattern(pattern.item), pattern.min, pattern.max), rest);
      case "ahead": {
        const ahead = this.pattern(pattern.rest);
        return this.and(pattern.negated ? this.not(ahead) : ahead, rest);
      }
      default:
        return pattern satisfies never;
    }
  }

  /** Whether a text is in a language. */
  has(language: Language, text: string): boolean {
    let at = language;
    for (const character of text) {
      if (at === this.none || at === this.all) break;
      at = this.#after(at, character.codePointAt(0) ?? 0);
    }
    return at.nullable;
  }

  isEmpty(language: Language): boolean {
    const seen = new Set([language]);
    for (const next of seen) {
      if (next.nullable || anyText(next)) return false;
      for (const [to] of this.#steps(next)) seen.add(to);
    }
    return true;
  }

  /** The grammar of the JSON strings of a language, without the opening quote; null if there are none. */
  *written(language: Language, pause: () => Steps<void>): Steps<Expression | null> {
    type Rule = Expression & { kind: "rule" };
    const rules = new Map<Language, Rule>();
    const steps: { from: Language; ranges: [number, number][]; to: Language }[] = [];
    const found = [language];
    const seen = new Set(found);
    for (let next = found.pop(); next !== undefined; next = found.pop()) {
      yield* pause();
      for (const [to, ranges] of this.#steps(next)) {
        steps.push({ from: next, ranges, to });
        if (!seen.has(to)) found.push(to);
        seen.add(to);
      }
    }
    // Only what can still end is written.
    const live = new Set([...seen].filter((each) => each.nullable));
    const sources = new Map<Language, Language[]>();
    for (const { from, to } of steps) (sources.get(to) ?? sources.set(to, []).get(to))?.push(from);
    const reached = [...live];
    for (let next = reached.pop(); next !== undefined; next = reached.pop())
      for (const from of sources.get(next) ?? []) {
        if (!live.has(from)) reached.push(from);
        live.add(from);
      }
    if (!live.has(language)) return null;
    const rule = (of: Language): Rule => {
      const known = rules.get(of) ?? { kind: "rule", to: null };
      rules.set(of, known);
      return known;
    };
    const items = new Map<Language, Expression[]>([...live].map((each) => [each, each.nullable ? [literal('"')] : []]));
    for (const { from, ranges, to } of steps) {
      if (!live.has(from) || !live.has(to)) continue;
      this.#spend(1);
      yield* pause();
      items.get(from)?.push(sequence(this.#character(ranges), rule(to)));
    }
    for (const [each, all] of items) rule(each).to = anyText(each) ?? choice(...all);
    return rule(language);
  }

  #character(ranges: Ranges): Expression {
    const key = ranges.join(" ");
    let known = this.#characters.get(key);
    if (!known) {
      this.#spend(20 + 4 * ranges.length);
      this.#characters.set(key, (known = stringCharacters(ranges)));
    }
    return known;
  }

  /** The languages after one more character, each with the characters that lead to it. */
  #steps(language: Language): Map<Language, [number, number][]> {
    const steps = new Map<Language, [number, number][]>();
    if (anyText(language)) return steps;
    const cuts = [...new Set([...this.#cutsOf(language), 0, 0xd800, 0xe000])].sort((a, b) => a - b);
    this.#spend(cuts.length >> 1);
    for (const [i, from] of cuts.entries()) {
      const to = (cuts[i + 1] ?? LAST + 1) - 1;
      if (from > LAST || (from >= 0xd800 && from < 0xe000)) continue;
      const after = this.#after(language, from);
      if (after === this.none) continue;
      const ranges = steps.get(after) ?? [];
      steps.set(after, ranges);
      const last = ranges.at(-1);
      if (last && last[1] === from - 1) last[1] = to;
      else ranges.push([from, to]);
    }
    return steps;
  }

  /** Code points at which the language after one character may change. */
  #cutsOf(language: Language): readonly number[] {
    const known = this.#cuts.get(language);
    if (known) return known;
    const cuts = this.#findCuts(language);
    this.#spend(cuts.length >> 2);
    this.#cuts.set(language, cuts);
    return cuts;
  }

  #findCuts(language: Language): readonly number[] {
    switch (language.kind) {
      case "none":
      case "empty":
        return [];
      case "set":
        return language.ranges.flatMap(([from, to]) => [from, to + 1]);
      case "then": {
        const first = this.#cutsOf(language.first);
        return language.first.nullable ? [...new Set([...first, ...this.#cutsOf(language.rest)])] : first;
      }
      case "or":
      case "and":
        return [...new Set(language.items.flatMap((item) => this.#cutsOf(item)))];
      case "not":
      case "repeat":
        return this.#cutsOf(language.item);
      default:
        return language satisfies never;
    }
  }

  /** The language of what may follow a character: its derivative. */
  #after(language: Language, point: number): Language {
    const byPoint = this.#derived.get(language) ?? new Map<number, Language>();
    this.#derived.set(language, byPoint);
    let after = byPoint.get(point);
    if (!after) byPoint.set(point, (after = this.#derive(language, point)));
    return after;
  }

  #derive(language: Language, point: number): Language {
    this.#spend(1);
    switch (language.kind) {
      case "none":
      case "empty":
        return this.none;
      case "set":
        this.#spend(language.ranges.length >> 6);
        return language.ranges.some(([from, to]) => point >= from && point <= to) ? this.empty : this.none;
      case "then": {
        const first = this.concat(this.#after(language.first, point), language.rest);
        return language.first.nullable ? this.or(first, this.#after(language.rest, point)) : first;
      }
      case "or":
        return this.or(...language.items.map((item) => this.#after(item, point)));
      case "and":
        return this.and(...language.items.map((item) => this.#after(item, point)));
      case "not":
        return this.not(this.#after(language.item, point));
      case "repeat": {
        const { item, min, max } = language;
        return this.concat(this.#after(item, point), this.repeat(item, Math.max(min - 1, 0), max === MANY ? MANY : max - 1));
      }
      default:
        return language satisfies never;
    }
  }

  #parts(parts: readonly Language[], kind: "or" | "and", neutral: Language): readonly Language[] {
    this.#spend(parts.length >> 1);
    const items = new Set<Language>();
    for (const part of parts) {
      if (part.kind === kind) for (const item of part.items) items.add(item);
      else if (part !== neutral) items.add(part);
    }
    return [...items].sort((a, b) => a.id - b.id);
  }
}

/** The rest of a string where only its length counts, which the automaton handles faster; null if more than that counts. */
function anyText(language: Language): Expression | null {
  if (language.kind !== "repeat" || language.item.kind !== "set") return null;
  const { ranges } = language.item;
  if (ranges.length !== ALL.length || !ranges.every((range, i) => range[0] === ALL[i][0] && range[1] === ALL[i][1])) return null;
  return { kind: "text", character: CHARACTER, min: language.min, max: language.max };
}
