import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeEach, describe, expect, test } from "vitest";
import { type BlockMatrix, blockMetadata } from "../../src/checkpoint/blocks.ts";
import { type Checkpoint, openCheckpoint } from "../../src/checkpoint/checkpoint.ts";
import { CheckpointError } from "../../src/checkpoint/error.ts";
import { locate, type Parameter } from "../../src/checkpoint/names.ts";
import { readTensor } from "../../src/checkpoint/safetensors.ts";
import { blockBytes } from "../../src/tensor/quantized.ts";
import { GOLDENS, get, type Stored, scratch, writeTensors } from "./craft.ts";

const [E, I, H] = [3, 4, 2];
const MLP = "model.layers.1.mlp";
const BIAS = `${MLP}.moe_statics.e_score_correction_bias`;
const NORM: Parameter = { name: "model.norm.weight", shape: [H] };
const ASKED: readonly Parameter[] = [
  NORM,
  { name: `${MLP}.gate.weight`, shape: [E, H] },
  { name: BIAS, shape: [1, E] },
  { name: `${MLP}.experts.gate_proj.weight`, shape: [E, I, H], experts: E },
  { name: `${MLP}.experts.up_proj.weight`, shape: [E, I, H], experts: E },
  { name: `${MLP}.experts.down_proj.weight`, shape: [E, H, I], experts: E },
];
const COMMON = { "model.norm.weight": [H], [`${MLP}.gate.weight`]: [E, H] };
const HUB: Record<string, readonly number[]> = { ...COMMON, [BIAS]: [1, E] };
for (let e = 0; e < E; e++) {
  Object.assign(HUB, { [`${MLP}.experts.${e}.down_proj.weight`]: [H, I], [`${MLP}.experts.${e}.gate_proj.weight`]: [I, H] });
  HUB[`${MLP}.experts.${e}.up_proj.weight`] = [I, H];
}
const FUSED: Record<string, readonly number[]> = {
  ...COMMON,
  [`${MLP}.gate.moe_statics.e_score_correction_bias`]: [1, E],
  [`${MLP}.experts.gate_up_proj`]: [E, 2 * I, H],
  [`${MLP}.experts.down_proj`]: [E, H, I],
};

const root = scratch();
let folder: string;
let count = 0;
beforeEach(() => {
  folder = join(root, String(count++));
  mkdirSync(folder);
  writeFileSync(join(folder, "config.json"), "{}");
});

async function checkpointOf(
  shapes: Record<string, readonly number[]>,
  dtypes: Record<string, string> = {},
  int8?: Map<string, BlockMatrix>,
): Promise<Checkpoint> {
  const stored = Object.entries(shapes).map(([name, shape]): [string, Stored] => [name, { dtype: dtypes[name] ?? "BF16", shape }]);
  writeTensors(join(folder, "model.safetensors"), Object.fromEntries(stored), int8 && blockMetadata(int8));
  return openCheckpoint(folder);
}

function faultOf(checkpoint: Checkpoint, asked: readonly Parameter[] = ASKED): string {
  try {
    locate(asked, checkpoint);
  } catch (error) {
    expect(error).toBeInstanceOf(CheckpointError);
    return (error as Error).message.replace(checkpoint.folder, "F");
  }
  throw new Error("located without a fault");
}

const without = <T>(from: Record<string, T>, name: string) => Object.fromEntries(Object.entries(from).filter(([key]) => key !== name));

