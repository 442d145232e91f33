/**
 * The bundled model on the device and on the CPU, given the same texts: the likeliest next token at each position, and the experts chosen.
 *
 * The CPU's kernels round activations to int8 where they meet int8 and int4 weights, which alone changes one token in twenty (the reference
 * backend agrees with them at 95 % of positions). Other devices do not, so they are held to the CPU with the very same weights widened to
 * float32; how far they agree with its int8 arithmetic is only reported.
 */
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { LoadedModel } from "../../src/api/load.ts";
import { quantize } from "../../src/api/quantize.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import { FEW_ROWS } from "../../src/backend/cuda/lowering.ts";
import { answer, BUNDLED, DEVICE, dispose, likeliest, load, loadOnCpu } from "./device.ts";

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
    let rounded: Seen[];
    let exact: Seen[];
    let folder = BUNDLED;
    const kv_cache_dtype = dtype === "fp32" ? "fp32" : "fp16"; // alike everywhere; the defaults differ
    before(async () => {
      if (dtype === "int4") {
        folder = mkdtempSync(join(tmpdir(), "mixtape-gpu-")); // one file for all, so that no conversion can differ
        await quantize(BUNDLED, folder, { dtype });
      }
      const model = await loadOnCpu(folder, { dtype, kv_cache_dtype });
      texts = await Promise.all(
        prompts.map(async (prompt) => [...prompt, ...(await answer(model.engine, { tokens: prompt, maxNewTokens: 40 }))]),
      );
      rounded = await seen(model, texts);
      await dispose(model);
      exact = rounded;
      if (DEVICE === "cpu" || !dtype.startsWith("int")) return;
      const wide = await loadOnCpu(folder, { dtype: "fp32", kv_cache_dtype }); // the bundled weights are int8
      exact = await seen(wide, texts);
      await dispose(wide);
    });
    after(() => {
      if (folder !== BUNDLED) rmSync(folder, { recursive: true, force: true });
    });

    for (const chunk_size of [undefined, FEW_ROWS])
      test(`the CPU's tokens at ${100 * AGREED} % of positions, ${chunk_size ?? "all"} rows a step`, async (t) => {
        const model = await load(folder, { dtype, chunk_size, kv_cache_dtype });
        const device = await seen(model, texts);
        await dispose(model);
        const same = (cpu: readonly Seen[], from: (text: number) => number) =>
          cpu.flatMap(({ tokens }, text) => tokens.map((id, i) => id === device[text].tokens[i]).slice(from(text)));
        const positions = same(exact, () => 0);
        const slots = exact.flatMap(({ experts }, text) =>
          experts.flatMap((layer, l) => rowsOf(layer, device[text].experts[l], texts[text].length)),
        );
        const [agreed, routed] = [share(positions), share(slots)];
        t.diagnostic(
          `${(100 * agreed).toFixed(2)} % of ${positions.length} tokens, ${(100 * routed).toFixed(2)} % of ${slots.length} sets of experts`,
        );
        const [all, answers] = [same(rounded, () => 0), same(rounded, (text) => prompts[text].length - 1)];
        t.diagnostic(
          `the CPU's own arithmetic: ${(100 * share(all)).toFixed(2)} % of all tokens, ${(100 * share(answers)).toFixed(2)} % of ${answers.length} in its answers`,
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
