// Answers of the base model and of an adapter to a recipe's held-out rows, all in one batch.
// Run: node examples/compare.mjs FOLDER [adapter] (after `mixtape train recipe.yaml` in FOLDER, such as examples/intents)
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, openDataset } from "mixtape";
import { parse } from "yaml";

const [folder, adapter = join(folder, "run", "final")] = process.argv.slice(2);
const recipe = parse(readFileSync(join(folder, "recipe.yaml"), "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained(recipe.model);
const held = await openDataset(join(folder, recipe.eval_dataset), { ...recipe.data, tokenizer });
const model = await AutoModelForCausalLM.from_pretrained(recipe.model);
await model.load_adapter(adapter, { adapter_name: "tuned" });

// The prompt is what has no label; what follows is the answer that was wanted.
const rows = await Promise.all(Array.from({ length: held.length }, (_, i) => held.row(i)));
const starts = rows.map(({ labels }) => labels.findIndex((label) => label >= 0));
const prompts = rows.map(({ input_ids }, i) => input_ids.slice(0, starts[i]));
const text = (ids) => tokenizer.decode(ids, { skip_special_tokens: true }).trim();
const ask = async (name) => {
  const found = await model.generate({ input_ids: prompts, adapter: name, max_new_tokens: 60, do_sample: false });
  return found.map((ids, i) => text(ids.slice(starts[i])));
};
const [base, tuned] = await Promise.all([ask(null), ask("tuned")]);
const wanted = rows.map(({ input_ids }, i) => text(input_ids.slice(starts[i])));

const line = (answer) => answer.replace(/\s+/g, " ").slice(0, 120);
for (const [i, answer] of wanted.entries())
  console.log(`${line(text(prompts[i]))}\n  wanted: ${line(answer)}\n  base:   ${line(base[i])}\n  tuned:  ${line(tuned[i])}`);
const right = (answers) => answers.filter((answer, i) => answer === wanted[i]).length;
console.log(`as wanted: base ${right(base)} of ${wanted.length}, tuned ${right(tuned)}`);
await model.dispose();
await held.close();
