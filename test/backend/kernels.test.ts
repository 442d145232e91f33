/** Every kernel of every instruction set against the reference backend. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Backend, Numbers, WeightSource } from "../../src/backend/backend.ts";
import { instructionSets, nativeBackend } from "../../src/backend/native.ts";
import { relativeError } from "../goldens.ts";
import type { Case } from "./builder.ts";
import { allCases } from "./cases.ts";
import { expectedOf, runCase, writeWeights } from "./run.ts";

const CASES = allCases();
const folder = mkdtempSync(join(tmpdir(), "mixtape-kernels-"));
const sources: WeightSource[][] = [];
const expected: Numbers[][] = [];

beforeAll(async () => {
  for (const [i, c] of CASES.entries()) {
    sources.push(await writeWeights(c, join(folder, `${i}.bin`)));
    expected.push(await expectedOf(c, sources[i]));
  }
}, 300_000);
afterAll(() => rmSync(folder, { recursive: true }));

function compare(c: Case, actual: readonly Numbers[], wanted: readonly Numbers[], name: string): void {
  wanted.forEach((w, o) => {
    if (w instanceof Int32Array) expect(actual[o], `${name}, output ${o}`).toEqual(w);
    else {
      const infinite = (x: Numbers) => [...x.keys()].filter((i) => x[i] === Number.NEGATIVE_INFINITY);
      expect(infinite(actual[o])).toEqual(infinite(w));
      const finite = (x: Numbers) => Float32Array.from(x, (v) => (v === Number.NEGATIVE_INFINITY ? 0 : v));
      expect(relativeError(finite(actual[o]), finite(w)), `${name}, output ${o}`).toBeLessThanOrEqual(c.tolerance);
    }
  });
}

describe.each(instructionSets())("%s", (isa) => {
  test.each([1, 2, 3])(
    "every case, %i threads",
    async (threads) => {
      const backend: Backend = nativeBackend({ isa, threads });
      for (const [i, c] of CASES.entries()) compare(c, await runCase(c, backend, sources[i]), expected[i], c.name);
      backend.dispose();
    },
    120_000,
  );

  test("a row's result does not depend on the rows beside it", async () => {
    const backend = nativeBackend({ isa, threads: 2 });
    const linears = CASES.filter((c) => /^(linear|groupedLinear) .* rows 33/.test(c.name));
    expect(linears.length).toBeGreaterThan(10);
    for (const c of linears) {
      const source = sources[CASES.indexOf(c)];
      const whole = await runCase(c, backend, source);
      const first = {
        ...c,
        sizes: { rows: 5 },
        inputs: new Map([...c.inputs].map(([name, v]) => [name, v.subarray(0, (v.length / 33) * 5)])),
      };
      const few = await runCase(first, backend, source);
      few.forEach((v, o) => {
        expect(v).toEqual(whole[o].subarray(0, v.length));
      });
    }
    backend.dispose();
  });
});

test("an unavailable instruction set is an error that lists the available ones", () => {
  expect(() => nativeBackend({ isa: "avx1024" })).toThrow(/no 'avx1024'; it has .*scalar/);
});
