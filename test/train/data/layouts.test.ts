/** Each layout of rows, found by its columns or given, with columns mapped. */
import { expect, test } from "vitest";
import type { PreferenceExample } from "../../../src/train/data/example.ts";
import type { OpenOptions } from "../../../src/train/data/open.ts";
import { all, bundled, learnt, openFile } from "./files.ts";

const END = "<|end_of_sentence|>";
const PROMPT = "<|begin_of_sentence|>User: Translate.\nHello\nAssistant: ";

test.each<[string, object, Partial<OpenOptions>]>([
  [
    "messages",
    {
      messages: [
        { role: "user", content: "Translate.\nHello" },
        { role: "assistant", content: "Bonjour" },
      ],
    },
    {},
  ],
  ["messages as JSON text", { messages: '[{"role":"user","content":"Translate.\\nHello"},{"role":"assistant","content":"Bonjour"}]' }, {}],
  [
    "parts",
    {
      messages: [
        {
          role: "user",
          content: [
            { type: "text", text: "Translate." },
            { type: "text", value: "Hello" },
          ],
        },
        { role: "assistant", content: [{ type: "text", value: "Bonjour" }] },
      ],
    },
    {},
  ],
  [
    "ShareGPT",
    {
      conversations: [
        { from: "human", value: "Translate.\nHello" },
        { from: "gpt", value: "Bonjour" },
      ],
    },
    {},
  ],
  ["instruction", { instruction: "Translate.", input: "Hello", output: "Bonjour" }, {}],
  ["instruction without input", { instruction: "Translate.\nHello", input: "", output: "Bonjour" }, {}],
  [
    "mapped columns",
    { question: "Translate.\nHello", reply: "Bonjour", instruction: null },
    { columns: { instruction: "question", output: "reply" } },
  ],
  [
    "a layout given",
    { prompt: "Translate.\nHello", completion: "Bonjour" },
    { layout: "instruction", columns: { instruction: "prompt", output: "completion" } },
  ],
  [
    "prompt and completion as messages",
    { prompt: [{ role: "user", content: "Translate.\nHello" }], completion: [{ role: "assistant", content: "Bonjour" }] },
    {},
  ],
])("%s", async (_, row, options) => {
  const [example, ...more] = await all((await openFile("a.jsonl", [row], options)).rows());
  expect(more).toEqual([]);
  expect(bundled.decode(example.input_ids)).toBe(`${PROMPT}Bonjour${END}`);
  expect(learnt(bundled, example)).toEqual([`Bonjour${END}`]);
});

test("a system text and a history go in front; a system message of the row's own stays", async () => {
  const row = { instruction: "Now.", output: "Yes.", system: "Be kind.", history: [["Before?", "No."]] };
  const examples = await all((await openFile("a.jsonl", [row])).rows());
  expect(bundled.decode(examples[1].input_ids)).toBe(
    `<|begin_of_sentence|>Be kind.\nUser: Before?\nAssistant: No.${END}User: Now.\nAssistant: Yes.${END}`,
  );
  const messages = [
    { role: "system", content: "Own." },
    { role: "user", content: "Hi" },
    { role: "assistant", content: "Ho" },
  ];
  const [own] = await all((await openFile("a.jsonl", [{ messages, system: "Other." }])).rows());
  expect(bundled.decode(own.input_ids)).toContain("<|begin_of_sentence|>Own.\nUser: Hi");
});

test("an assistant that speaks first is read and not learnt", async () => {
  const messages = [
    { role: "assistant", content: "Welcome" },
    { role: "user", content: "Hi" },
    { role: "assistant", content: "Ho" },
  ];
  const examples = await all((await openFile("a.jsonl", [{ messages }])).rows());
  expect(examples.flatMap((example) => learnt(bundled, example))).toEqual([`Ho${END}`]);
});

