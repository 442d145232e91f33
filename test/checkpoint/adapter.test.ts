/** PEFT's adapter folders: fields, selection by PEFT's rules, both layouts of routed experts, and errors that name the tensor. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { adaptersIn, adaptersOf, openAdapter, readAdapter, selectedExperts, writeAdapter } from "../../src/checkpoint/adapter.ts";
import { type AdapterConfig, adapterAt, parseAdapterConfig } from "../../src/checkpoint/lora.ts";
import { readHeader, readTensor } from "../../src/checkpoint/safetensors.ts";
import { type TensorData, writeSafetensors } from "../../src/checkpoint/writer.ts";
import { readConfig } from "../../src/model/config.ts";
import { type Adapters, ernie } from "../../src/model/ernie.ts";
import type { Model, ModelParameter } from "../../src/model/model.ts";
import { elements } from "../../src/tensor/shape.ts";
import { noise } from "../backend/builder.ts";
import { GOLDENS } from "../goldens.ts";
import { scratch } from "./craft.ts";

const folder = scratch();
let count = 0;
const fresh = () => join(folder, `${count++}`);
const lora = (fields: Record<string, unknown>): AdapterConfig => parseAdapterConfig(fields, "LoraConfig");
const model = (variant: string, adapters: Adapters | null): Model =>
  ernie(readConfig(JSON.parse(readFileSync(join(GOLDENS, variant, "config.json"), "utf8"))), adapters);
const ofAdapters = (m: Model): ModelParameter[] => m.parameters.filter((p) => p.kind === "adapter");
const modulesOf = (m: Model) =>
  m.parameters.filter((p) => p.kind === "matrix").map(({ name, experts }) => ({ name: name.replace(/\.weight$/, ""), experts }));
const read = async (variant: string, path: string) => {
  const adapter = await openAdapter(path);
  return readAdapter(adapter, ofAdapters(model(variant, adaptersIn(adapter))));
};

/** Writes a folder as PEFT would. */
async function craft(config: Record<string, unknown>, tensors: Record<string, { shape: number[]; values: Float32Array }>): Promise<string> {
  const path = fresh();
  mkdirSync(path);
  writeFileSync(join(path, "adapter_config.json"), JSON.stringify({ peft_type: "LORA", ...config }));
  const data = Object.entries(tensors).map(
    ([name, { shape, values }]): TensorData => ({
      name: `base_model.model.${name}`,
      dtype: "F32",
      shape,
      data: new Uint8Array(values.buffer),
    }),
  );
  await writeSafetensors(join(path, "adapter_model.safetensors"), data);
  return path;
}
const tensor = (...shape: number[]) => ({ shape, values: noise(elements(shape), shape[0]) });

