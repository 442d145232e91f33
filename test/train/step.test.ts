/** What a training step keeps in memory, and in which formats it computes. */
import { describe, expect, test } from "vitest";
import { lowered } from "../../src/backend/cpu.ts";
import { plan } from "../../src/graph/plan.ts";
import { readConfig } from "../../src/model/config.ts";
import { type Adapters, ernie } from "../../src/model/ernie.ts";
import { PRESETS } from "../../src/model/presets.ts";
import type { Dtype } from "../../src/tensor/dtype.ts";
import { accumulatingStep, type StepOptions, trainingStep } from "../../src/train/step.ts";

const ROWS = 2048;
const ADAPTERS: Adapters = { at: ({ name }) => (/layers.*_proj$/.test(name) ? { rank: 16, scale: 2, dropout: 0 } : null) };

/** The plan of a LoRA step of the 0.3B shape. */
function planned(layers: number, options: Partial<StepOptions> = {}, dtype: Dtype = "f32", rows = ROWS) {
  const model = ernie(readConfig({ ...PRESETS["0.3b"], num_hidden_layers: layers }), ADAPTERS);
  const { graph } = trainingStep(model, {
    trains: (p) => p.kind === "adapter",
    dtypeOf: (name) => (/norm/.test(name) ? "f32" : dtype),
    ...options,
  });
  return plan(
    lowered(graph, () => true),
    { rows },
  );
}

const ops = (calls: readonly { op: string }[]) => new Set(calls.map((c) => c.op));
const MIB = 2 ** 20;

describe("the workspace of a step", () => {
  test("holds one layer's activations and what passes between layers, no logits of all rows and no scores", () => {
    const [few, many] = [planned(4), planned(18)];
    expect(many.arenaBytes).toBeLessThan(ROWS * 103424 * 2); // half of the logits
    expect(planned(18, {}, "f32", 2 * ROWS).arenaBytes).toBeLessThanOrEqual(2 * many.arenaBytes); // scores would grow with the square
    // Each further layer adds what remat keeps, its input: [rows, 1024]; and the gradients of its adapters, which are rank * (sides of 7 matrices).
    const kept = ROWS * 1024 * 4;
    const gradients = 16 * (2 * (1024 + 2048) + 2 * (1024 + 256) + 3 * (1024 + 3072)) * 4;
    expect((many.arenaBytes - few.arenaBytes) / 14).toBeLessThan(1.02 * (kept + gradients));
    expect(planned(18, { checkpointing: false }).arenaBytes).toBeGreaterThan(4 * many.arenaBytes);
  });

  test("twelve layers of the 21B shape leave less than 2 GiB", () => {
    const model = ernie(readConfig({ ...PRESETS["21b-a3b"], num_hidden_layers: 12, moe_layer_end_index: 11 }), ADAPTERS);
    const { graph } = trainingStep(model, {
      trains: (p) => p.kind === "adapter",
      dtypeOf: (name) => (/norm|gate\.weight|correction_bias/.test(name) ? "f32" : "int8"),
    });
    const { arenaBytes } = plan(
      lowered(graph, () => true),
      { rows: ROWS },
    );
    expect(arenaBytes).toBeLessThan(2048 * MIB);
  });
});

describe("the products of a step", () => {
  test("with matrices of floats are tiled, with int8 and int4 those of serving", () => {
    for (const dtype of ["f32", "f16", "bf16"] as const) {
      const found = ops(planned(2, {}, dtype).calls);
      expect(found).toContain("tiledLinear");
      for (const op of ["linear", "gatedLinear", "toBf16Pair", "castBf16"]) expect(found).not.toContain(op);
    }
    for (const dtype of ["int8", "int4"] as const) {
      const found = ops(planned(2, {}, dtype).calls);
      for (const op of ["linear", "toInt8", "linearT", "tiledLinear"]) expect(found).toContain(op); // the adapters' are float32
    }
  });

  test("take bfloat16 activations and gradients with `compute: bf16`, where the matrix is in bfloat16", () => {
    const { calls } = planned(2, { compute: "bf16" }, "bf16");
    const products = calls.filter((c) => /^(tiledLinear|linearT|outer|crossEntropy)/.test(c.op));
    expect(products.length).toBeGreaterThan(20);
    for (const { op, inputs } of products) expect(inputs[op === "crossEntropyGrad" ? 1 : 0].dtype, op).toBe("bf16");
    const mixed = planned(2, { compute: "bf16" }, "f32").calls.filter((c) => c.op === "tiledLinear");
    expect(new Set(mixed.map((c) => c.inputs[0].dtype))).toEqual(new Set(["f32", "bf16"]));
  });
});

test("a step that accumulates keeps gradients in states of the parameters' shapes", () => {
  const model = ernie(readConfig({ ...PRESETS["0.3b"], num_hidden_layers: 1 }), ADAPTERS);
  const { gradients, update, trained } = accumulatingStep(model, { trains: (p) => p.kind === "adapter", dtypeOf: () => "f32", clip: 1 });
  expect(gradients.calls.filter((c) => c.op === "accumulate").length).toBe(trained.length);
  expect(update.calls.filter((c) => c.op === "clear").length).toBe(trained.length);
  expect(gradients.calls.some((c) => c.op === "adamw")).toBe(false);
  expect(() => accumulatingStep(model, { trains: () => false, dtypeOf: () => "f32" })).toThrow("no parameter of the model is selected");
});
