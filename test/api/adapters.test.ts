/** Adapters in the library: PEFT's folders, scaled, stacked, mixed and switched, in the same steps. */
import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { readBranches } from "../../src/api/adapters.ts";
import { AutoModelForCausalLM, type CausalLM, type PretrainedOptions } from "../../src/api/model.ts";
import { writeSafetensors } from "../../src/checkpoint/writer.ts";
import { openGoldens, relativeError } from "../goldens.ts";

const open: CausalLM[] = [];
const folders: string[] = [];
afterEach(async () => {
  await Promise.all(open.splice(0).map((m) => m.dispose()));
  await Promise.all(folders.splice(0).map((f) => rm(f, { recursive: true })));
});

async function load(variant = "moe-tiny", options: PretrainedOptions = {}) {
  const goldens = await openGoldens(variant);
  const model = await AutoModelForCausalLM.from_pretrained(goldens.folder, {
    dtype: "fp32",
    threads: 2,
    kv_cache_tokens: 2048,
    ...options,
  });
  open.push(model);
  return { model, goldens, lora: (which: string) => join(goldens.folder, `lora-${which}`) };
}

/** A copy of an adapter folder, changed. */
async function changed(folder: string, change: (at: string, config: Record<string, unknown>) => Promise<void> | void): Promise<string> {
  const at = await mkdtemp(join(tmpdir(), "mixtape-adapter-"));
  folders.push(at);
  await cp(folder, at, { recursive: true });
  const file = join(at, "adapter_config.json");
  const config = JSON.parse(await readFile(file, "utf8"));
  await change(at, config);
  await writeFile(file, JSON.stringify(config));
  return at;
}

/** The rows that the recorded adapter was trained on. */
async function batch(goldens: Awaited<ReturnType<typeof openGoldens>>): Promise<number[][]> {
  const { data } = await goldens.tensor("train.input_ids");
  return [[...data.subarray(0, 24)], [...data.subarray(24)]];
}

describe.each(["moe-tiny", "dense-tiny"])("%s", (variant) => {
  test("PEFT's adapter gives PEFT's logits, and the base alone does not", async () => {
    const { model, goldens, lora } = await load(variant);
    await model.load_adapter(lora("final"), { adapter_name: "final" });
    const input_ids = await batch(goldens);
    const expected = (await goldens.tensor("lora.final_logits")).data;
    expect(relativeError((await model.forward({ input_ids, adapter: "final" })).logits.data, expected)).toBeLessThan(1e-4);
    expect(relativeError((await model.forward({ input_ids })).logits.data, expected)).toBeGreaterThan(0.1);
    model.set_adapter("final");
    expect(relativeError((await model.forward({ input_ids })).logits.data, expected)).toBeLessThan(1e-4);
    expect(relativeError((await model.forward({ input_ids, adapter: null })).logits.data, expected)).toBeGreaterThan(0.1);
  });
});

test("set_adapter, generate({ adapter }) and delete_adapter switch, and unknown names list what there is", async () => {
  const { model, goldens, lora } = await load();
  const input_ids = [await goldens.ids(33)];
  const options = { input_ids, max_new_tokens: 12 };
  const base = await model.generate(options);
  await model.load_adapter(lora("final"), { adapter_name: "final" });
  await model.load_adapter(lora("init"));
  expect(model.adapter_names).toEqual(["final", "default"]);
  expect(await model.generate(options)).toEqual(base); // as in PEFT, loading does not activate
  const tuned = await model.generate({ ...options, adapter: "final" });
  expect(tuned).not.toEqual(base);
  model.set_adapter("final");
  expect(model.active_adapter).toBe("final");
  expect(await model.generate(options)).toEqual(tuned);
  expect(await model.generate({ ...options, adapter: null })).toEqual(base);
  expect(await model.generate({ ...options, adapter: "default" })).not.toEqual(tuned);
  expect(await Promise.all([model.generate(options), model.generate({ ...options, adapter: null })])).toEqual([tuned, base]);
  await expect(model.generate({ ...options, adapter: "nosuch" })).rejects.toThrow("there is no adapter 'nosuch'; there are final, default");
  expect(() => model.set_adapter("nosuch")).toThrow("there is no adapter 'nosuch'; there are final, default");
  model.delete_adapter("final");
  expect(model.active_adapter).toBeNull();
  expect(await model.generate(options)).toEqual(base);
  expect(() => model.delete_adapter("final")).toThrow("there is no adapter 'final'; there are default");
});