describe("selection", () => {
  test.each([
    [{ target_modules: ["q_proj"] }, "model.layers.1.self_attn.q_proj", true],
    [{ target_modules: ["proj"] }, "model.layers.1.self_attn.q_proj", false],
    [{ target_modules: ["self_attn.q_proj"] }, "model.layers.1.self_attn.q_proj", true],
    [{ target_modules: ".*layers\\.[12]\\..*q_proj" }, "model.layers.2.self_attn.q_proj", true],
    [{ target_modules: ".*layers\\.[12]\\..*q" }, "model.layers.2.self_attn.q_proj", false], // PEFT matches whole names
    [{ target_modules: "all-linear" }, "model.layers.1.mlp.experts.3.up_proj", true],
    [{ target_modules: "all-linear" }, "lm_head", false],
    [{ target_modules: "all-linear", exclude_modules: ["o_proj"] }, "model.layers.1.self_attn.o_proj", false],
    [{ target_modules: ["q_proj"], layers_to_transform: [2] }, "model.layers.2.self_attn.q_proj", true],
    [{ target_modules: ["q_proj"], layers_to_transform: 2 }, "model.layers.1.self_attn.q_proj", false],
    [{ target_modules: ["up_proj"], layers_to_transform: [1] }, "model.layers.2.mlp.experts.1.up_proj", false], // the layer, not the expert
    [{ target_modules: ["q_proj"], layers_to_transform: [2], layers_pattern: "blocks" }, "model.layers.2.self_attn.q_proj", false],
    [{ target_parameters: ["mlp.experts.gate_up_proj"] }, "model.layers.1.mlp.experts.3.up_proj", true],
    [{ target_parameters: ["mlp.experts.gate_up_proj"] }, "model.layers.1.mlp.experts.3.down_proj", false],
    [{ target_parameters: ["mlp.gate.weight"] }, "model.layers.1.mlp.gate", true],
    [{ target_modules: ["q_proj"], modules_to_save: ["self_attn"] }, "model.layers.1.self_attn.q_proj", false],
  ])("%j: %s is %s", (fields, module, selected) => {
    expect(adapterAt(lora(fields), module) !== null).toBe(selected);
  });

  test("rank, alpha and rsLoRA's scale follow the patterns", () => {
    const config = lora({
      r: 8,
      lora_alpha: 16,
      target_modules: ["q_proj", "k_proj"],
      target_parameters: ["experts.down_proj"],
      rank_pattern: { "layers\\.1\\.self_attn\\.q_proj": 4, "experts.down_proj": 2 },
      alpha_pattern: { k_proj: 1 },
    });
    expect(adapterAt(config, "model.layers.0.self_attn.q_proj")).toEqual({ rank: 8, scale: 2, dropout: 0 });
    expect(adapterAt(config, "model.layers.1.self_attn.q_proj")).toEqual({ rank: 4, scale: 4, dropout: 0 });
    expect(adapterAt(config, "model.layers.1.self_attn.k_proj")?.scale).toBe(1 / 8);
    expect(adapterAt(config, "model.layers.1.mlp.experts.0.down_proj")).toMatchObject({ rank: 2, scale: 8 });
    expect(adapterAt(lora({ ...config, use_rslora: true }), "model.layers.0.self_attn.q_proj")?.scale).toBeCloseTo(16 / Math.sqrt(8), 12);
  });

  test("experts of a layer must agree, and a selection of some is known", () => {
    const some = lora({ target_modules: ".*experts\\.[13]\\.up_proj" });
    expect(selectedExperts(some, { name: "model.layers.1.mlp.experts.up_proj", experts: 8 })).toEqual([1, 3]);
    const differ = lora({ target_modules: ["up_proj"], rank_pattern: { "experts.3.up_proj": 2 } });
    expect(() => adaptersOf(differ).at({ name: "model.layers.1.mlp.experts.up_proj", experts: 8 })).toThrow(/experts of model\.layers\.1/);
  });
});

describe("fields", () => {
  test.each([
    [{ peft_type: "IA3" }, /peft_type is "IA3"/],
    [{ bias: "all" }, /bias is "all", which is not supported/],
    [{ fan_in_fan_out: true }, /fan_in_fan_out is true/],
    [{ use_qalora: true }, /use_qalora is true/],
    [{ layer_replication: [[0, 4]] }, /layer_replication is \[\[0,4\]\]/],
    [{ rank: 8 }, /rank is 8, which is not supported; supported are r,/],
    [{ r: 0 }, /r is 0; expected a whole number of at least 1/],
    [{ lora_dropout: 1 }, /lora_dropout is 1; expected a number from 0 up to 1/],
    [{ init_lora_weights: "pissa" }, /init_lora_weights is "pissa"/],
    [{ target_modules: "(" }, /'\(' is not a regular expression/],
    [{ target_modules: "q_proj", layers_to_transform: [1] }, /layers_to_transform needs target_modules to be a list/],
    [[], /not a JSON object/],
  ])("%j is refused", (fields, message) => {
    expect(() => parseAdapterConfig(fields, "adapter_config.json")).toThrow(message);
  });
});

