/** The whole model against recorded outputs of Hugging Face transformers. */
import { readdirSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type LoadedModel, type LoadOptions, loadModel } from "../src/api/load.ts";
import { instructionSets } from "../src/backend/native.ts";
import { GREEDY } from "../src/engine/sampling.ts";
import { GOLDENS, type Goldens, openGoldens, relativeError } from "./goldens.ts";

const VARIANTS = readdirSync(GOLDENS);
const BACKENDS: [string, LoadOptions][] = [
  ["reference", { device: "reference" }],
  ...instructionSets().map((isa): [string, LoadOptions] => [isa, { isa, threads: 2 }]),
];

describe.each(VARIANTS)("%s", (variant) => {
  describe.each(BACKENDS)("%s", (_name, options) => {
    let goldens: Goldens;
    let model: LoadedModel;
    beforeAll(async () => {
      goldens = await openGoldens(variant);
      model = await loadModel(goldens.folder, { ...options, dtype: "fp32", kv_cache_tokens: 2048 });
    });
    afterAll(() => model.engine.dispose());

    test("logits, hidden states and routing", async () => {
      for (const n of goldens.lengths) {
        const out = await model.engine.inspect(await goldens.ids(n), { hiddenStates: true, routing: true });
        expect(relativeError(out.logits, (await goldens.tensor(`forward.${n}.logits`)).data)).toBeLessThan(2e-4);
        const hidden = (await goldens.tensor(`forward.${n}.hidden_states`)).data;
        out.hiddenStates.forEach((h, i) => {
          expect(relativeError(h, hidden.subarray(i * h.length, (i + 1) * h.length))).toBeLessThan(2e-4);
        });
        for (const [i, r] of out.routing.entries()) {
          const recorded = async (what: string) => (await goldens.tensor(`forward.${n}.router.${i}.${what}`)).data;
          expect(relativeError(r.logits, await recorded("logits"))).toBeLessThan(2e-4);
          expect(r.experts).toEqual(await recorded("experts"));
          const weights = await recorded("weights");
          r.weights.forEach((w, j) => {
            expect(Math.abs(w - weights[j])).toBeLessThan(1e-5);
          });
        }
      }
    });

    test("greedy continuations, one prompt after another", async () => {
      for (const n of goldens.lengths) expect(await continuation(model, await goldens.ids(n))).toEqual(goldens.greedy[n]);
    });

    test("greedy continuations, all prompts at once", async () => {
      const all = await Promise.all(goldens.lengths.map(async (n) => continuation(model, await goldens.ids(n))));
      expect(all).toEqual(goldens.lengths.map((n) => goldens.greedy[n]));
    });

    test.each([1, 5])("greedy continuations, prompts read %i tokens at a time", async (chunk_size) => {
      const pieces = await loadModel(goldens.folder, { ...options, dtype: "fp32", kv_cache_tokens: 2048, chunk_size });
      for (const n of goldens.lengths) expect(await continuation(pieces, await goldens.ids(n))).toEqual(goldens.greedy[n]);
      await pieces.engine.dispose();
    });
  });
});

async function continuation({ engine }: LoadedModel, tokens: number[]): Promise<number[]> {
  const ids: number[] = [];
  for await (const token of engine.submit({ tokens, sampling: GREEDY, maxNewTokens: 24 })) ids.push(token.id);
  return ids;
}
