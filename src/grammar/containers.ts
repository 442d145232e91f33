/**
 * Objects and arrays of a JSON schema as grammars. Members come in the schema's order. Knows how a reader reads the schemas
 * within, but not what they say.
 */
import type { Located } from "./document.ts";
import { SchemaError } from "./error.ts";
import { choice, EMPTY, type Expression, literal, MANY, optional, repeat, sequence } from "./expression.ts";
import { COLON, COMMA, SPACE, string } from "./json.ts";
import type { Language, Languages } from "./language.ts";
import type { Members } from "./members.ts";
import type { Steps } from "./work.ts";

export interface Reader {
  readonly languages: Languages;
  /** The grammar of values that satisfy all of these schemas. */
  read(schemas: readonly Located[]): Expression;
  /** The texts that satisfy all of these schemas. */
  texts(schemas: readonly Located[]): Language;
  /** The values that satisfy all of these schemas, where they are listed; null where they are not. */
  constants(schemas: readonly Located[]): readonly unknown[] | null;
  pattern(source: string, path: string): Language;
  /** Charges work. */
  spend(steps: number): void;
  /** Pauses where much has been done. */
  pause(): Steps<void>;
}

/** Patterns of names are combined: 2^n ways in which n of them match or don't. */
const MAX_PATTERNS = 5;
const NOTHING: Expression = { kind: "choice", items: [] };

/** The objects that satisfy schemas. Throws SchemaError. */
export function* objectOf(members: Members, path: string, reader: Reader): Steps<Expression> {
  const { all, required } = members.names();
  const keySchemas = members.nameSchemas();
  const listed = keySchemas.length === 0 ? null : reader.constants(keySchemas)?.filter((each) => typeof each === "string");
  const names = listed ? [...new Set([...all, ...listed])] : all;
  const allowed = keySchemas.length === 0 ? reader.languages.all : reader.texts(keySchemas);
  const named: { needed: boolean; text: Expression }[] = [];
  for (const name of names) {
    yield* reader.pause();
    if (reader.languages.has(allowed, name))
      named.push({ needed: required.has(name), text: sequence(literal(JSON.stringify(name)), COLON, reader.read(members.member(name))) });
    else if (required.has(name)) named.push({ needed: true, text: NOTHING });
  }
  const others = listed ? [] : yield* otherMembers(members, names, allowed, path, reader);
  const [least, most] = members.counts("minProperties", "maxProperties");
  if (others.length > 0 && least > Math.max(1, named.length))
    throw new SchemaError(
      path,
      `'minProperties' ${least} is not supported with more than the ${named.length} names that are known: a name might come twice`,
    );
  const inner = yield* counted(named, choice(...others), { least, most, mostDistinct: 1 }, reader);
  return sequence(literal("{"), SPACE, inner, literal("}"));
}

/** Members that have no name in the schema: only where a schema describes them, or where none has a name. */
function* otherMembers(members: Members, names: readonly string[], allowed: Language, path: string, reader: Reader): Steps<Expression[]> {
  const { languages } = reader;
  const patterns = [...members.patterns()];
  if (patterns.length > MAX_PATTERNS)
    throw new SchemaError(path, `${patterns.length} patterns in 'patternProperties' are not supported; at most ${MAX_PATTERNS} are`);
  let free: Language | null = null;
  const found: Expression[] = [];
  for (let ways = 0; ways < 2 ** patterns.length; ways++) {
    const matching = new Set(patterns.filter((_, i) => (ways >> i) & 1).map(([pattern]) => pattern));
    const described = members.describesOthers("additionalProperties", "unevaluatedProperties");
    if (matching.size === 0 && !described && (names.length > 0 || patterns.length > 0)) continue;
    const schemas = members.otherMember(matching);
    if (schemas.some(({ schema }) => schema === false)) continue;
    const each = patterns.map(([pattern, at]) => {
      const language = reader.pattern(pattern, at);
      return matching.has(pattern) ? language : languages.not(language);
    });
    free ??= languages.and(allowed, ...(names.length === 0 ? [] : [languages.not(languages.texts(names))]));
    const keys = languages.and(free, ...each);
    const written = keys === languages.all ? null : yield* languages.written(keys, () => reader.pause());
    if (keys !== languages.all && written === null) continue; // there is no such name
    found.push(sequence(written ? sequence(literal('"'), written) : string(), COLON, reader.read(schemas)));
  }
  return found;
}

