// A conversation in three lines. Run: node examples/pipeline.mjs [folder or hub id]
import { pipeline } from "mixtape";

const generator = await pipeline("text-generation", process.argv[2] ?? "default");
const messages = [{ role: "user", content: "写一首诗，题目是《春夜》。" }];
const [{ generated_text }] = await generator(messages, { max_new_tokens: 60, seed: 7 });
console.log(generated_text.at(-1).content);
await generator.dispose();
