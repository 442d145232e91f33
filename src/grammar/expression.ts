/** The parts of a grammar: text as bytes, choices, repetitions, recursion. Plain data; `automaton.ts` interprets it. */

/** Ranges of bytes or code points, both ends included. */
export type Ranges = readonly (readonly [number, number])[];

export type Expression =
  | { readonly kind: "bytes"; readonly bytes: Uint8Array }
  /** One byte. */
  | { readonly kind: "byte"; readonly ranges: Ranges }
  /** One special token, which has no text. */
  | { readonly kind: "token"; readonly id: number }
  | { readonly kind: "sequence"; readonly items: readonly Expression[] }
  | { readonly kind: "choice"; readonly items: readonly Expression[] }
  | { readonly kind: "repeat"; readonly item: Expression; readonly min: number; readonly max: number }
  /** The rest of a JSON string, closing quote included: `min` to `max` characters. A kind of its own, so that its masks can be shared. */
  | { readonly kind: "text"; readonly character: Expression; readonly min: number; readonly max: number }
  /** Any text up to and including a tag; with `mayEnd` also text without it. */
  | { readonly kind: "until"; readonly mark: Uint8Array; readonly token: number | null; readonly mayEnd: boolean }
  /** Recursion; `to` is set once it is known. */
  | { readonly kind: "rule"; to: Expression | null };

/** Repetitions are counted up to this number; larger limits mean unlimited. */
export const MANY = 2 ** 20;

export function literal(text: string): Expression {
  return { kind: "bytes", bytes: new TextEncoder().encode(text) };
}

export function sequence(...items: readonly Expression[]): Expression {
  return items.length === 1 ? items[0] : { kind: "sequence", items };
}

export function choice(...items: readonly Expression[]): Expression {
  return items.length === 1 ? items[0] : { kind: "choice", items };
}

export function repeat(item: Expression, min: number, max: number = MANY): Expression {
  return { kind: "repeat", item, min, max: Math.min(max, MANY) };
}

export function optional(item: Expression): Expression {
  return repeat(item, 0, 1);
}

export const EMPTY: Expression = { kind: "sequence", items: [] };

/** One of these texts. Shared prefixes are merged, so that many texts cost little more than a few. */
export function oneOf(texts: readonly string[]): Expression {
  const all = [...new Set(texts)].map((text) => new TextEncoder().encode(text));
  const branch = (rest: readonly Uint8Array[]): Expression => {
    const byFirst = new Map<number, Uint8Array[]>();
    for (const text of rest) {
      const group = byFirst.get(text[0]);
      if (group) group.push(text);
      else if (text.length > 0) byFirst.set(text[0], [text]);
    }
    const items = [...byFirst.values()].map((group): Expression => {
      let shared = 1;
      const [first] = group;
      while (shared < first.length && group.every((text) => text[shared] === first[shared])) shared++;
      const head: Expression = { kind: "bytes", bytes: first.slice(0, shared) };
      return group.length === 1 ? head : sequence(head, branch(group.map((text) => text.subarray(shared))));
    });
    return rest.some((text) => text.length === 0) ? choice(EMPTY, ...items) : choice(...items);
  };
  return branch(all);
}

/** One character of these code points, as UTF-8. Surrogates are excluded. */
export function characters(ranges: Ranges): Expression {
  const items: Expression[] = [];
  for (const [from, to] of ranges)
    for (const [low, high] of [
      [Math.max(from, 0), Math.min(to, 0x7f)],
      [Math.max(from, 0x80), Math.min(to, 0x7ff)],
      [Math.max(from, 0x800), Math.min(to, 0xd7ff)],
      [Math.max(from, 0xe000), Math.min(to, 0xffff)],
      [Math.max(from, 0x10000), Math.min(to, 0x10ffff)],
    ])
      if (low <= high) items.push(...sameLength(utf8(low), utf8(high)));
  return choice(...items);
}

/** The byte sequences from `low` to `high`, which have the same length. */
function sameLength(low: readonly number[], high: readonly number[]): Expression[] {
  const byte = (from: number, to: number): Expression => ({ kind: "byte", ranges: [[from, to]] });
  const [a, ...lows] = low;
  const [b, ...highs] = high;
  if (lows.length === 0) return [byte(a, b)];
  const least = lows.map(() => 0x80);
  const most = lows.map(() => 0xbf);
  const under = (first: number, from: readonly number[], to: readonly number[]) =>
    sequence(byte(first, first), choice(...sameLength(from, to)));
  if (a === b) return [under(a, lows, highs)];
  const fromLeast = lows.every((x, i) => x === least[i]);
  const toMost = highs.every((x, i) => x === most[i]);
  const [first, last] = [fromLeast ? a : a + 1, toMost ? b : b - 1];
  return [
    ...(fromLeast ? [] : [under(a, lows, most)]),
    ...(first <= last ? [sequence(byte(first, last), ...least.map(() => byte(0x80, 0xbf)))] : []),
    ...(toMost ? [] : [under(b, least, highs)]),
  ];
}

function utf8(code: number): number[] {
  return [...new TextEncoder().encode(String.fromCodePoint(code))];
}
