/** Tiny models on the device against recorded outputs of Hugging Face transformers: every shape, in one step, in steps of few rows, and token by token. */
import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { describe, test } from "node:test";
import { FEW_ROWS } from "../../src/backend/cuda/lowering.ts";
import { GOLDENS, openGoldens, relativeError } from "../goldens.ts";
import { answer, CLOSE, dispose, load } from "./device.ts";

for (const variant of readdirSync(GOLDENS))
  describe(variant, () => {
    // Few rows are computed by kernels of their own.
    for (const chunk_size of [undefined, 16, FEW_ROWS])
      test(`logits, hidden states and routing, ${chunk_size ?? "all"} rows a step`, async () => {
        const goldens = await openGoldens(variant);
        const model = await load(goldens.folder, { chunk_size });
        for (const n of goldens.lengths) {
          const recorded = async (what: string) => (await goldens.tensor(`forward.${n}.${what}`)).data;
          const out = await model.engine.inspect(await goldens.ids(n), { hiddenStates: true, routing: true });
          const error = relativeError(out.logits, await recorded("logits"));
          assert.ok(error < CLOSE, `logits of ${n} tokens differ by ${error}`);
          const hidden = await recorded("hidden_states");
          for (const [i, h] of out.hiddenStates.entries()) {
            const off = relativeError(h, hidden.subarray(i * h.length, (i + 1) * h.length));
            assert.ok(off < CLOSE, `hidden states ${i} of ${n} tokens differ by ${off}`);
          }
          for (const [i, r] of out.routing.entries()) {
            assert.ok(relativeError(r.logits, await recorded(`router.${i}.logits`)) < CLOSE, `the router of layer ${r.layer} differs`);
            assert.deepEqual(r.experts, await recorded(`router.${i}.experts`));
            assert.ok(
              relativeError(r.weights, await recorded(`router.${i}.weights`)) < CLOSE,
              `the experts' weights of layer ${r.layer} differ`,
            );
          }
        }
        await dispose(model);
      });

    test("greedy continuations, one after another, all at once, and prompts read in pieces", async () => {
      const goldens = await openGoldens(variant);
      const prompts = await Promise.all(goldens.lengths.map((n) => goldens.ids(n)));
      const expected = goldens.lengths.map((n) => goldens.greedy[n]);
      const model = await load(goldens.folder);
      for (const [i, prompt] of prompts.entries()) assert.deepEqual(await answer(model.engine, { tokens: prompt }), expected[i]);
      assert.deepEqual(await Promise.all(prompts.map((prompt) => answer(model.engine, { tokens: prompt }))), expected);
      const pieces = await load(goldens.folder, { chunk_size: 5 });
      assert.deepEqual(await Promise.all(prompts.map((prompt) => answer(pieces.engine, { tokens: prompt }))), expected);
      await dispose(model, pieces);
    });
  });
