/** What transformers and PEFT recorded (test/fixtures/adapters/record.py): classifiers, mixed batches, weighted adapters, routed experts. */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import { AutoModelForSequenceClassification } from "../../src/api/classifier.ts";
import { AutoModelForCausalLM } from "../../src/api/model.ts";
import { instructionSets } from "../../src/backend/native.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { classifierFolder } from "../classifierfolder.ts";
import { GOLDENS, relativeError } from "../goldens.ts";

const RECORDED = fileURLToPath(new URL("../fixtures/adapters/", import.meta.url));
/** Relative to the largest logit. Noise of this strength makes the models sensitive to the order of sums. */
const TOLERANCE = 2e-4;
const open: { dispose(): Promise<void> }[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((m) => m.dispose()));
});

async function recorded(variant: string) {
  const { tensors } = await readHeader(join(RECORDED, variant, "recorded.safetensors"));
  const read = async (name: string) => {
    const entry = tensors.get(name);
    if (!entry) throw new Error(`no recorded tensor ${name}`);
    const { buffer } = Uint8Array.from(await readTensor(entry));
    return entry.dtype === "I32" ? [...new Int32Array(buffer)] : [...new Float32Array(buffer)];
  };
  const [ids, lengths] = [await read("input_ids"), await read("lengths")];
  const padded = lengths.map((_, i) => ids.slice(i * 21, (i + 1) * 21));
  return { read, padded, rows: padded.map((row, i) => row.slice(0, lengths[i])) };
}

describe.each(["moe-tiny", "dense-tiny"])("%s", (variant) => {
  const base = join(GOLDENS, variant);

  test("a classifier's logits", async () => {
    const { read, padded } = await recorded(variant);
    const score = Float32Array.from(await read("score"));
    const folder = await classifierFolder(base, score.length / 64, { pad_token_id: 0 }, { score });
    for (const device of ["cpu", "reference"]) {
      const model = await AutoModelForSequenceClassification.from_pretrained(folder, {
        dtype: "fp32",
        device,
        threads: 1,
        kv_cache_tokens: 256,
      });
      open.push(model);
      expect(relativeError((await model.forward({ input_ids: padded })).logits.data, await read("classifier")), device).toBeLessThan(
        TOLERANCE,
      );
    }
  });

  test.each([...instructionSets(), "reference"])("adapters alone, in a mixed batch and weighted, on %s", async (isa) => {
    const { read, rows } = await recorded(variant);
    const where = isa === "reference" ? { device: isa } : { isa };
    const model = await AutoModelForCausalLM.from_pretrained(base, { dtype: "fp32", threads: 2, kv_cache_tokens: 1024, ...where });
    open.push(model);
    await model.load_adapter(join(base, "lora-final"), { adapter_name: "first" });
    await model.load_adapter(join(RECORDED, variant, "second"), { adapter_name: "second" });
    if (variant === "moe-tiny") await model.load_adapter(join(RECORDED, variant, "experts"), { adapter_name: "experts" });
    for (const kind of ["cat", "linear"] as const)
      await model.add_weighted_adapter(["first", "second"], [0.7, 0.5], { adapter_name: kind, combination_type: kind });
    /** Logits of each row's last token, from one engine step that all rows share. */
    const last = async (adapters: (string | null)[]) => {
      const each = await Promise.all(
        rows.map(async (tokens, i) => {
          const scores = new Float32Array(512);
          const { logits } = await model.forward({ input_ids: [tokens], adapter: adapters[i] });
          scores.set(logits.data.subarray(-512));
          return [...scores];
        }),
      );
      return each.flat();
    };
    for (const name of ["first", "second", "cat", "linear", ...(variant === "moe-tiny" ? ["experts"] : [])])
      expect(relativeError(await last(rows.map(() => name)), await read(name)), name).toBeLessThan(TOLERANCE);
    const mixed = ["first", "second", null];
    expect(relativeError(await last(mixed), await read("mixed"))).toBeLessThan(TOLERANCE);

    // The same as log-probabilities of the tokens that one step of the schedule samples for all three.
    const expected = await read("mixed");
    const answers = await Promise.all(
      rows.map(async (tokens, i) => {
        const found = await model.generate({
          input_ids: [tokens],
          max_new_tokens: 1,
          adapter: mixed[i],
          return_dict_in_generate: true,
          eos_token_id: null,
        });
        return { id: found.sequences[0].at(-1) as number, logprob: found.logprobs[0][0] };
      }),
    );
    answers.forEach(({ id, logprob }, i) => {
      const own = expected.slice(i * 512, (i + 1) * 512);
      const top = Math.max(...own);
      const normal = top + Math.log(own.reduce((sum, x) => sum + Math.exp(x - top), 0));
      expect(id).toBe(own.indexOf(top));
      expect(logprob).toBeCloseTo(top - normal, 4);
    });
  });
});
