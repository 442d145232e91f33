/** What the tests of a device share: models on it, models on the CPU to compare with, and answers. `MIXTAPE_TEST_DEVICE` names another device than `cuda`. */
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { type LoadedModel, type LoadOptions, loadModel } from "../../src/api/load.ts";
import type { Engine } from "../../src/engine/engine.ts";
import { GREEDY } from "../../src/engine/sampling.ts";
import type { GeneratedToken, Request } from "../../src/engine/sequence.ts";

export const DEVICE = process.env["MIXTAPE_TEST_DEVICE"] || "cuda";
/** Whether it is a card, which has memory of its own. */
export const CARD = DEVICE.startsWith("cuda");
export const BUNDLED = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
/** Largest difference of logits, relative to the largest logit, where everything is float32. */
export const CLOSE = 2e-4;

const open = new Set<LoadedModel>();
after(async () => {
  for (const model of open) await model.engine.dispose();
});

/** A model on the device under test. Threads of a CPU: one, because spinning teams slow each other down. */
export async function load(folder: string, options: LoadOptions = {}): Promise<LoadedModel> {
  const model = await loadModel(folder, { dtype: "fp32", kv_cache_tokens: 8192, device: DEVICE, threads: 1, ...options });
  open.add(model);
  return model;
}

/** The same model on the CPU. */
export function loadOnCpu(folder: string, options: LoadOptions = {}): Promise<LoadedModel> {
  return load(folder, { ...options, device: "cpu" });
}

export async function dispose(...models: readonly LoadedModel[]): Promise<void> {
  for (const model of models) {
    open.delete(model);
    await model.engine.dispose();
  }
}

export async function tokens(engine: Engine, request: Partial<Request> & Pick<Request, "tokens">): Promise<GeneratedToken[]> {
  const found: GeneratedToken[] = [];
  for await (const token of engine.submit({ sampling: GREEDY, maxNewTokens: 24, ...request })) found.push(token);
  return found;
}

export async function answer(engine: Engine, request: Partial<Request> & Pick<Request, "tokens">): Promise<number[]> {
  return (await tokens(engine, request)).map(({ id }) => id);
}

/** The place of the largest number of each row. */
export function likeliest(logits: Float32Array, width: number): number[] {
  return Array.from({ length: logits.length / width }, (_, row) => {
    let best = 0;
    for (let i = 1; i < width; i++) if (logits[row * width + i] > logits[row * width + best]) best = i;
    return best;
  });
}

/** Waits for something that another thread finishes. */
export async function until(what: string, holds: () => boolean): Promise<void> {
  for (let turn = 0; !holds(); turn++) {
    if (turn === 500) throw new Error(`still not: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
