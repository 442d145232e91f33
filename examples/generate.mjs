// Continue a text, and inspect the model's routing. Run: node examples/generate.mjs [folder or hub id]
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer } from "mixtape";

const source = process.argv[2] ?? "default"; // the small bundled model
const tokenizer = await AutoTokenizer.from_pretrained(source);
const model = await AutoModelForCausalLM.from_pretrained(source);

// The whole text at once.
const inputs = tokenizer("To save a document"); // { input_ids: number[][], attention_mask: number[][] }
const outputs = await model.generate({ ...inputs, max_length: 30, do_sample: false });
console.log(tokenizer.decode(outputs[0], { skip_special_tokens: true }));

// An answer, streamed.
const chat = tokenizer.apply_chat_template([{ role: "user", content: "解释混合专家架构的优势" }], { add_generation_prompt: true });
await model.generate({ input_ids: [chat], streamer: new TextStreamer(tokenizer, { skip_prompt: true }), seed: 1 });

// Which experts computed the last token of the prompt?
const out = await model.forward({ ...inputs, output_router_logits: true });
for (const { layer, experts, weights } of out.router_logits) {
  const chosen = experts.dims[1];
  const list = [...experts.data.slice(-chosen)].map((e, i) => `${e} (${weights.data.at(i - chosen).toFixed(2)})`);
  console.log(`layer ${layer}: experts ${list.join(", ")}`);
}
await model.dispose();