/** The arrays that satisfy schemas. Throws SchemaError. */
export function* arrayOf(members: Members, path: string, reader: Reader): Steps<Expression> {
  const { prefix } = members;
  let [least, longest] = members.counts("minItems", "maxItems");
  const contained = members.contained().filter((each) => each.least > 0);
  const unique = members.unique();
  const brackets = (inner: Expression) => sequence(literal("["), SPACE, inner, literal("]"));
  // Items after the last that has a schema of its own are written only if a schema describes them, or if they are needed.
  const closed = prefix > 0 && least <= prefix && !members.describesOthers("items", "additionalItems", "unevaluatedItems");
  if (unique !== null && longest > 1)
    return brackets(yield* uniqueItems(members, prefix, least, longest, contained.length > 0, unique, reader));
  if (contained.length > 0) {
    if (prefix > 0) throw new SchemaError(path, "'contains' beside leading items with schemas of their own is not supported");
    const item = members.item(0);
    const tail = contained.flatMap(({ at, least: times }) => {
      reader.spend(times);
      return new Array<Expression>(times).fill(reader.read([...item, at]));
    });
    least = Math.max(least, tail.length);
    if (tail.length > longest) return NOTHING;
    return brackets(
      inOrder(tail, { item: reader.read(item), least: least - tail.length, most: longest === MANY ? MANY : longest - tail.length }),
    );
  }
  if (closed) longest = Math.min(longest, prefix);
  const first: { needed: boolean; text: Expression }[] = [];
  for (let i = 0; i < Math.min(prefix, longest); i++) {
    yield* reader.pause();
    first.push({ needed: i < least, text: reader.read(members.item(i)) });
  }
  const rest = longest > prefix ? reader.read(members.item(prefix)) : NOTHING;
  return brackets(leading(first, rest, least, longest));
}

/** Items one after another: those with schemas of their own, then others. */
function leading(first: readonly { needed: boolean; text: Expression }[], rest: Expression, least: number, most: number): Expression {
  if (least > most) return NOTHING;
  const [few, many] = [Math.max(0, least - first.length), most === MANY ? MANY : most - first.length];
  if (first.length === 0) {
    if (most === 0) return EMPTY;
    const items = sequence(rest, repeat(sequence(COMMA, rest), Math.max(few - 1, 0), many === MANY ? MANY : many - 1), SPACE);
    return few > 0 ? items : optional(items);
  }
  let tail: Expression = many > 0 ? repeat(sequence(COMMA, rest), few, many) : EMPTY;
  for (let i = first.length - 1; i > 0; i--) {
    const item = sequence(COMMA, first[i].text, tail);
    tail = first[i].needed ? item : optional(item);
  }
  const items = sequence(first[0].text, tail, SPACE);
  return first[0].needed ? items : optional(items);
}

/** Any items, then these. */
function inOrder(last: readonly Expression[], free: { item: Expression; least: number; most: number }): Expression {
  const [head, ...others] = last;
  const tail = sequence(head, ...others.map((each) => sequence(COMMA, each)), SPACE);
  return sequence(repeat(sequence(free.item, COMMA), free.least, free.most), tail);
}

/** Items that differ, where they are listed: each at most once, in the list's order. */
function* uniqueItems(
  members: Members,
  prefix: number,
  least: number,
  most: number,
  contains: boolean,
  path: string,
  reader: Reader,
): Steps<Expression> {
  const values = prefix === 0 && !contains ? reader.constants(members.item(0)) : null;
  if (values === null) throw new SchemaError(path, "'uniqueItems' is not supported, except for items that 'enum' or 'const' list");
  const items = values.map((value) => ({ needed: false, text: literal(JSON.stringify(value)) }));
  return yield* counted(items, NOTHING, { least, most, mostDistinct: 0 }, reader);
}

/**
 * Some of these in their order, at least the needed ones, then any number of `others`: `least` to `most` in all. Of the others,
 * `mostDistinct` count towards `least`.
 */
function* counted(
  items: readonly { readonly needed: boolean; readonly text: Expression }[],
  others: Expression,
  { least, most, mostDistinct }: { least: number; most: number; mostDistinct: number },
  reader: Reader,
): Steps<Expression> {
  if (least > most) return NOTHING;
  const needed = items.filter((item) => item.needed).length;
  const open = !(others.kind === "choice" && others.items.length === 0);
  // Where counts can't be missed, it only matters whether anything has been written.
  const anyMost = most === MANY || (!open && most >= items.length);
  const cap = anyMost ? Math.max(1, least <= needed ? 1 : least) : Math.max(1, Math.min(most, items.length));
  const tail = (written: number): Expression => {
    const few = Math.max(0, least - written);
    const many = anyMost ? MANY : most - written;
    const reached = anyMost && least <= needed ? 0 : few;
    if (!open || many <= 0) return reached > 0 ? NOTHING : written > 0 ? SPACE : EMPTY;
    if (reached > mostDistinct) return NOTHING;
    if (written > 0) return sequence(repeat(sequence(COMMA, others), reached, many), SPACE);
    const some = sequence(others, repeat(sequence(COMMA, others), 0, many === MANY ? MANY : many - 1), SPACE);
    return reached > 0 ? some : optional(some);
  };
  let after: Expression[] = [];
  for (let written = 0; written <= cap; written++) after.push(tail(written));
  for (let i = items.length - 1; i >= 0; i--) {
    const { needed: must, text } = items[i];
    const states = Math.min(i, cap);
    reader.spend(1 + (states >> 1));
    yield* reader.pause();
    const here: Expression[] = [];
    for (let written = 0; written <= states; written++) {
      const full = !anyMost && written >= most;
      const next = after[Math.min(written + 1, cap)];
      const take = full ? NOTHING : sequence(...(written > 0 ? [COMMA] : []), text, next);
      here.push(must ? take : choice(take, after[Math.min(written, after.length - 1)]));
    }
    after = here;
  }
  return after[0];
}
