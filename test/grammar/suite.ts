/**
 * Runs the schemas of a copy of the JSON-Schema-Test-Suite through the grammar: `tsx test/grammar/suite.ts FOLDER [SAMPLES]`, where
 * FOLDER has `draft2020-12` and the others. What a grammar writes must satisfy two validators; what it refuses is counted by
 * keyword; how many of the suite's valid instances it could write is counted as well.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { SchemaError } from "../../src/grammar/error.ts";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { Sampler, seeded } from "./sampling.ts";
import { type Draft, validators } from "./validators.ts";

const DRAFTS: Readonly<Record<string, { readonly draft: Draft; readonly uri: string }>> = {
  draft4: { draft: "4", uri: "http://json-schema.org/draft-04/schema#" },
  draft6: { draft: "7", uri: "http://json-schema.org/draft-06/schema#" },
  draft7: { draft: "7", uri: "http://json-schema.org/draft-07/schema#" },
  "draft2019-09": { draft: "2019-09", uri: "https://json-schema.org/draft/2019-09/schema" },
  "draft2020-12": { draft: "2020-12", uri: "https://json-schema.org/draft/2020-12/schema" },
};

/** Optional behaviour that contradicts the required: contents are annotations, and 1.0 is whole. */
const OTHERWISE = /^optional\/(content|zeroTerminatedFloats|dependencies-compatibility|format-assertion)/;

interface Group {
  readonly description: string;
  readonly schema: unknown;
  readonly tests: readonly { readonly data: unknown; readonly valid: boolean }[];
}

const [folder, samples = "200"] = process.argv.slice(2);
let [accepted, refused, written, wrong, instances, writable, unsound] = [0, 0, 0, 0, 0, 0, 0];
const reasons = new Map<string, number>();
const byDraft: string[] = [];
for (const [name, { draft, uri }] of Object.entries(DRAFTS)) {
  const [acceptedBefore, refusedBefore] = [accepted, refused];
  const files = readdirSync(join(folder, name), { recursive: true }).map(String);
  for (const file of files.filter((each) => each.endsWith(".json") && !OTHERWISE.test(each)).sort())
    for (const group of JSON.parse(readFileSync(join(folder, name, file), "utf8")) as Group[]) {
      const { schema: given } = group;
      const object = typeof given === "object" && given !== null;
      const schema = object && !("$schema" in given) ? { $schema: uri, ...given } : given;
      const where = `${name}/${file}: ${group.description}`;
      let sampler: Sampler;
      try {
        sampler = new Sampler(schemaGrammar(JSON.parse(JSON.stringify(schema))));
      } catch (cause) {
        if (!(cause instanceof SchemaError)) throw new Error(where, { cause });
        refused++;
        const reason = /'([$\w]+)'/.exec(cause.message)?.[1] ?? cause.message;
        reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
        if (process.env["SHOW"]?.includes(reason)) console.log(where, cause.message);
        continue;
      }
      accepted++;
      // A validator that contradicts the suite on this very schema has a fault there.
      const checks = validators(schema, draft).filter(
        ({ check }) => check && group.tests.every(({ data, valid }) => (check(data) === null) === valid),
      );
      for (const { data, valid } of group.tests) {
        const writes = [JSON.stringify(data), JSON.stringify(data, null, 1)].some((text) => sampler.accepts(text));
        if (valid) {
          instances++;
          if (writes) writable++;
        } else if (writes) {
          unsound++;
          console.log(`${where}\n  ${JSON.stringify(schema)}\n  writes ${JSON.stringify(data)}, which the suite rejects`);
        }
      }
      const seen = new Set<string>();
      for (let seed = 1; seed <= Number(samples); seed++) {
        const text = sampler.draw(seeded(seed), [4, 12, 40, 100][seed % 4]);
        if (text !== null) seen.add(text);
      }
      written += seen.size;
      for (const { name: validator, check } of checks) {
        for (const text of seen) {
          let value: unknown;
          try {
            value = JSON.parse(text);
          } catch {
            wrong++;
            console.log(`${where}: not JSON: ${text}`);
            break;
          }
          const fault = check?.(value) ?? null;
          if (fault === null) continue;
          wrong++;
          console.log(`${where}\n  ${JSON.stringify(schema)}\n  ${validator} rejects ${text}: ${fault}`);
          break;
        }
      }
    }
  byDraft.push(`${name}: ${accepted - acceptedBefore} accepted, ${refused - refusedBefore} refused`);
}
console.log(byDraft.join("\n"));
console.log(
  `${accepted} schemas accepted, ${refused} refused; ${written} texts written, ${wrong} schemas with a text that a validator rejects`,
);
console.log(`${writable} of ${instances} valid instances can be written; ${unsound} invalid ones can`);
console.log(
  [...reasons]
    .sort(([, a], [, b]) => b - a)
    .map(([reason, times]) => `${reason} ${times}`)
    .join(", "),
);
