/**
 * What the bundled model is good for: forty questions of thirteen kinds, phrased as its training never phrased them, through its
 * chat template. It knows little, so a share of the answers may be wrong.
 */
import { readFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { AutoModelForCausalLM, AutoTokenizer, type CausalLM, type Tokenizer } from "../src/index.ts";
import { WORDS } from "../src/web/words.ts";

interface Question {
  readonly kind: string;
  /** User and assistant in turns; the last is the user's. */
  readonly turns: readonly string[];
  /** A right answer contains one of these, in either case. */
  readonly accept: readonly string[];
}

const questions: readonly Question[] = JSON.parse(readFileSync(new URL("fixtures/prompts.json", import.meta.url), "utf8"));

let tokenizer: Tokenizer;
let model: CausalLM;
beforeAll(async () => {
  tokenizer = await AutoTokenizer.from_pretrained("default");
  model = await AutoModelForCausalLM.from_pretrained("default", { threads: 1 }); // two wait for each other on a busy machine
});
afterAll(() => model?.dispose());

async function ask(...turns: readonly string[]): Promise<string> {
  const messages = turns.map((content, i) => ({ role: i % 2 === 0 ? "user" : "assistant", content }));
  const prompt = tokenizer.apply_chat_template(messages, { add_generation_prompt: true });
  const [ids] = await model.generate({ input_ids: [prompt], max_new_tokens: 128, do_sample: false, repetition_penalty: 1 });
  return tokenizer.decode(ids.slice(prompt.length), { skip_special_tokens: true });
}

test("at least 28 of 40 answers are right, greedily", async () => {
  const wrong: string[] = [];
  for (const { kind, turns, accept } of questions) {
    const answer = (await ask(...turns)).toLowerCase();
    if (!accept.some((part) => answer.includes(part.toLowerCase()))) wrong.push(`[${kind}] ${turns.at(-1)} -> ${answer}`);
  }
  expect(questions).toHaveLength(40);
  expect(questions.length - wrong.length, wrong.join("\n")).toBeGreaterThanOrEqual(28);
});

test.each([
  ["Hello", /^Hello!/],
  ["你好", /^你好/],
  ["Bonjour", /^Bonjour/],
  ["こんにちは", /^こんにちは/],
  // What the page suggests.
  [WORDS.demoExample1.en, /gate picks a few experts/],
  [WORDS.demoExample1.zh, /专家/],
  [WORDS.demoExample2.en, /Tokyo/],
  [WORDS.demoExample2.zh, /柏林/],
  [WORDS.demoExample3.en, /fox/],
  [WORDS.demoExample3.zh, /[一-鿿]{5}，[一-鿿]{5}。/],
  // What README and the documentation ask.
  ["What can you do?", /translate/],
  ["Who are you?", /mixtape/],
])("%s", async (question, answer) => {
  expect(await ask(question)).toMatch(answer);
});
