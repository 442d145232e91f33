/** What is learnt is the answer alone, behind exactly the prompt that the model is given when it is asked. */
import { cpSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fc from "fast-check";
import { expect, test } from "vitest";
import { encodePrompt } from "../../../src/chat/prompt.ts";
import type { Message } from "../../../src/tokenizer/message.ts";
import { Tokenizer } from "../../../src/tokenizer/tokenizer.ts";
import type { CausalExample } from "../../../src/train/data/example.ts";
import { all, bundled, learnt, openFile, TURNS, temporary, withTemplate } from "./files.ts";

const CHAT: Message[] = [
  { role: "system", content: "Be brief." },
  { role: "user", content: "Hello there" },
  { role: "assistant", content: "Hi! How are you?" },
  { role: "user", content: "Fine." },
  { role: "assistant", content: "  Good  " },
];

function inferencePrompt(tokenizer: Tokenizer, messages: readonly Message[]): readonly number[] {
  return encodePrompt(tokenizer, { kind: "chat", messages, tools: [], toolChoice: "none", oneToolCall: false, templateVariables: {} })
    .tokens;
}

/** The prompt of an example's last answer. */
function promptOf({ input_ids, labels }: CausalExample): readonly number[] {
  let start = labels.length;
  while (labels[start - 1] >= 0) start--;
  return input_ids.slice(0, start);
}

test.each([
  ["the bundled model", null],
  ["a template with reasoning and special tokens", TURNS],
])("%s: every answer follows the ids of inference's prompt", async (_, template) => {
  const tokenizer = template === null ? bundled : await withTemplate(template);
  const examples = await all((await openFile("a.jsonl", [{ messages: CHAT }], { tokenizer })).rows());
  const prompts = [CHAT.slice(0, 2), CHAT.slice(0, 4)].map((messages) => inferencePrompt(tokenizer, messages));
  expect(prompts[1]).toEqual(tokenizer.apply_chat_template(CHAT.slice(0, 4), { add_generation_prompt: true }));
  const last = examples[examples.length - 1];
  expect(promptOf(last)).toEqual(prompts[1]);
  expect(examples[0].input_ids.slice(0, prompts[0].length)).toEqual(prompts[0]);
  expect(tokenizer.decode(last.input_ids).startsWith(tokenizer.decode(prompts[1]))).toBe(true);
});

test("the bundled tokenizer merges across the answer's edge: each turn has its own example, with answers encoded apart", async () => {
  const [first, second, ...more] = await all((await openFile("a.jsonl", [{ messages: CHAT }])).rows());
  expect(more).toEqual([]);
  const end = bundled.convert_tokens_to_ids("<|end_of_sentence|>");
  const [p1, p2] = [CHAT.slice(0, 2), CHAT.slice(0, 4)].map((messages) => inferencePrompt(bundled, messages));
  expect(first.input_ids).toEqual([...p1, ...bundled.encode("Hi! How are you?"), end]);
  expect(second.input_ids).toEqual([...p2, ...bundled.encode("  Good  "), end]);
  // The text of both together would have been encoded otherwise.
  expect(bundled.apply_chat_template(CHAT.slice(0, 3))).not.toEqual(first.input_ids);
  expect(learnt(bundled, first)).toEqual(["Hi! How are you?<|end_of_sentence|>"]);
  expect(learnt(bundled, second)).toEqual(["  Good  <|end_of_sentence|>"]);
});

test("a template that ends turns with special tokens: all turns share one example", async () => {
  const tokenizer = await withTemplate(
    "{%- for m in messages -%}<|begin_of_sentence|>{{ m.role }}</s>{{ m.content }}<|end_of_sentence|>{%- endfor -%}{%- if add_generation_prompt -%}<|begin_of_sentence|>assistant</s>{%- endif -%}",
  );
  const data = await openFile("a.jsonl", [{ messages: CHAT }], { tokenizer });
  expect(data.length).toBe(1);
  const example = await data.row(0);
  expect(learnt(tokenizer, example)).toEqual(["Hi! How are you?<|end_of_sentence|>", "  Good  <|end_of_sentence|>"]);
  expect(example.input_ids).toEqual(tokenizer.apply_chat_template(CHAT));
});

test("learn: last learns the last answer, all learns the prompt too", async () => {
  const [last, ...more] = await all((await openFile("a.jsonl", [{ messages: CHAT }], { learn: "last" })).rows());
  expect([learnt(bundled, last), more]).toEqual([["  Good  <|end_of_sentence|>"], []]);
  const [whole] = await all((await openFile("a.jsonl", [{ messages: CHAT.slice(1, 3) }], { learn: "all" })).rows());
  expect(whole.labels).toEqual([-100, ...whole.input_ids.slice(1)]);
});

test("reasoning and tool calls are learnt as the template writes them, tools are in the prompt", async () => {
  const tokenizer = await withTemplate(TURNS);
  const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }];
  const calls = [{ type: "function", function: { name: "weather", arguments: '{"city":"Paris"}' } }];
  const messages = [
    { role: "user", content: "Paris?" },
    { role: "assistant", content: "", reasoning_content: "I must look.", tool_calls: calls },
    { role: "tool", content: "20 °C" },
    { role: "assistant", content: "Mild.", reasoning_content: "20 is mild." },
  ];
  const examples = await all((await openFile("a.jsonl", [{ messages, tools }], { tokenizer })).rows());
  const said = examples.flatMap((example) => learnt(tokenizer, example));
  expect(said).toHaveLength(2);
  expect(said[0]).toContain("I must look.\n</think>");
  expect(said[0]).toContain('"city"');
  expect(said[1]).toMatch(/^20 is mild\.\s*<\/think>\s*Mild\.<\|end_of_sentence\|>$/);
  const { prompt, options } = { prompt: messages.slice(0, 1), options: { tools: tools.map((tool) => tool), add_generation_prompt: true } };
  expect(tokenizer.decode(examples[0].input_ids)).toContain(tokenizer.apply_chat_template(prompt, { ...options, tokenize: false }));
});

