/** The memory of a card: given back when a model goes, whatever ended it; and what happens where it does not suffice. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { describe, test } from "node:test";
import { fileURLToPath } from "node:url";
import { cardOf } from "../../src/api/device.ts";
import type { Backend, State } from "../../src/backend/backend.ts";
import { cudaSystem } from "../../src/backend/cuda/cuda.ts";
import { BLOCK_TOKENS } from "../../src/engine/blocks.ts";
import { openGoldens } from "../goldens.ts";
import { answer, BUNDLED, CARD, DEVICE, dispose, load, until } from "./device.ts";

/** What drivers and other processes may take or give meanwhile. */
const SLACK = 64e6;
const free = () => cudaSystem().cards[cardOf(DEVICE)].free;
const index = fileURLToPath(new URL("../../src/index.ts", import.meta.url));

/** Takes all memory of a card but some bytes, which the driver needs for a second model. */
function fill(backend: Backend, left: number): State[] {
  const taken: State[] = [];
  for (let bytes = backend.memory().free - left; bytes >= 2 ** 20; bytes = Math.min(bytes / 2, backend.memory().free - left))
    try {
      taken.push(backend.state("f32", [Math.floor(bytes / 4)]));
    } catch {
      // try half of it
    }
  return taken;
}

describe("memory of a card", { skip: !CARD && `the device is ${DEVICE}` }, () => {
  test("models that are disposed of give all of it back", async () => {
    await dispose(await load(BUNDLED, { dtype: "bf16" })); // what the driver keeps for the process is taken now
    const before = free();
    for (const dtype of ["fp32", "bf16", "int8", "int4"]) {
      const model = await load(BUNDLED, { dtype, kv_cache_tokens: 65_536 });
      await Promise.all(Array.from({ length: 20 }, (_, i) => answer(model.engine, { tokens: [1, 100 + i, 200 + i] })));
      assert.ok(free() < before);
      await dispose(model);
    }
    await until(`${before} bytes are free`, () => free() >= before - SLACK);
  });

  test("a process that is killed leaves none behind", async () => {
    const before = free();
    const code = `
      const { AutoModelForCausalLM } = await import(${JSON.stringify(index)});
      const model = await AutoModelForCausalLM.from_pretrained("default", { device: ${JSON.stringify(DEVICE)}, dtype: "fp32", kv_cache_tokens: 1e6 });
      await model.generate({ input_ids: [[1, 2, 3]], max_new_tokens: 4 });
      process.stdout.write("running");
      for (;;) await model.generate({ input_ids: [[1, 2, 3]], max_new_tokens: 1000 });`;
    const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", code], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    await once(child.stdout, "data");
    assert.ok(free() < before - 1e9);
    child.kill("SIGKILL");
    await once(child, "exit");
    await until("the memory is back", () => free() >= before - SLACK);
  });

  test("a cache that does not fit: one line with figures, and the memory is back", async () => {
    const before = free();
    const goldens = await openGoldens("moe-tiny");
    const small = await load(goldens.folder, { kv_cache_tokens: 2048 });
    const { kvBytesPerToken } = small.engine;
    const tokens = Math.ceil((2 * cudaSystem().cards[cardOf(DEVICE)].total) / kvBytesPerToken / BLOCK_TOKENS) * BLOCK_TOKENS;
    await assert.rejects(load(goldens.folder, { kv_cache_tokens: tokens }), {
      message: /^out of memory on the GPU: \d+\.\d+ GB needed, \d+\.\d+ GB of \d+\.\d+ GB free$/,
    });
    assert.deepEqual(await answer(small.engine, { tokens: await goldens.ids(7) }), goldens.greedy[7]);
    await dispose(small);
    await until("the memory is back", () => free() >= before - SLACK);
  });

  test("weights that do not fit: one line with figures, before anything is read", async () => {
    const goldens = await openGoldens("moe-tiny");
    const model = await load(goldens.folder);
    const taken = fill(model.backend, 256e6);
    try {
      await assert.rejects(load(goldens.folder), {
        message:
          /^device 'cuda(:\d+)?': out of memory: \d+\.\d GB are needed with this model's weights, \d+\.\d GB of \d+\.\d GB are free; /,
      });
    } finally {
      for (const state of taken) state.dispose();
    }
    assert.deepEqual(await answer(model.engine, { tokens: await goldens.ids(7) }), goldens.greedy[7]);
    await dispose(model);
  });

  test("a step that needs more than there is fails with figures, and the engine lives on", async () => {
    const model = await load(BUNDLED, { dtype: "bf16" });
    const prompt = Array.from({ length: 2000 }, (_, i) => 1000 + ((i * 7919) % 18_000));
    const taken = fill(model.backend, 0);
    try {
      // The first step takes its workspace, and there is none.
      await assert.rejects(answer(model.engine, { tokens: prompt }), { message: /^out of memory on the GPU: .+ needed, .+ free/ });
    } finally {
      for (const state of taken) state.dispose();
    }
    const later = await answer(model.engine, { tokens: prompt });
    assert.equal(model.engine.cache.free, model.engine.cache.count);
    await dispose(model);
    const fresh = await load(BUNDLED, { dtype: "bf16" });
    assert.deepEqual(later, await answer(fresh.engine, { tokens: prompt }));
    await dispose(fresh);
  });
});
