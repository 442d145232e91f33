/** The bundled model on the device and on the CPU, given the same texts: the likeliest next token at each position, and the experts chosen. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { before, describe, test } from "node:test";
import type { LoadedModel } from "../../src/api/load.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { FEW_ROWS } from "../../src/backend/cuda/lowering.ts";
import { answer, BUNDLED, dispose, likeliest, load, loadOnCpu } from "./device.ts";

/** The least share of positions at which both must agree. */
const AGREED = 0.98;
const questions: readonly { readonly turns: readonly string[] }[] = JSON.parse(
  readFileSync(new URL("../fixtures/prompts.json", import.meta.url), "utf8"),
);

let prompts: number[][];
before(async () => {
  const tokenizer = await AutoTokenizer.from_pretrained("default");
  prompts = questions
    .filter((_, i) => i % 3 === 0)
    .map(({ turns }) =>
      tokenizer.apply_chat_template(
        turns.map((content, i) => ({ role: i % 2 === 0 ? "user" : "assistant", content })),
        { add_generation_prompt: true },
      ),
    );
});

interface Seen {
  readonly tokens: readonly number[];
  readonly experts: readonly Int32Array[];
}

async function seen({ engine, config }: LoadedModel, texts: readonly (readonly number[])[]): Promise<Seen[]> {
  const found: Seen[] = [];
  for (const text of texts) {
    const { logits, routing } = await engine.inspect(text, { routing: true });
    found.push({ tokens: likeliest(logits, config.vocabSize), experts: routing.map(({ experts }) => experts) });
  }
  return found;
}

for (const dtype of ["fp32", "bf16", "int8", "int4"])
  describe(dtype, () => {
    let texts: number[][];
    let cpu: Seen[];
    before(async () => {
      const model = await loadOnCpu(BUNDLED, { dtype });
      texts = await Promise.all(
        prompts.map(async (prompt) => [...prompt, ...(await answer(model.engine, { tokens: prompt, maxNewTokens: 40 }))]),
      );
      cpu = await seen(model, texts);
      await dispose(model);
    });

    for (const chunk_size of [undefined, FEW_ROWS])
      test(`the CPU's tokens at ${100 * AGREED} % of positions, ${chunk_size ?? "all"} rows a step`, async (t) => {
        const model = await load(BUNDLED, { dtype, chunk_size });
        const device = await seen(model, texts);
        await dispose(model);
        const positions = cpu.flatMap(({ tokens }, text) => tokens.map((id, i) => id === device[text].tokens[i]));
        const slots = cpu.flatMap(({ experts }, text) =>
          experts.flatMap((layer, l) => rowsOf(layer, device[text].experts[l], texts[text].length)),
        );
        const [agreed, routed] = [share(positions), share(slots)];
        t.diagnostic(
          `${(100 * agreed).toFixed(2)} % of ${positions.length} tokens, ${(100 * routed).toFixed(2)} % of ${slots.length} sets of experts`,
        );
        assert.ok(positions.length > 500);
        assert.ok(agreed >= AGREED, `the same token at ${(100 * agreed).toFixed(2)} % of positions`);
      });
  });

/** Row by row, whether both chose the same experts, in any order. */
function rowsOf(a: Int32Array, b: Int32Array, rows: number): boolean[] {
  const k = a.length / rows;
  const set = (experts: Int32Array, row: number) => String([...experts.subarray(row * k, (row + 1) * k)].sort((x, y) => x - y));
  return Array.from({ length: rows }, (_, row) => set(a, row) === set(b, row));
}

function share(found: readonly boolean[]): number {
  return found.filter(Boolean).length / found.length;
}