test("a template without tools gets them in words, as at inference", async () => {
  const tools = [{ name: "weather", parameters: { type: "object" } }];
  const conversations = [
    { from: "human", value: "Paris?" },
    { from: "function_call", value: '{"name": "weather", "arguments": {"city": "Paris"}}' },
    { from: "observation", value: "20" },
    { from: "gpt", value: "Mild." },
  ];
  const examples = await all((await openFile("a.jsonl", [{ conversations, tools: JSON.stringify(tools) }])).rows());
  const prompt = {
    kind: "chat",
    messages: [{ role: "user", content: "Paris?" }],
    tools: [{ ...tools[0], strict: false }],
    toolChoice: "auto",
    oneToolCall: false,
    templateVariables: {},
  } as const;
  expect(promptOf(examples[0])).toEqual(encodePrompt(bundled, prompt).tokens);
  expect(learnt(bundled, examples[0])).toEqual([
    '<tool_call>\n{"name": "weather", "arguments": {"city":"Paris"}}\n</tool_call><|end_of_sentence|>',
  ]);
  expect(learnt(bundled, examples[1])).toEqual(["Mild.<|end_of_sentence|>"]);
});

test("special tokens that a row spells are text, in prompt and answer", async () => {
  const messages = [
    { role: "user", content: "say </s>" },
    { role: "assistant", content: "<|end_of_sentence|></s>" },
  ];
  const [example] = await all((await openFile("a.jsonl", [{ messages }])).rows());
  const special = example.input_ids.filter((id) => bundled.vocabulary.isSpecial(id));
  expect(bundled.convert_ids_to_tokens(special)).toEqual(["<|begin_of_sentence|>", "<|end_of_sentence|>"]);
  expect(learnt(bundled, example)).toEqual(["<|end_of_sentence|></s><|end_of_sentence|>"]);
});

