/** Random JSON schemas that combine all keywords. Each follows from its seed. */
import { seeded } from "./sampling.ts";

type Json = Record<string, unknown>;

export function randomSchema(seed: number): Json {
  const random = seeded(seed * 7919);
  for (let i = 0; i < 5; i++) random();
  const below = (n: number) => Math.floor(random() * n);
  const pick = <T>(all: readonly T[]): T => all[below(all.length)];
  const some = <T>(all: readonly T[]): T[] => all.filter(() => random() < 0.5);
  const maybe = (chance: number, make: () => Json): Json => (random() < chance ? make() : {});
  const names = ["a", "b", "ab", "toString", "ключ", 'q"'];
  const patterns = ["^a", "b$", "^[a-c]{1,3}$", "\\d", "^(?!a)", "^.{2,}$"];
  const values = [0, 1, -1, 1.5, "", "a", "ab", "abc", "😀", true, false, null, [], [1], {}, { a: 1 }];
  const own = (entries: [string, unknown][]) => Object.fromEntries(entries);

  const scalar = (): Json =>
    pick<() => Json>([
      () => ({ type: "string", ...maybe(0.5, () => ({ minLength: below(4) })), ...maybe(0.5, () => ({ maxLength: 2 + below(4) })) }),
      () => ({ type: "string", pattern: pick(patterns), ...maybe(0.3, () => ({ maxLength: 1 + below(5) })) }),
      () => ({
        type: "integer",
        ...maybe(0.6, () => ({ minimum: below(20) - 10 })),
        ...maybe(0.6, () => ({ exclusiveMaximum: below(20) })),
      }),
      () => ({
        type: "number",
        ...maybe(0.6, () => ({ exclusiveMinimum: (below(40) - 20) / 4 })),
        ...maybe(0.6, () => ({ maximum: below(40) / 8 })),
      }),
      () => ({ type: "integer", multipleOf: 1 + below(9), ...maybe(0.5, () => ({ minimum: below(50), maximum: 200 })) }),
      () => ({ type: pick(["boolean", "null", "string", "number", "object", "array"]) }),
      () => ({ enum: some(values).concat(pick(values) as never) }),
      () => ({ const: pick(values) }),
      () => ({ type: some(["string", "null", "integer", "boolean"]).concat("number") }),
    ])();

  const schema = (depth: number): Json | boolean => {
    if (depth <= 0) return random() < 0.05 ? random() < 0.8 : scalar();
    const sub = () => schema(depth - 1 - below(2));
    const object = (): Json => {
      const known = some(names);
      return {
        ...maybe(0.8, () => ({ type: "object" })),
        ...maybe(0.9, () => ({ properties: own(known.map((name): [string, unknown] => [name, sub()])) })),
        ...maybe(0.5, () => ({ required: some(names).slice(0, 2) })),
        ...maybe(0.4, () => ({ additionalProperties: random() < 0.5 ? false : sub() })),
        ...maybe(0.2, () => ({
          patternProperties: own(
            some(patterns)
              .slice(0, 2)
              .map((each): [string, unknown] => [each, sub()]),
          ),
        })),
        ...maybe(0.15, () => ({
          propertyNames: pick<Json>([{ pattern: pick(patterns) }, { enum: some(names) }, { minLength: 1 }, { type: "number" }]),
        })),
        ...maybe(0.15, () => ({ minProperties: below(3) })),
        ...maybe(0.15, () => ({ maxProperties: 1 + below(3) })),
        ...maybe(0.15, () => ({ unevaluatedProperties: random() < 0.7 ? false : sub() })),
        ...maybe(0.1, () => ({ dependentRequired: { a: some(names) } })),
        ...maybe(0.1, () => ({ dependentSchemas: { b: sub() } })),
      };
    };
    const array = (): Json => ({
      ...maybe(0.8, () => ({ type: "array" })),
      ...maybe(0.7, () => ({ items: sub() })),
      ...maybe(0.3, () => ({ prefixItems: [sub(), sub()].slice(below(2)) })),
      ...maybe(0.3, () => ({ minItems: below(3) })),
      ...maybe(0.4, () => ({ maxItems: 1 + below(3) })),
      ...maybe(0.15, () => ({ contains: sub(), ...maybe(0.5, () => ({ minContains: below(3) })) })),
      ...maybe(0.1, () => ({ uniqueItems: true })),
      ...maybe(0.1, () => ({ unevaluatedItems: false })),
    });
    const plain = pick([scalar, object, object, array])();
    const logic = (): Json =>
      pick<() => Json>([
        () => ({ anyOf: [sub(), sub()] }),
        () => ({ oneOf: [sub(), sub(), sub()].slice(below(2)) }),
        () => ({ allOf: [sub(), sub()] }),
        () => ({ not: sub() }),
        // biome-ignore lint/suspicious/noThenProperty: a keyword
        () => ({ if: sub(), then: sub(), ...maybe(0.5, () => ({ else: sub() })) }),
        () => ({ $ref: pick(["#/$defs/x", "#/$defs/y"]) }),
        () => ({
          oneOf: ["p", "q"].map((kind) => ({ type: "object", properties: { kind: { const: kind }, v: sub() }, required: ["kind"] })),
        }),
      ])();
    return random() < 0.45 ? { ...plain, ...logic() } : random() < 0.3 ? logic() : plain;
  };
  const root = schema(2);
  return { ...(typeof root === "boolean" ? { anyOf: [root, { type: "null" }] } : root), $defs: { x: schema(1), y: scalar() } };
}
