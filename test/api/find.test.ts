/** Adapters by hub id: in the library, over the command line and on the server; and adapters given alone, with the base that they name. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test, vi } from "vitest";
import { AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, type CausalLM, PeftModel } from "../../src/index.ts";
import { adapterFolder } from "../adapterfolder.ts";
import { COMMIT, FakeHub } from "../checkpoint/fakehub.ts";
import { run, temporary, tinyModel } from "../cli/run.ts";
import { GOLDENS } from "../goldens.ts";
import { startHere } from "../server/start.ts";

const BUNDLED = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const PROMPT = "To save a document, press the key with";
const input_ids = [[5, 6, 7, 8, 9]];
const hub = new FakeHub();
beforeAll(() => hub.start());
afterAll(() => hub.stop());
beforeEach(() => {
  vi.stubEnv("HF_ENDPOINT", hub.endpoint);
  vi.stubEnv("HF_HUB_CACHE", temporary());
  vi.stubEnv("HF_HUB_OFFLINE", "0");
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await Promise.all(open.splice(0).map((each) => each.dispose()));
});

const open: { dispose(): Promise<void> }[] = [];
const kept = <T extends { dispose(): Promise<void> }>(each: T): T => {
  open.push(each);
  return each;
};
const options = { dtype: "fp32", threads: 1, kv_cache_tokens: 2048 } as const;
const logits = async (model: Pick<CausalLM, "forward">) => (await model.forward({ input_ids })).logits.data;

/** Puts an adapter on the hub, as org/model. */
async function publish(folder: string, base: string | null): Promise<void> {
  hub.reset();
  const config = JSON.parse(readFileSync(join(folder, "adapter_config.json"), "utf8"));
  hub.files.set("adapter_config.json", Buffer.from(JSON.stringify({ ...config, base_model_name_or_path: base })));
  hub.files.set("adapter_model.safetensors", readFileSync(join(folder, "adapter_model.safetensors")));
  hub.files.set("README.md", Buffer.from("# adapter"));
  hub.files.set("optimizer.pt", Buffer.from("pickle"));
}

test("a hub id is loaded as its folder is, from the cache the second time, at a revision, and without a base", async () => {
  const base = join(GOLDENS, "moe-tiny");
  const lora = join(base, "lora-final");
  await publish(lora, base);
  const model = kept(await AutoModelForCausalLM.from_pretrained(base, options));
  const expected = await logits(kept(await PeftModel.from_pretrained(model, lora)));
  expect(await logits(kept(await PeftModel.from_pretrained(model, "org/model")))).toEqual(expected);
  expect(hub.log.filter(({ server }) => server === "cdn")).toHaveLength(1);
  expect(hub.log.some(({ path }) => /README|optimizer/.test(path))).toBe(false);
  hub.log.length = 0;
  await model.load_adapter("org/model", { local_files_only: true });
  model.set_adapter("default");
  expect(await logits(model)).not.toEqual(expected.map(() => 0));
  const atRuntime = await logits(model);
  expect(hub.log).toEqual([]);
  await model.load_adapter(`org/model@${COMMIT}`, { adapter_name: "pinned" });
  model.set_adapter("pinned");
  expect(await logits(model)).toEqual(atRuntime);
  await expect(model.load_adapter("org/model@v9", { adapter_name: "old" })).rejects.toThrow("no revision v9 at");
  await expect(model.load_adapter("org/model", { cache_dir: temporary(), local_files_only: true })).rejects.toThrow(
    "no local folder has this name, and the cache has no revision main",
  );
  await expect(PeftModel.from_pretrained(model, "org/model", { revison: "main" } as never)).rejects.toThrow("did you mean 'revision'?");

  const alone = kept(await AutoModelForCausalLM.from_pretrained("org/model", options));
  expect([alone.folder, alone.active_adapter]).toEqual([base, "default"]);
  expect(await logits(alone)).toEqual(atRuntime);

  await publish(lora, join(base, "gone"));
  await expect(AutoModelForCausalLM.from_pretrained("org/model", { ...options, cache_dir: temporary() })).rejects.toThrow(
    /is an adapter of the base '.*gone', which was not found: .*no such folder.*; give the base by another name or path/,
  );
  await publish(lora, null);
  await expect(AutoModelForCausalLM.from_pretrained("org/model", { ...options, cache_dir: temporary() })).rejects.toThrow(
    "is an adapter that does not name its base (base_model_name_or_path)",
  );
  hub.files.delete("adapter_model.safetensors");
  hub.files.set("adapter_model.bin", Buffer.from("pickle"));
  await expect(model.load_adapter("org/model", { cache_dir: temporary() })).rejects.toThrow(
    "org/model: the repository has no adapter_model.safetensors (it has adapter_model.bin",
  );
}, 60_000);