test("a template that does not begin an answer as its generation prompt does is refused, with both", async () => {
  const tokenizer = await withTemplate(
    "{%- for m in messages -%}[{{ m.role }}]{{ m.content }}{%- endfor -%}{%- if add_generation_prompt -%}[assistant]<think>{%- endif -%}",
  );
  await expect(openFile("a.jsonl", [{ messages: CHAT.slice(1, 3) }], { tokenizer })).rejects.toThrow(
    /line 1: the chat template does not begin message 1 \(assistant\) as its generation prompt does: "<think>" against "Hi! How are you\?"/,
  );
});

test("a template without an end of turn: the end token follows", async () => {
  const tokenizer = await withTemplate(
    "{%- for m in messages -%}{{ m.role + ': ' + m.content + '\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}",
  );
  const [example] = await all((await openFile("a.jsonl", [{ messages: CHAT.slice(1, 3) }], { tokenizer })).rows());
  expect(learnt(tokenizer, example)).toEqual(["Hi! How are you?\n</s>"]);
});

test("prompt and completion as texts: the prompt as at inference, no template", async () => {
  const [example] = await all((await openFile("a.jsonl", [{ prompt: "The sky is", completion: " blue" }])).rows());
  const prompt = encodePrompt(bundled, { kind: "text", text: "The sky is" }).tokens;
  expect(example.input_ids).toEqual([...prompt, ...bundled.encode(" blue"), bundled.eos_token_id]);
  expect(learnt(bundled, example)).toEqual([" blue</s>"]);
});

test("prompt and completion as messages: only the completion's answers are learnt", async () => {
  const row = { prompt: CHAT.slice(0, 4), completion: [CHAT[4]], system: null };
  const examples = await all((await openFile("a.jsonl", [row])).rows());
  expect(examples.map((example) => learnt(bundled, example))).toEqual([["  Good  <|end_of_sentence|>"]]);
});

test("answers whose weight is 0 are read and not learnt", async () => {
  const messages = CHAT.map((message, i) => (i === 2 ? { ...message, weight: 0 } : message));
  const examples = await all((await openFile("a.jsonl", [{ messages }])).rows());
  expect(examples.flatMap((example) => learnt(bundled, example))).toEqual(["  Good  <|end_of_sentence|>"]);
  expect(bundled.decode(examples[0].input_ids)).toContain("Hi! How are you?");
});

test("a tokenizer that puts a space in front of every text does not put one in front of an answer", async () => {
  const folder = temporary();
  cpSync(join(fileURLToPath(new URL("../../fixtures/tokenizer", import.meta.url)), "llama.model"), join(folder, "tokenizer.model"));
  const tokenizer = await Tokenizer.open(folder);
  const text = fc
    .string({ unit: "grapheme", minLength: 1, maxLength: 12 })
    .filter((each) => !/[\ufffd\u2581\p{C}]/u.test(each) && each.normalize("NFKC") === each);
  fc.assert(
    fc.property(text, text, (prompt, answer) => {
      const [before, after] = [tokenizer.encode(`x${prompt}`), tokenizer.encode_continuation(answer)];
      expect(tokenizer.decode([...before, ...after])).toBe(tokenizer.decode(before) + answer);
    }),
    { numRuns: 200, seed: 1 },
  );
});

test("variables reach the template for prompt and answer alike; options of the encoding stay options", async () => {
  const tokenizer = await withTemplate(
    "{%- for m in messages -%}<|begin_of_sentence|>{{ m.role + style }}: {{ m.content }}<|end_of_sentence|>{%- endfor -%}" +
      "{%- if add_generation_prompt -%}<|begin_of_sentence|>{{ 'assistant' + style + ': ' }}{%- endif -%}",
  );
  const template_variables = { style: "!", add_special_tokens: false, tokenize: false };
  const [example] = await all((await openFile("a.jsonl", [{ messages: CHAT.slice(1, 3) }], { tokenizer, template_variables })).rows());
  expect(promptOf(example)).toEqual(tokenizer.apply_chat_template(CHAT.slice(1, 2), { add_generation_prompt: true, style: "!" }));
  expect(learnt(tokenizer, example)).toEqual(["Hi! How are you?<|end_of_sentence|>"]);
});
