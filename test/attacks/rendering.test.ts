/**
 * Conversations that are large in every way: the work of rendering them grows with their size alone, and a template that drops a part
 * is found however large they are, whatever users write.
 */
import { Template } from "@huggingface/jinja";
import { afterEach, expect, test, vi } from "vitest";
import { encodePrompt, type Prompt } from "../../src/chat/prompt.ts";
import { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { ernieConfig, ernieTemplate, fixtureFolder } from "../tokenizer/folders.ts";

afterEach(() => vi.restoreAllMocks());

const CALLS = `{%- for c in m.tool_calls or [] %}<tool_call>{{ (c.function or c).name }}{{ (c.function or c).arguments | tojson }}</tool_call>{%- endfor %}`;
/** Takes tools, and writes everything. */
const COMPLETE = `{{ tools | tojson }}{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}${CALLS}{%- endfor %}`;

const open = (chat_template: string) =>
  Tokenizer.open(fixtureFolder("ernie.json", "tokenizer.json", { "tokenizer_config.json": { ...ernieConfig, chat_template } }));

type Messages = Extract<Prompt, { kind: "chat" }>["messages"];
const chat = (messages: Messages): Prompt => ({
  kind: "chat",
  messages,
  tools: [{ name: "f", parameters: {} }],
  toolChoice: "auto",
  oneToolCall: false,
  templateVariables: {},
});
const call = (i: number) => ({ id: `c${i}`, type: "function", function: { name: "f", arguments: `{"n":${i},"s":"x"}` } });
const list = <T>(n: number, of: (i: number) => T) => Array.from({ length: n }, (_, i) => of(i));

const SHAPES: readonly (readonly [string, (n: number) => Messages])[] = [
  ["tiny messages", (n) => list(n, (i) => ({ role: i % 2 ? "assistant" : "user", content: "a" }))],
  [
    "calls and results",
    (n) =>
      list(n, (i) => [
        { role: "assistant", content: "", tool_calls: [call(i)] },
        { role: "tool", content: "1" },
      ]).flat(),
  ],
  [
    "calls of one message",
    (n) => [
      { role: "user", content: "go" },
      { role: "assistant", content: "", tool_calls: list(n, call) },
    ],
  ],
  ["parts of one message", (n) => [{ role: "user", content: list(n, () => ({ type: "text", text: "a" })) }]],
];

test.each(
  [ernieTemplate, COMPLETE].flatMap((template, t) =>
    SHAPES.map(([shape, make]) => ({ shape, of: t ? "a template of tools" : "ERNIE", template, make })),
  ),
)("$shape, rendered by $of: work grows with their number", async ({ template, make }) => {
  const tokenizer = await open(template);
  const original = Template.prototype.render;
  const work = (n: number) => {
    let [renderings, characters] = [0, 0];
    const spy = vi.spyOn(Template.prototype, "render").mockImplementation(function (this: Template, ...args) {
      const text = original.apply(this, args);
      renderings++;
      characters += text.length;
      return text;
    });
    const start = performance.now();
    encodePrompt(tokenizer, chat(make(n)));
    spy.mockRestore();
    return { renderings, characters, ms: performance.now() - start };
  };
  const [ten, hundred, thousand] = [work(10), work(100), work(1000)];
  expect([hundred.renderings, thousand.renderings]).toEqual([ten.renderings, ten.renderings]);
  expect(thousand.renderings).toBeLessThanOrEqual(3);
  expect(thousand.characters).toBeLessThan(15 * hundred.characters);
  expect(thousand.ms).toBeLessThan(3000); // 27 s when each call was rendered by itself
});

test("a million characters that look like marks cost no more than others", async () => {
  const tokenizer = await open(ernieTemplate);
  const time = (content: string) => {
    const start = performance.now();
    tokenizer.apply_chat_template([{ role: "user", content }], { tokenize: false });
    return performance.now() - start;
  };
  time("a");
  expect(time(`probe${"x".repeat(2 ** 20)}`)).toBeLessThan(50 + 10 * time(`qrobe${"y".repeat(2 ** 20)}`));
});

const thousand = list(1000, (i) => ({ role: i % 2 ? "assistant" : "user", content: `${i}` }));
const calls = { role: "assistant", content: "e", tool_calls: list(100, call) };
const each = (body: string) => `{% for m in messages %}${body}{% endfor %}`;

test.each<readonly [what: string, template: string, messages: Messages, error: string]>([
  [
    "the last of many messages",
    each("{% if loop.index0 < 999 %}{{ m.content }}{% endif %}"),
    thousand,
    "message 999 (assistant): its content",
  ],
  [
    "all of a role",
    ernieTemplate,
    thousand.map((m, i) => ({ ...m, role: i === 500 ? "tool" : "user" })),
    "message 500 (tool): its content",
  ],
  [
    "what says the same as another",
    each("{% if not loop.first %}{{ m.content }}{% endif %}"),
    [
      { role: "user", content: "e" },
      { role: "user", content: "e" },
    ],
    "message 0 (user): its content",
  ],
  [
    "a part",
    each("{{ m.content[0].text }}{% for p in m.content %}{% endfor %}"),
    [
      {
        role: "user",
        content: [
          { type: "text", text: "a" },
          { type: "text", text: "a" },
        ],
      },
    ],
    "message 0 (user): its content",
  ],
  ["all calls", each("{{ m.content }}"), [calls], "message 0 (assistant): its tool calls"],
  [
    "all calls but the first",
    each("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"),
    [calls],
    "message 0 (assistant): its tool calls",
  ],
  [
    "the arguments of calls",
    each("{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"),
    [calls],
    "message 0 (assistant): the arguments of its tool calls",
  ],
  [
    "the text beside calls",
    each("{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"),
    [calls],
    "message 0 (assistant): its content",
  ],
])("finds that a template drops %s", async (_what, chat_template, messages, error) => {
  const tokenizer = await open(ernieTemplate);
  const options = { tokenize: false, chat_template } as const;
  const spy = vi.spyOn(Template.prototype, "render");
  expect(() => tokenizer.apply_chat_template(messages, options)).toThrow(`the chat template drops ${error} would be lost`);
  expect(spy.mock.calls.length).toBeLessThanOrEqual(20);
});

test("a template may rewrite texts, but not so many that a loss could hide among them", async () => {
  const tokenizer = await open(ernieTemplate);
  const render = (messages: Messages, chat_template: string) => tokenizer.apply_chat_template(messages, { tokenize: false, chat_template });
  expect(render(thousand, each("{{ m.content | upper }}"))).toMatch(/^0123/);
  expect(render(thousand, each("{{ m.content[:60] }}"))).toMatch(/^0123/);
  expect(render(thousand.slice(0, 9), each("{{ m.content | length }}"))).toBe("1".repeat(9));
  const spy = vi.spyOn(Template.prototype, "render");
  expect(() => render(thousand, each("{{ m.content | length }}"))).toThrow("so that it cannot be told whether it keeps them");
  expect(() => render(thousand, each("{% if loop.last %}{{ m.content }}{% endif %}"))).toThrow("drops message 0 (user)");
  expect(spy.mock.calls.length).toBeLessThan(40);
});