test("an adapter of another base says which base it names", async () => {
  const lora = join(GOLDENS, "moe-tiny", "lora-final");
  await publish(lora, "shop/ERNIE-21B");
  const other = kept(await AutoModelForCausalLM.from_pretrained(join(GOLDENS, "dense-bias"), options));
  await expect(other.load_adapter("org/model")).rejects.toThrow(/the adapter belongs to another base: it names 'shop\/ERNIE-21B'$/);
  await expect(PeftModel.from_pretrained(other, "org/model")).rejects.toThrow("it names 'shop/ERNIE-21B'");
});

test("a classifier's adapter, and the tokenizer of an adapter that has none", async () => {
  const base = tinyModel();
  const classifier = kept(await AutoModelForSequenceClassification.from_pretrained(base, { ...options, num_labels: 3 }));
  const adapter = join(temporary(), "adapter");
  await kept(await PeftModel.create(classifier, { r: 2 })).save_pretrained(adapter);
  await publish(adapter, base);
  const alone = kept(await AutoModelForSequenceClassification.from_pretrained("org/model", options));
  const beside = kept(await AutoModelForSequenceClassification.from_pretrained(base, { ...options, adapter: "org/model" }));
  const expected = (await classifier.forward({ input_ids })).logits.data;
  for (const model of [alone, beside]) expect((await model.forward({ input_ids })).logits.data).toEqual(expected);
  const tokenizer = await AutoTokenizer.from_pretrained("org/model");
  expect(tokenizer.encode("abc")).toEqual((await AutoTokenizer.from_pretrained(base)).encode("abc"));
});

test("pull, generate, merge and serve take hub ids of adapters", async () => {
  const env = { HF_ENDPOINT: hub.endpoint, HF_HUB_CACHE: process.env.HF_HUB_CACHE as string, HF_HUB_OFFLINE: "0" };
  const folder = await adapterFolder(BUNDLED, 1);
  await publish(folder, "default");
  const pulled = await run(["pull", "org/model"], { env });
  expect(pulled.err).toMatch(/^fetched adapter_model\.safetensors /m);
  expect(readFileSync(join(pulled.out.trimEnd(), "adapter_config.json"))).toEqual(hub.files.get("adapter_config.json"));

  const generate = ["generate", PROMPT, "--greedy", "--max-new-tokens", "12", "--threads", "1"];
  const expected = (await run([...generate, "--adapter", folder])).out;
  expect((await run(generate)).out).not.toBe(expected);
  expect((await run([...generate, "--adapter", "org/model"], { env })).out).toBe(expected);
  expect((await run([...generate, "-m", "org/model"], { env })).out).toBe(expected);

  const base = tinyModel();
  const tiny = await adapterFolder(base, 2);
  const config = JSON.parse(readFileSync(join(tiny, "adapter_config.json"), "utf8"));
  writeFileSync(join(tiny, "adapter_config.json"), JSON.stringify({ ...config, base_model_name_or_path: base }));
  const given = await run(["generate", "abc", "--adapter", tiny, "--ids", "5,6,7", "--max-new-tokens", "2"].filter((a) => a !== "abc"));
  expect([given.code, given.err]).toEqual([0, expect.not.stringContaining("bundled")]); // on its own base, not on the bundled model
  const both = await run([...generate, "--adapter", tiny, "--adapter", "org/model"], { env });
  expect([both.code, both.err]).toEqual([1, expect.stringContaining("the adapters name different bases")]);
  const wrong = await run([...generate, "-m", "default", "--adapter", tiny]);
  expect([wrong.code, wrong.err]).toEqual([1, expect.stringContaining(`the adapter belongs to another base: it names '${base}'`)]);

  const merged = await run(["merge", "default", "org/model", join(temporary(), "merged")], { env });
  expect(merged.out).toMatch(/matrices merged/);
  const info = await run(["verify", folder]);
  expect([info.code, info.err]).toEqual([1, expect.stringContaining("is an adapter")]);

  const models = [{ name: "words", path: "default", kvCacheTokens: 4096, threads: 1, adapters: { shop: "org/model" } }];
  const whole = { name: "whole", path: "org/model", kvCacheTokens: 4096, threads: 1 };
  const { client } = await startHere({ models: [...models, whole] });
  const say = async (model: string) =>
    (await client.completions.create({ model, prompt: PROMPT, temperature: 0, max_tokens: 12 })).choices[0].text;
  const [plain, shop, own] = [await say("words"), await say("words:shop"), await say("whole")];
  expect(shop).not.toBe(plain);
  expect(own).toBe(shop);
  expect(shop.trim()).toBe(expected.trim());
}, 120_000);
