/** Rejections and warnings before a model is loaded, on hypothetical machines and on this one. */
import { expect, test } from "vitest";
import { warningsFor } from "../../src/api/room.ts";
import type { WeightSource } from "../../src/backend/backend.ts";
import { physicalCores } from "../../src/backend/cores.ts";
import { AutoModelForCausalLM } from "../../src/index.ts";

const GIB = 2 ** 30;
const machine = { memory: 8 * GIB, free: 6 * GIB, cores: 4 };

function matrix(gib: number, stored: "bf16" | "int8", dtype: "bf16" | "int8"): WeightSource {
  const shape = [(gib * GIB) / 2 / 1024, 1024];
  return { name: "w", stored, dtype, shape, parts: [{ file: "f", offset: 0, bytes: gib * GIB }] };
}

test("a model that fits gives no warning", () => {
  expect(warningsFor([matrix(4, "bf16", "bf16")], 4, machine)).toEqual([]);
});

test("weights larger than memory give a warning with both sizes", () => {
  expect(warningsFor([matrix(12, "bf16", "bf16")], 4, machine)).toEqual([
    expect.stringMatching(/^the weights are 12\.0 GiB and there are 8\.0 GiB of memory: they will be read from disk/),
  ]);
});

test("copies that do not fit are rejected, with a remedy", () => {
  expect(() => warningsFor([matrix(16, "bf16", "int8")], 4, machine)).toThrow(
    /^converting the weights takes 8\.3 GiB of memory, and 6\.0 GiB are free; write the model in that format first \(mixtape quantize\)/,
  );
});

test("more threads than cores give a warning", () => {
  expect(warningsFor([], 16, machine)).toEqual(["16 threads on 4 cores: they wait for each other; 4 would be faster"]);
});

test("a model with more threads than this machine has cores gives the same answers", async () => {
  const warnings: string[] = [];
  const threads = physicalCores() + 3;
  const crowded = await AutoModelForCausalLM.from_pretrained("default", { threads, warning_callback: (w) => warnings.push(w) });
  const usual = await AutoModelForCausalLM.from_pretrained("default");
  const options = { input_ids: [[300, 301, 302]], max_new_tokens: 8, do_sample: false };
  expect(await crowded.generate(options)).toEqual(await usual.generate(options));
  expect(warnings).toEqual([expect.stringMatching(new RegExp(`^${threads} threads on ${threads - 3} core`))]);
  await Promise.all([crowded.dispose(), usual.dispose()]);
});
