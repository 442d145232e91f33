/** An adapter from its first training step to requests: trained by the library, served by name beside its base, in steps with both. */
import { join } from "node:path";
import { expect, test } from "vitest";
import { AutoModelForCausalLM, AutoTokenizer, openDataset, PeftModel, Trainer } from "../../src/index.ts";
import { temporary } from "../cli/run.ts";
import { engineOf, startHere } from "./start.ts";

const ROWS = new URL("../../examples/style/train.jsonl", import.meta.url).pathname;
const messages = [{ role: "user" as const, content: "Where is my parcel?" }];
const ask = { messages, temperature: 0, max_tokens: 12 };

test("an adapter that was just trained is served beside its base; both in one batch are what each is alone", async () => {
  const folder = join(temporary(), "shop");
  const tokenizer = await AutoTokenizer.from_pretrained("default");
  const base = await AutoModelForCausalLM.from_pretrained("default", { threads: 1 });
  const data = await openDataset(ROWS, { tokenizer });
  const model = await PeftModel.create(base, { r: 4, lora_alpha: 8, target_modules: "all-linear" });
  const args = { output_dir: folder, max_steps: 5, per_device_train_batch_size: 8, learning_rate: 2e-3, save_strategy: "no" as const };
  const trainer = new Trainer({ model, args, train_dataset: data });
  await trainer.train();
  await model.save_pretrained(folder);
  const prompt = tokenizer.apply_chat_template(messages, { add_generation_prompt: true });
  const answer = async (of: typeof base | typeof model) => {
    const [ids] = await of.generate({ input_ids: [prompt], max_new_tokens: 12, do_sample: false });
    return tokenizer.decode(ids.slice(prompt.length), { skip_special_tokens: true });
  };
  const expected = { default: await answer(base), "default:shop": await answer(model) };
  expect(expected["default:shop"]).not.toBe(expected.default);
  trainer.dispose();
  await model.dispose();
  await base.dispose();
  await data.close();

  const { client, server } = await startHere({
    models: [{ name: "default", path: "default", kvCacheTokens: 32768, threads: 1, adapters: { shop: folder } }],
  });
  const content = async (name: string) => (await client.chat.completions.create({ ...ask, model: name })).choices[0].message.content;
  const alone = { default: await content("default"), "default:shop": await content("default:shop") };
  expect(alone).toEqual(expected);

  const engine = await engineOf({ server });
  const before = engine.stats();
  const names = ["default", "default:shop", "default:shop", "default"] as const;
  expect(await Promise.all(names.map(content))).toEqual(names.map((name) => alone[name]));
  const { steps, rows } = engine.stats();
  expect(rows - before.rows).toBeGreaterThan(2 * (steps - before.steps)); // they shared steps
});
