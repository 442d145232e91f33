/** Strings of a JSON schema as a grammar: lengths, patterns, formats, excluded texts. Knows no other type. */
import type { Schema } from "./document.ts";
import { type Expression, literal, MANY, sequence } from "./expression.ts";
import type { Form } from "./formats.ts";
import { string, stringCharacters } from "./json.ts";
import { count, type Negated, NOT_PATTERN, NOT_TEXTS } from "./keywords.ts";
import type { Language } from "./language.ts";
import type { Alternative } from "./logic.ts";
import type { Patterns } from "./patterns.ts";
import { hasAhead, type Pattern, written } from "./regex.ts";
import type { Steps } from "./work.ts";

interface Demands {
  readonly least: number;
  readonly most: number;
  /** Patterns that must match, and that must not, each with where it stands. */
  readonly patterns: ReadonlyMap<string, string>;
  readonly excluded: ReadonlyMap<string, string>;
  readonly texts: readonly string[];
  /** Of each format, the ways to write it. */
  readonly formats: readonly (readonly Form[])[];
}

/** @param exact false: formats are left out, since validators may ignore them */
function demands(held: Alternative, patterns: Patterns, exact: boolean): Demands {
  let [least, most] = [0, MANY];
  const [wanted, excluded, texts] = [new Map<string, string>(), new Map<string, string>(), new Set<string>()];
  const formats = new Set<readonly Form[]>();
  const hasPattern = held.some(({ at }) => (at.schema as Schema)["pattern"] !== undefined);
  for (const { at } of held) {
    const schema = at.schema as Schema & Negated;
    least = Math.max(least, count(schema, "minLength", 0, at.path));
    most = Math.min(most, count(schema, "maxLength", MANY, at.path));
    const { pattern, format } = schema;
    if (pattern !== undefined) wanted.set(patterns.source(pattern, at.path), at.path);
    const forms = format === undefined || !exact ? null : patterns.format(format, at.path, hasPattern);
    if (forms !== null) formats.add(forms);
    if (schema[NOT_PATTERN] !== undefined) excluded.set(schema[NOT_PATTERN], at.path);
    for (const text of schema[NOT_TEXTS] ?? []) texts.add(text);
  }
  return { least, most, patterns: wanted, excluded, texts: [...texts], formats: [...formats] };
}

/** The strings that satisfy all of these; null if none does. Throws SchemaError. */
export function* stringOf(held: Alternative, patterns: Patterns, pause: () => Steps<void>): Steps<Expression | null> {
  const wanted = demands(held, patterns, true);
  const { least, most, excluded, texts, formats } = wanted;
  if (least > most) return null;
  if (excluded.size === 0 && texts.length === 0) {
    const fits = (pattern: Pattern) => {
      const [shortest, longest] = lengths(pattern);
      return !hasAhead(pattern) && shortest >= least && longest <= most;
    };
    const path = held[0].at.path;
    const [only, ...others] = wanted.patterns.keys();
    const simple =
      formats.length === 1
        ? formats[0].find(
            ({ pattern, implies }) =>
              fits(patterns.read(pattern, path)) && [...wanted.patterns.keys()].every((each) => implies.includes(each)),
          )?.pattern
        : others.length === 0 && formats.length === 0
          ? only
          : undefined;
    if (simple === undefined && wanted.patterns.size === 0 && formats.length === 0) return string(least, most);
    const pattern = simple === undefined ? null : patterns.read(simple, wanted.patterns.get(simple) ?? path);
    if (pattern && fits(pattern)) return sequence(literal('"'), written(pattern, stringCharacters), literal('"'));
  }
  const rest = yield* patterns.languages.written(languageOf(held, patterns), pause);
  return rest && sequence(literal('"'), rest);
}

/** The texts that satisfy all of these. @param exact false: formats are left out, since validators may ignore them */
export function languageOf(held: Alternative, patterns: Patterns, exact = true): Language {
  const { least, most, patterns: wanted, excluded, texts, formats } = demands(held, patterns, exact);
  const { languages } = patterns;
  if (least > most) return languages.none;
  const path = held[0]?.at.path ?? "";
  const all = [...wanted].map(([source, at]) => patterns.language(source, at));
  const none = [...excluded].map(([source, at]) => languages.not(patterns.language(source, at)));
  const others = texts.length === 0 ? [] : [languages.not(languages.texts(texts))];
  // The simplest form of a format leaves the fewest ways to combine.
  const shortest = formats.map((forms) => {
    const longEnough = forms.filter(({ pattern }) => lengths(patterns.read(pattern, path))[1] >= least);
    return patterns.language((longEnough.at(-1) ?? forms[0]).pattern, path);
  });
  return languages.and(...(least === 0 && most === MANY ? [] : [languages.length(least, most)]), ...all, ...none, ...others, ...shortest);
}

/** Shortest and longest text of a pattern, in characters. */
function lengths(pattern: Pattern): [number, number] {
  switch (pattern.kind) {
    case "set":
      return [1, 1];
    case "sequence": {
      const all = pattern.items.map(lengths);
      return [
        all.reduce((sum, [least]) => sum + least, 0),
        Math.min(
          MANY,
          all.reduce((sum, [, most]) => sum + most, 0),
        ),
      ];
    }
    case "choice": {
      const all = pattern.items.map(lengths);
      return [Math.min(...all.map(([least]) => least)), Math.max(...all.map(([, most]) => most))];
    }
    case "repeat": {
      const [least, most] = lengths(pattern.item);
      return [least * pattern.min, Math.min(MANY, most * pattern.max)];
    }
    case "ahead":
      return [0, 0];
    default:
      return pattern satisfies never;
  }
}
