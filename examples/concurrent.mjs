// Concurrent prompts share the steps of one engine; this compares their time with running them one by one. Run: node examples/concurrent.mjs
import { AutoModelForCausalLM, AutoTokenizer } from "mixtape";

const tokenizer = await AutoTokenizer.from_pretrained("default");
const model = await AutoModelForCausalLM.from_pretrained("default");
const prompts = ["你好", "What is the capital of Japan?", "What do you get for 7 + 5?", "写一首诗，题目是《秋夜》。"];
const ids = prompts.map((content) => tokenizer.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true }));
const options = { max_new_tokens: 40, do_sample: false };

await model.generate({ input_ids: ids, ...options }); // warm-up: the first call compiles the programs
let start = performance.now();
const together = await model.generate({ input_ids: ids, ...options });
const atOnce = performance.now() - start;
start = performance.now();
for (const [i, prompt] of ids.entries()) {
  const [alone] = await model.generate({ input_ids: [prompt], ...options });
  if (String(alone) !== String(together[i])) throw new Error("an answer must be the same alone and in a batch");
}
console.log(`together ${atOnce.toFixed(0)} ms, one after another ${(performance.now() - start).toFixed(0)} ms`);
together.forEach((row, i) => {
  console.log(`${prompts[i]}\n  ${tokenizer.decode(row.slice(ids[i].length), { skip_special_tokens: true }).replaceAll("\n", "\n  ")}`);
});
await model.dispose();