describe("locate", () => {
  test("finds the hub's layout: one part per plain tensor, one per expert of stacked ones", async () => {
    const checkpoint = await checkpointOf(HUB);
    const { sources, unused } = locate(ASKED, checkpoint);
    expect([...sources.keys()]).toEqual(ASKED.map((p) => p.name));
    expect(unused).toEqual([]);
    const { file, offset, bytes } = get(checkpoint.tensors, "model.norm.weight");
    expect(get(sources, "model.norm.weight")).toEqual({ ...NORM, dtype: "bf16", parts: [{ file, offset, bytes }] });
    const up = get(sources, `${MLP}.experts.up_proj.weight`);
    expect(up.shape).toEqual([E, I, H]);
    expect(up.parts.map((p) => p.offset)).toEqual(
      [0, 1, 2].map((e) => get(checkpoint.tensors, `${MLP}.experts.${e}.up_proj.weight`).offset),
    );
    expect(up.parts.every((p) => p.bytes === I * H * 2)).toBe(true);
  });

  test("finds the fused layout: the gate's rows first, then the up rows, of every expert", async () => {
    const checkpoint = await checkpointOf(FUSED, { [`${MLP}.experts.gate_up_proj`]: "U8" });
    expect(faultOf(checkpoint)).toMatch(/gate_up_proj is stored as U8/);
    const { sources, unused } = locate(ASKED, await checkpointOf(FUSED));
    expect(unused).toEqual([]);
    expect(get(sources, BIAS).shape).toEqual([1, E]);
    const whole = get((await openCheckpoint(folder)).tensors, `${MLP}.experts.gate_up_proj`);
    const half = I * H * 2;
    const parts = (which: string) => get(sources, `${MLP}.experts.${which}_proj.weight`).parts;
    expect(parts("gate").map((p) => [p.offset - whole.offset, p.bytes])).toEqual([0, 2, 4].map((n) => [n * half, half]));
    expect(parts("up").map((p) => [p.offset - whole.offset, p.bytes])).toEqual([1, 3, 5].map((n) => [n * half, half]));
    const down = get((await openCheckpoint(folder)).tensors, `${MLP}.experts.down_proj`);
    expect(parts("down").map((p) => [p.offset - down.offset, p.bytes])).toEqual([0, 1, 2].map((n) => [n * half, half]));
    const bytes = await readTensor(whole);
    expect(await readTensor(parts("up")[1] as never)).toEqual(bytes.subarray(3 * half, 4 * half));
  });

  test("finds every tensor of a golden checkpoint", async () => {
    const checkpoint = await openCheckpoint(join(GOLDENS, "moe-tiny"));
    const experts = [1, 2, 3].flatMap((i): Parameter[] =>
      (["gate", "up", "down"] as const).map((which) => ({
        name: `model.layers.${i}.mlp.experts.${which}_proj.weight`,
        shape: which === "down" ? [8, 64, 32] : [8, 32, 64],
        experts: 8,
      })),
    );
    const plain = [...checkpoint.tensors.values()].filter(({ name }) => !name.includes(".experts."));
    const { sources, unused } = locate([...plain, ...experts], checkpoint);
    expect(sources.size).toBe(plain.length + 9);
    expect(unused).toEqual([]);
  });

  test("finds biases of experts in the hub's layout", async () => {
    const checkpoint = await checkpointOf({ [`${MLP}.experts.0.up_proj.bias`]: [I], [`${MLP}.experts.1.up_proj.bias`]: [I] });
    const name = `${MLP}.experts.up_proj.bias`;
    expect(get(locate([{ name, shape: [2, I], experts: 2 }], checkpoint).sources, name).parts).toHaveLength(2);
    expect(faultOf(checkpoint, [{ name, shape: [3, I], experts: 3 }])).toMatch(/experts.2.up_proj.bias is missing;/);
  });

  test("finds int8 matrices, plain and of experts", async () => {
    const block = blockBytes("int8", I, H);
    const names = Object.keys(HUB).filter((name) => /experts\.\d\.(gate|up)/.test(name));
    const shapes = { ...HUB, ...Object.fromEntries(names.map((name) => [name, [block]])) };
    const dtypes = Object.fromEntries(names.map((name) => [name, "U8"]));
    const checkpoint = await checkpointOf(
      shapes,
      dtypes,
      new Map(names.map((name) => [name, { dtype: "int8" as const, shape: [I, H] as const }])),
    );
    const { sources } = locate(ASKED, checkpoint);
    const gate = get(sources, `${MLP}.experts.gate_proj.weight`);
    expect(gate).toMatchObject({ dtype: "int8", shape: [E, I, H] });
    expect(gate.parts.map((p) => p.bytes)).toEqual([block, block, block]);
    const swapped = ASKED.map((p) => (p.name.includes("up_proj") ? { ...p, shape: [E, H, I] } : p));
    expect(faultOf(checkpoint, swapped)).toMatch(/up_proj.weight has the shape \[4, 2\], but config.json implies \[2, 4\]/);
  });

  test("skips what is known to be superfluous, and lists the rest", async () => {
    const superfluous = { "model.mtp_block.0.mlp.up_proj.weight": [2], "model.mtp_emb_norm.0.weight": [2], "lm_head.weight": [9] };
    const checkpoint = await checkpointOf({
      ...HUB,
      ...superfluous,
      "model.layers.0.self_attn.rotary_emb.inv_freq": [4],
      odd: [1],
      "model.odd.weight": [1],
    });
    expect(locate(ASKED, checkpoint).unused).toEqual(["odd", "model.odd.weight"]);
  });

  test("leaves out an optional tensor that is not there, but checks one that is", async () => {
    const checkpoint = await checkpointOf(HUB);
    const absent: Parameter = { name: "model.absent.bias", shape: [2], optional: true };
    expect(locate([...ASKED, absent], checkpoint).sources.has("model.absent.bias")).toBe(false);
    expect(faultOf(checkpoint, [{ ...NORM, shape: [5], optional: true }])).toMatch(/shape/);
  });
});

