/** Adapter folders from strangers: whatever their bytes are, loading one ends in one line or in an adapter, and the model goes on. */
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";
import { temporary } from "../cli/run.ts";
import { openGoldens } from "../goldens.ts";

/** Of moe-tiny that adapters can have: attention, the dense layer, experts one by one, shared experts, routers, embedding and head. */
const MODULES = 4 * 4 + 3 + 3 * (8 * 3 + 3 + 1) + 2;

let model: CausalLM;
let source: string;
let tokens: number[];
beforeAll(async () => {
  const goldens = await openGoldens("moe-tiny");
  model = await AutoModelForCausalLM.from_pretrained(goldens.folder, { dtype: "fp32", threads: 1, kv_cache_tokens: 512 });
  source = join(goldens.folder, "lora-final");
  tokens = await goldens.ids(7);
});
afterAll(() => model.dispose());

function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Loads a folder. Returns the error, which must be one line and none of ours. */
async function attempt(folder: string): Promise<string | null> {
  try {
    await model.load_adapter(folder, { adapter_name: "strange" });
    return null;
  } catch (error) {
    const { message } = error as Error;
    expect(message).not.toContain("\n");
    expect(message).not.toMatch(/internal|is not a function|Cannot read/);
    expect(message.length).toBeLessThan(2000);
    return message;
  }
}

test.each(["adapter_model.safetensors", "adapter_config.json"])(
  "random changes of %s",
  async (name) => {
    const folder = join(temporary(), "adapter");
    cpSync(source, folder, { recursive: true });
    const original = readFileSync(join(source, name));
    const headerEnd = name.endsWith(".json") ? original.length : 8 + Number(original.readBigUInt64LE());
    const before = await model.generate({ input_ids: [tokens], max_new_tokens: 4 });
    const next = random(5);
    let refused = 0;
    for (let i = 0; i < 300; i++) {
      const bytes = Buffer.from(original);
      // Mostly in the header, where names, shapes and offsets are.
      for (let flips = 1 + Math.floor(next() * 4); flips > 0; flips--)
        bytes[Math.floor(next() * (next() < 0.8 ? headerEnd : bytes.length))] = Math.floor(next() * 256);
      const cut = next() < 0.1 ? Math.floor(next() * bytes.length) : bytes.length;
      writeFileSync(join(folder, name), bytes.subarray(0, cut));
      if ((await attempt(folder)) !== null) refused++;
    }
    expect(refused).toBeGreaterThan(100);
    expect(await model.generate({ input_ids: [tokens], max_new_tokens: 4 })).toEqual(before);
    writeFileSync(join(folder, name), original);
    expect(await attempt(folder)).toBeNull();
  },
  60_000,
);

test("a config whose rank or names are enormous costs no memory, and a few comparisons for each name and module", async () => {
  const folder = join(temporary(), "adapter");
  cpSync(source, folder, { recursive: true });
  const config = JSON.parse(readFileSync(join(source, "adapter_config.json"), "utf8"));
  const with_ = async (changes: object) => {
    writeFileSync(join(folder, "adapter_config.json"), JSON.stringify({ ...config, ...changes }));
    const compared = [vi.spyOn(RegExp.prototype, "test"), vi.spyOn(String.prototype, "endsWith")];
    const buffers = process.memoryUsage().arrayBuffers;
    const message = await attempt(folder);
    const comparisons = compared.reduce((sum, { mock }) => sum + mock.calls.length, 0);
    for (const spy of compared) spy.mockRestore();
    const names = Object.values(changes).reduce((sum, value) => sum + (typeof value === "object" ? Object.keys(value).length : 1), 0);
    expect(comparisons).toBeLessThan(4 * MODULES * (names + 50)); // 50: what the folder has without the changes
    expect(process.memoryUsage().arrayBuffers - buffers).toBeLessThan(2 ** 26);
    return message;
  };
  expect(await with_({ r: 2 ** 31 })).toContain("implies rank 2147483648");
  expect(await with_({ r: 1e300 })).toContain("r is 1e+300");
  expect(await with_({ rank_pattern: Object.fromEntries(Array.from({ length: 2000 }, (_, i) => [`layer${i}`, 2])) })).toBeNull();
  expect(await with_({ target_modules: new Array(100_000).fill("q_proj") })).toBeNull();
  expect(await with_({ lora_alpha: 1e308 })).toMatch(/lora_B times its scale, 2.5e\+307, exceeds what float32 holds/);
});