test.each<[string, object]>([
  [
    "messages",
    {
      prompt: [{ role: "user", content: "Q" }],
      chosen: [{ role: "assistant", content: "Good" }],
      rejected: [{ role: "assistant", content: "Bad" }],
    },
  ],
  [
    "ShareGPT",
    { conversations: [{ from: "human", value: "Q" }], chosen: { from: "gpt", value: "Good" }, rejected: { from: "gpt", value: "Bad" } },
  ],
  ["instruction", { instruction: "Q", chosen: "Good", rejected: "Bad" }],
  [
    "the prompt in both",
    {
      chosen: [
        { role: "user", content: "Q" },
        { role: "assistant", content: "Good" },
      ],
      rejected: [
        { role: "user", content: "Q" },
        { role: "assistant", content: "Bad" },
      ],
    },
  ],
])("preferences, %s", async (_, row) => {
  const [example] = (await all((await openFile("a.jsonl", [row], { task: "preference" })).rows())) as unknown as PreferenceExample[];
  const end = bundled.convert_tokens_to_ids(END);
  expect(example).toEqual({
    prompt_ids: bundled.apply_chat_template([{ role: "user", content: "Q" }], { add_generation_prompt: true }),
    chosen_ids: [...bundled.encode("Good"), end],
    rejected_ids: [...bundled.encode("Bad"), end],
  });
});

test("preferences of texts, cut to the limit", async () => {
  const row = { prompt: "The sky is", chosen: " blue", rejected: ` green${" and green".repeat(20)}` };
  const [example] = (await all((await openFile("a.jsonl", [row], { task: "preference" })).rows())) as unknown as PreferenceExample[];
  expect(example).toEqual({
    prompt_ids: bundled.encode("The sky is"),
    chosen_ids: [...bundled.encode(" blue"), bundled.eos_token_id],
    rejected_ids: [...bundled.encode(row.rejected), bundled.eos_token_id],
  });
  const cut = await openFile("a.jsonl", [row], { task: "preference", max_length: 10, overflow: "truncate" });
  const [short] = (await all(cut.rows())) as unknown as PreferenceExample[];
  expect(short.rejected_ids).toEqual(example.rejected_ids.slice(0, 10 - example.prompt_ids.length));
  expect(cut.tokens(0)).toBe(10);
});

test.each<[string, object]>([
  ["chosen and rejected are the same", { prompt: "a", chosen: "b", rejected: "b" }],
  ["there is no prompt", { chosen: "b", rejected: "c" }],
  ["begin alike and end differently", { chosen: [{ role: "assistant", content: "b" }], rejected: [{ role: "assistant", content: "c" }] }],
  [
    "chosen must end with a message of the assistant",
    { prompt: [{ role: "user", content: "a" }], chosen: [{ role: "user", content: "b" }], rejected: "c" },
  ],
])("preferences that are none: %s", async (message, row) => {
  await expect(openFile("a.jsonl", [row], { task: "preference" })).rejects.toThrow(message);
});

test("classes: names by their characters, numbers by size, or the order given", async () => {
  const rows = [10, 9, 2, 10].map((label) => ({ text: `t ${label}`, label }));
  const numbers = await openFile("a.jsonl", rows, { task: "classification" });
  expect(numbers.labels).toEqual(["2", "9", "10"]);
  expect((await all(numbers.rows())).map(({ labels }) => labels)).toEqual([2, 1, 0, 2]);
  expect(numbers.statistics().labels).toEqual({ 2: 1, 9: 1, 10: 2 });
  const given = await openFile("a.csv", "text,label\na,no\nb,yes\n", { task: "classification", labels: ["yes", "no", "maybe"] });
  expect([given.labels, (await all(given.rows())).map(({ labels }) => labels)]).toEqual([
    ["yes", "no", "maybe"],
    [1, 0],
  ]);
});

test("several classes of a row, from lists or from a text; numbers to predict", async () => {
  const rows = [
    { text: "a", label: ["x", "z"] },
    { text: "b", label: [] },
    { text: "c", label: ["y"] },
  ];
  const data = await openFile("a.jsonl", rows, { task: "classification" });
  expect([data.problem, data.labels]).toEqual(["multi_label_classification", ["x", "y", "z"]]);
  expect((await all(data.rows())).map(({ labels }) => labels)).toEqual([
    [1, 0, 1],
    [0, 0, 0],
    [0, 1, 0],
  ]);
  const split = await openFile("a.csv", "text,label\na,x|z\nb,y\n", { task: "classification", label_separator: "|" });
  expect((await all(split.rows())).map(({ labels }) => labels)).toEqual([
    [1, 0, 1],
    [0, 1, 0],
  ]);
  const numbers = await openFile("a.csv", "text,label\na,0.5\nb,-2\n", { task: "classification", problem_type: "regression" });
  expect([numbers.labels, (await all(numbers.rows())).map(({ labels }) => labels)]).toEqual([null, [0.5, -2]]);
});