describe("one clear error for", () => {
  test("a missing tensor, with how many more", async () => {
    expect(faultOf(await checkpointOf(without(HUB, "model.norm.weight")))).toBe(
      "F: tensor model.norm.weight is missing; the files are incomplete, or config.json belongs to another model",
    );
    expect(faultOf(await checkpointOf({ "model.norm.weight": [H] }))).toMatch(
      /^F: tensor .*gate.weight is missing \(and 4 more of the model's tensors\);/,
    );
  });

  test("a missing expert", async () => {
    const name = `${MLP}.experts.1.up_proj.weight`;
    expect(faultOf(await checkpointOf(without(HUB, name)))).toMatch(`F: tensor ${name} is missing;`);
  });

  test("a missing correction bias", async () => {
    expect(faultOf(await checkpointOf(without(HUB, BIAS)))).toBe(
      `F: the correction bias ${BIAS} is missing: routing would be wrong without it, so the checkpoint is rejected`,
    );
  });

  test("another shape", async () => {
    expect(faultOf(await checkpointOf({ ...HUB, [BIAS]: [E] }))).toBe(
      `F: tensor ${BIAS} has the shape [3], but config.json implies [1, 3]`,
    );
    expect(faultOf(await checkpointOf({ ...HUB, [`${MLP}.experts.2.down_proj.weight`]: [I, H] }))).toMatch(
      /experts.2.down_proj.weight has the shape \[4, 2\]/,
    );
    expect(faultOf(await checkpointOf({ ...FUSED, [`${MLP}.experts.gate_up_proj`]: [E + 1, 2 * I, H] }))).toMatch(
      /gate_up_proj has the shape \[4, 8, 2\], but config.json implies \[3, 8, 2\]/,
    );
  });

  test("an unsupported dtype", async () => {
    expect(faultOf(await checkpointOf(HUB, { "model.norm.weight": "I64" }))).toBe(
      "F: tensor model.norm.weight is stored as I64; F32, F16, BF16 and mixtape's int8, int4 and fp8 are read",
    );
    const bytes = blockBytes("int8", I, H); // right in size, but nothing says that it is int8
    expect(faultOf(await checkpointOf({ ...HUB, "model.norm.weight": [H] }, { "model.norm.weight": "U8" }))).toMatch(/stored as U8/);
    expect(faultOf(await checkpointOf({ q: [bytes] }, { q: "U8" }), [{ name: "q", shape: [I, H] }])).toMatch(/shape \[1056\]/);
  });

  test("experts of several dtypes", async () => {
    expect(faultOf(await checkpointOf(HUB, { [`${MLP}.experts.2.up_proj.weight`]: "F32" }))).toMatch(
      /up_proj.weight: expert 0 is bf16, expert 2 is f32/,
    );
  });
});