describe("folders", () => {
  test.each(["moe-tiny", "dense-tiny"])("a folder of PEFT's reads, and is written equal (%s)", async (variant) => {
    const source = join(GOLDENS, variant, "lora-final");
    const adapter = await openAdapter(source);
    const built = model(variant, adaptersIn(adapter));
    const values = await readAdapter(adapter, ofAdapters(built));
    const out = fresh();
    await writeAdapter(
      out,
      adapter.config,
      ofAdapters(built).map((p) => ({ ...p, values: values.get(p.name) as Float32Array })),
      modulesOf(built),
    );
    const [a, b] = [await readHeader(join(source, "adapter_model.safetensors")), await readHeader(join(out, "adapter_model.safetensors"))];
    expect([...b.tensors.keys()].sort()).toEqual([...a.tensors.keys()].sort());
    for (const [name, entry] of a.tensors) {
      const written = b.tensors.get(name);
      expect(written?.shape).toEqual(entry.shape);
      expect(await readTensor(written as typeof entry)).toEqual(await readTensor(entry));
    }
    const json = (at: string) => JSON.parse(readFileSync(join(at, "adapter_config.json"), "utf8"));
    for (const field of ["r", "lora_alpha", "target_modules", "peft_type", "bias", "use_rslora", "rank_pattern"])
      expect(json(out)[field], field).toEqual(json(source)[field]);
  });

  test("routed experts are written as one pair each, without those that are zero, and read back", async () => {
    const config = lora({ r: 3, lora_alpha: 3, target_modules: ".*layers\\.2\\.mlp\\.experts\\.[15]\\.(up|down)_proj" });
    const built = model("moe-tiny", adaptersOf(config));
    const parameters = ofAdapters(built).map((p) => {
      const values = noise(elements(p.shape), 7);
      const each = values.length / 8;
      for (const e of [0, 2, 3, 4, 6, 7]) values.fill(0, e * each, (e + 1) * each);
      return { ...p, values };
    });
    expect(parameters).toHaveLength(4);
    const out = fresh();
    await writeAdapter(out, config, parameters, modulesOf(built));
    const { tensors } = await readHeader(join(out, "adapter_model.safetensors"));
    expect(tensors.get("base_model.model.model.layers.2.mlp.experts.5.down_proj.lora_B.weight")?.shape).toEqual([64, 3]);
    expect(tensors.size).toBe(2 * 2 * 2);
    const values = await read("moe-tiny", out);
    for (const p of parameters) expect(values.get(p.name), p.name).toEqual(p.values);
  });

  test("a selection that PEFT would read otherwise is written by name", async () => {
    const config = lora({ r: 2, target_parameters: ["experts.down_proj"], target_modules: ["q_proj"] });
    const built = model("moe-tiny", adaptersOf(config));
    const out = fresh();
    const values = ofAdapters(built).map((p) => ({ ...p, values: noise(elements(p.shape), 3) }));
    await writeAdapter(out, config, values, modulesOf(built));
    const written = JSON.parse(readFileSync(join(out, "adapter_config.json"), "utf8"));
    expect(written.target_parameters).toEqual([]);
    expect(written.target_modules).toHaveLength(4 + 3 * 8); // down_proj alone would select the shared experts' too
    expect(written.target_modules).toContain("model.layers.3.mlp.experts.7.down_proj");
    expect((await read("moe-tiny", out)).size).toBe(values.length);
  });

  /** PEFT 0.21: A [r * experts, in], B [out, r * experts], `einsum("o r e, e r i -> e o i")`; before 0.19 `-> e i o`. */
  test.each([true, false])("fused experts read as PEFT multiplies them (A has the width of the inputs: %s)", async (swapped) => {
    const [E, r, hidden, width] = [8, 2, 64, 32];
    const at = "model.layers.1.mlp.experts";
    const pair = (into: number, out: number) =>
      swapped ? [tensor(r * E, into), tensor(out, r * E)] : [tensor(r * E, out), tensor(into, r * E)];
    const [gateUp, down] = [pair(hidden, 2 * width), pair(width, hidden)];
    const path = await craft(
      {
        r,
        lora_alpha: 4,
        target_modules: null,
        target_parameters: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        peft_version: swapped ? "0.21.0" : "0.18.0",
      },
      {
        [`${at}.base_layer.lora_A.weight`]: gateUp[0],
        [`${at}.base_layer.lora_B.weight`]: gateUp[1],
        [`${at}.lora_A.weight`]: down[0],
        [`${at}.lora_B.weight`]: down[1],
      },
    );
    const values = await read("moe-tiny", path);
    expect(values.size).toBe(6);
    const delta = ([a, b]: typeof gateUp, e: number, row: number, column: number) => {
      const [w, v] = swapped ? [row, column] : [column, row]; // w: of B, v: of A
      let sum = 0;
      for (let i = 0; i < r; i++) sum += b.values[w * r * E + i * E + e] * a.values[(e * r + i) * a.shape[1] + v];
      return sum;
    };
    for (const [which, into, out, fused, skip] of [
      ["gate", hidden, width, gateUp, 0],
      ["up", hidden, width, gateUp, width],
      ["down", width, hidden, down, 0],
    ] as const) {
      const a = values.get(`${at}.${which}_proj.lora_A.weight`) as Float32Array;
      const b = values.get(`${at}.${which}_proj.lora_B.weight`) as Float32Array;
      for (const e of [0, 5])
        for (const [row, column] of [
          [0, 0],
          [out - 1, 3],
          [7, into - 1],
        ]) {
          let sum = 0;
          for (let i = 0; i < r; i++) sum += b[(e * out + row) * r + i] * a[(e * r + i) * into + column];
          expect(sum, `${which} ${e} ${row} ${column}`).toBeCloseTo(delta([...fused], e, row + skip, column), 5);
        }
    }
  });

  test("an adapter of another base is refused by the tensor's name, before anything is read", async () => {
    await expect(read("dense-tiny", join(GOLDENS, "moe-tiny", "lora-final"))).rejects.toThrow(
      /layers\.\d\.self_attn\.\w+\.lora_[AB]\.weight \[?.*(has the shape \[.*\], but the base model implies \[|has no place in the base model)/,
    );
    await expect(read("moe-tiny", join(GOLDENS, "dense-tiny", "lora-final"))).rejects.toThrow(/belongs to another base/);
  });

  test("a missing half, a wrong rank and tensors that are not supported are named", async () => {
    const q = "model.layers.0.self_attn.q_proj";
    const one = { target_modules: [q], r: 4 };
    const pair = { [`${q}.lora_A.weight`]: tensor(4, 64), [`${q}.lora_B.weight`]: tensor(128, 4) };
    await expect(read("dense-tiny", await craft(one, { [`${q}.lora_A.weight`]: tensor(4, 64) }))).rejects.toThrow(
      /tensor base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight is missing/,
    );
    await expect(read("dense-tiny", await craft({ ...one, r: 8 }, pair))).rejects.toThrow(
      /has the shape \[4,64\], of rank 4, but .* implies rank 8/,
    );
    const bias = await craft(one, { ...pair, [`${q}.lora_B.bias`]: tensor(128) });
    await expect(openAdapter(bias)).rejects.toThrow(/lora_B\.bias: .* not supported/);
    const empty = fresh();
    mkdirSync(empty);
    await expect(openAdapter(empty)).rejects.toThrow(/has no adapter_config\.json/);
    cpSync(join(GOLDENS, "moe-tiny", "lora-init", "adapter_config.json"), join(empty, "adapter_config.json"));
    await expect(openAdapter(empty)).rejects.toThrow(/has no adapter_model\.safetensors/);
    const nan = { shape: [4, 64], values: new Float32Array(256).fill(Number.NaN) };
    await expect(read("dense-tiny", await craft(one, { ...pair, [`${q}.lora_A.weight`]: nan }))).rejects.toThrow(
      /lora_A\.weight holds NaN/,
    );
  });
});