test("scales and weights: cat is exactly the weighted sum, linear is PEFT's, and wrong ones are refused", async () => {
  const { model, goldens, lora } = await load();
  const input_ids = [await goldens.ids(33)];
  const of = async (adapter: string | null) => (await model.forward({ input_ids, adapter })).logits.data;
  await model.load_adapter(lora("final"), { adapter_name: "a" });
  await model.load_adapter(lora("final"), { adapter_name: "half", scale: 0.5 });
  await model.load_adapter(lora("final"), { adapter_name: "off", scale: 0 });
  const [a, half, base] = [await of("a"), await of("half"), await of(null)];
  expect(relativeError(await of("off"), base)).toBeLessThan(1e-6);
  expect(relativeError(half, a)).toBeGreaterThan(1e-2);
  const make = (names: string[], weights: number[], combination_type: "cat" | "linear" = "cat") =>
    model.add_weighted_adapter(names, weights, { adapter_name: "made", combination_type });
  await make(["a", "a"], [0.75, -0.25]);
  expect(relativeError(await of("made"), half)).toBeLessThan(1e-5);
  await make(["half", "off", "half"], [0.5, 3, 1.5]);
  expect(relativeError(await of("made"), a)).toBeLessThan(1e-5);
  // (sqrt(0.25) + sqrt(0.25))^2 = 1: the mixed terms make of two quarters a whole
  await make(["a", "a"], [0.25, 0.25], "linear");
  expect(relativeError(await of("made"), a)).toBeLessThan(1e-5);
  await model.load_adapter(lora("final"), { adapter_name: "b" });
  await make(["a", "b"], [1, 1]); // rank 8
  await expect(model.add_weighted_adapter(["a", "made"], [1, 1], { adapter_name: "c", combination_type: "linear" })).rejects.toThrow(
    /needs one rank: \S+ has rank 4 in 'a' and 8 in 'made'; use 'cat'/,
  );
  await expect(make(["a"], [-1], "linear")).rejects.toThrow("takes no negative weight, and that of 'a' is one");
  await expect(make(["a"], [Number.NaN])).rejects.toThrow("a weight is NaN");
  await expect(make(["a"], [1, 2])).rejects.toThrow("1 adapters with 2 weights");
  await expect(make(["nosuch"], [1])).rejects.toThrow("there is no adapter 'nosuch'");
  await expect(model.load_adapter(lora("final"), { scale: Number.POSITIVE_INFINITY })).rejects.toThrow("scale is Infinity");
  await expect(model.load_adapter(lora("final"), { adapter_name: "a:b\n" })).rejects.toThrow('adapter_name is "a:b\\n"');
});

describe("folders that cannot be used are refused in one line, and the model goes on", () => {
  const broken: [string, (at: string, config: Record<string, unknown>) => Promise<void> | void, RegExp][] = [
    ["no config", (at) => rm(join(at, "adapter_model.safetensors")), /has no adapter_model.safetensors/],
    ["not a safetensors file", (at) => writeFile(join(at, "adapter_model.safetensors"), "rubbish"), /adapter_model.safetensors: /],
    [
      "cut off",
      async (at) => {
        const file = join(at, "adapter_model.safetensors");
        await writeFile(file, (await readFile(file)).subarray(0, -100));
      },
      /adapter_model.safetensors: /,
    ],
    ["DoRA", (_, config) => void Object.assign(config, { use_dora: true }), /is a DoRA adapter, which cannot share steps .*; merge it/],
    [
      "a whole embedding",
      async (at, config) => {
        Object.assign(config, { modules_to_save: ["embed_tokens"] });
        const tensor = { name: "base_model.model.model.embed_tokens.weight", dtype: "F32" as const, shape: [1], data: new Uint8Array(4) };
        await writeSafetensors(join(at, "adapter_model.safetensors"), [tensor]);
      },
      /replaces the module embed_tokens as a whole .*merge it/,
    ],
    ["another method", (_, config) => void Object.assign(config, { peft_type: "IA3" }), /peft_type is "IA3"; only LORA/],
    [
      "a rank that its tensors do not have",
      (_, config) => void Object.assign(config, { r: 9 }),
      /of rank 4, but adapter_config.json implies rank 9/,
    ],
  ];
  test.each(broken)("%s", async (_, change, message) => {
    const { model, goldens, lora } = await load();
    const folder = await changed(lora("final"), change);
    const failure = await model.load_adapter(folder).then(
      () => null,
      (error: Error) => error,
    );
    expect(failure?.message).toMatch(message);
    expect(failure?.message).not.toContain("\n");
    expect(failure?.message).not.toContain("internal");
    expect(model.adapter_names).toEqual([]);
    await model.load_adapter(lora("final"));
    expect(await model.generate({ input_ids: [await goldens.ids(7)], max_new_tokens: 2, adapter: "default" })).toHaveLength(1);
  });

  test("an adapter of another base, and one of a rank above the limit, before its numbers are read", async () => {
    const { model } = await load("moe-tiny", { max_lora_rank: 3 });
    const { lora: dense } = await load("dense-tiny");
    await expect(model.load_adapter(dense("final"))).rejects.toThrow(
      /layers.3.self_attn.q_proj.lora_A.weight is missing: .* belongs to another base/,
    );
    const { lora } = await load("moe-tiny");
    await expect(model.load_adapter(lora("final"))).rejects.toThrow(
      "an adapter of rank 4, and max_lora_rank is 3; raise it if memory allows",
    );
  });

  test("NaN among its numbers", async () => {
    const { model, lora } = await load();
    const folder = await changed(lora("final"), async (at) => {
      const branches = await readBranches(at, model.config, { rank: 64 });
      const tensors = [...branches].flatMap(([module, { rank, a, b }]) =>
        (["A", "B"] as const).map((half) => {
          const values = half === "A" ? a : b.slice();
          if (half === "B" && module.includes("layers.2.self_attn.v")) values[5] = Number.NaN;
          const shape = half === "A" ? [rank, a.length / rank] : [b.length / rank, rank];
          const data = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
          return { name: `base_model.model.${module}.lora_${half}.weight`, dtype: "F32" as const, shape, data };
        }),
      );
      await writeSafetensors(join(at, "adapter_model.safetensors"), tensors);
    });
    await expect(model.load_adapter(folder)).rejects.toThrow(/tensor \S*layers.2.self_attn.v_proj.lora_B.weight holds NaN, element 5/);
  });
});
