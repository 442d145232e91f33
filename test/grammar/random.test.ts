/**
 * Random schemas of all keywords: whatever a grammar writes satisfies two validators, and what can't be enforced is refused by
 * name. `SCHEMAS=5000` tries more of them.
 */
import { expect, test } from "vitest";
import { SchemaError } from "../../src/grammar/error.ts";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { randomSchema } from "./generator.ts";
import { Sampler, seeded } from "./sampling.ts";
import { validators } from "./validators.ts";

const SCHEMAS = Number(process.env["SCHEMAS"] ?? 200);
/** A keyword in quotes, or why no value exists. */
const REASON = /'[$\w]+'|no value is valid|too complex|which is not supported here|decimals are not supported|close to each other/;

test(`${SCHEMAS} random schemas are enforced, or refused by name`, { timeout: 60_000 + SCHEMAS * 200 }, () => {
  let [accepted, texts] = [0, 0];
  const reasons = new Map<string, number>();
  for (let seed = 1; seed <= SCHEMAS; seed++) {
    const schema = randomSchema(seed);
    let sampler: Sampler;
    try {
      sampler = new Sampler(schemaGrammar(schema));
    } catch (cause) {
      if (!(cause instanceof SchemaError)) throw new Error(`seed ${seed}: ${JSON.stringify(schema)}`, { cause });
      expect(cause.message).toMatch(REASON);
      const [reason] = REASON.exec(cause.message) ?? [""];
      reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
      continue;
    }
    accepted++;
    const checks = validators(schema, "2020-12");
    for (let draw = 1; draw <= 25; draw++) {
      const text = sampler.draw(seeded(seed * 1000 + draw), [3, 10, 30, 80][draw % 4]);
      if (text === null) continue;
      texts++;
      for (const { name, check } of checks) {
        const fault: string | null = check?.(JSON.parse(text)) ?? null;
        if (fault !== null) expect.fail(`seed ${seed}: ${name} rejects ${text}: ${fault}\n${JSON.stringify(schema)}`);
      }
    }
  }
  if (process.env["SCHEMAS"]) console.log({ accepted, texts }, reasons);
  expect(accepted).toBeGreaterThan(SCHEMAS * 0.5);
  expect(texts).toBeGreaterThan(accepted * 10);
});
