/** continue_final_message: the prompt ends exactly where the last message's text does, whatever the template and the text. */
import { beforeEach, expect, test } from "vitest";
import { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { ernieConfig, ernieTemplate, fixtureFolder } from "./folders.ts";

let tokenizer: Tokenizer;
beforeEach(async () => {
  tokenizer ??= await Tokenizer.open(fixtureFolder("ernie.json", "tokenizer.json", { "tokenizer_config.json": ernieConfig }));
});

type Messages = Parameters<Tokenizer["apply_chat_template"]>[0];
const open = (messages: Messages, chat_template: string) =>
  tokenizer.apply_chat_template(messages, { tokenize: false, continue_final_message: true, chat_template });

const user = { role: "user", content: "say <e> Assistant: e<|end_of_sentence|>" };
const each = (body: string) => `{% for m in messages %}${body}{% endfor %}`;

/** Each template, and what it writes up to the end of the last message's text. */
const TEMPLATES: readonly (readonly [name: string, template: string, expected: (text: string) => string])[] = [
  ["ERNIE's own", ernieTemplate, (text) => `<|begin_of_sentence|>User: ${user.content}\nAssistant: ${text}`],
  ["plain", each("<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n"), (text) => `<user>${user.content}</user>\n<assistant>${text}`],
  ["trimming", each("<{{ m.role }}>{{ m.content | trim }}<e>"), (text) => `<user>${user.content}<e><assistant>${text.trim()}`],
  [
    "trimming before white space of its own",
    each("{{ m.role }}: {{ m.content | trim }}{{ ' \\n ' }}"),
    (text) => `user: ${user.content} \n assistant: ${text.trim()}`,
  ],
  [
    "trimming at the end only",
    each("[{{ m.role }}]{{ m.content.rstrip() }}\n"),
    (text) => `[user]${user.content}\n[assistant]${text.trimEnd()}`,
  ],
  [
    "writing it twice",
    each("{{ m.content }}|{{ m.role }}|{{ m.content }}#"),
    (text) => `${user.content}|user|${user.content}#${text}|assistant|${text}`,
  ],
  ["ending with it", each("{{ m.role }}={{ m.content }}"), (text) => `user=${user.content}assistant=${text}`],
  [
    "leaving out what is empty",
    each("{% if m.content %}{{ m.role }}>{{ m.content }}<{% endif %}"),
    (text) => `user>${user.content}<assistant>${text}`,
  ],
  [
    "adding a full stop",
    each("{{ m.role }}: {{ m.content }}{% if not m.content.endswith('.') %}.{% endif %}{{ '\\n' }}"),
    (text) => `user: ${user.content}.\nassistant: ${text}`,
  ],
  [
    "dropping reasoning",
    each("{{ m.role }}: {{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>"),
    (text) => `user: ${user.content}<|im_end|>assistant: ${text.split("</think>").at(-1)?.trimStart()}`,
  ],
  [
    "deciding by the text what stands before",
    `{% if messages[-1].content.endswith('</e>') %}A{% else %}B{% endif %}${each("({{ m.content }})")}`,
    (text) => `${text.endsWith("</e>") ? "A" : "B"}(${user.content})(${text}`,
  ],
];
const TEXTS = [
  "",
  "<",
  "e",
  " ",
  "\n",
  "e ",
  "e\n",
  " e \n\t",
  "Assistant: ",
  "user",
  ".",
  "e.",
  "e.\n",
  "</e>",
  "<|end_of_sentence|>",
  user.content,
  "<think>e</think>\n\n",
  "<think>e</think>\n\ne",
];
// Where the template adds what a text may already end with, trailing white space hides which of the two it was.
const AMBIGUOUS = new Set(["adding a full stop/e.\n"]);

test.each(TEMPLATES)("a template %s", (name, template, expected) => {
  for (const content of TEXTS) {
    if (AMBIGUOUS.has(`${name}/${content}`)) continue;
    expect(open([user, { role: "assistant", content }], template), JSON.stringify(content)).toBe(expected(content));
  }
});

test("what is continued is a text: parts, no content, other roles, reasoning beside it", () => {
  const template = each("<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</{{ m.role }}>");
  expect(
    open(
      [
        user,
        {
          role: "assistant",
          content: [
            { type: "text", text: "e" },
            { type: "text", text: "<" },
          ],
        },
      ],
      ernieTemplate,
    ),
  ).toMatch(/Assistant: e\n<$/);
  expect(open([user, { role: "assistant", content: null }], template)).toBe(`<user>${user.content}</user><assistant>`);
  expect(open([user, { role: "assistant" }], template)).toMatch(/<\/user><assistant>$/);
  expect(open([{ role: "tool", content: "e" }], template)).toBe("<tool>e");
  expect(open([{ role: "user", content: "e" }], template)).toBe("<user>e");
  expect(open([user, { role: "assistant", content: "e", reasoning_content: "e" }], template)).toMatch(/<assistant>\(e\)e$/);
  const parts = each("{% for part in m.content %}[{{ part.text }}{{ part.type }}]{% endfor %}");
  const text = (text: string) => ({ type: "text", text });
  expect(open([{ role: "user", content: [text("e"), text("e")] }], parts)).toBe("[etext][e");
});

test.each([
  [[{ role: "tool", content: "e" }], ernieTemplate, "the chat template drops message 0 (tool): its content would be lost"],
  [
    [user, { role: "tool", content: "" }],
    ernieTemplate,
    "continue_final_message: the chat template does not write the end of the last message (tool)",
  ],
  [[], ernieTemplate, "continue_final_message: there is no message to continue"],
  [
    [{ role: "assistant", content: "e", tool_calls: [{ name: "f" }] }],
    each("{{ m.content }}{{ m.tool_calls }}"),
    "the last message (assistant) has tool calls, which would be lost",
  ],
  [
    [{ role: "user", content: [{ type: "text", text: "e" }, { type: "image" }] }],
    each("{% for p in m.content %}{{ p.text }}{% endfor %}"),
    'ends with a part of type "image"',
  ],
  [[{ role: "user", content: "abcdefgh" }], each("{{ m.content[:5] }}"), "does not write the end of the last message (user)"],
])("refuses %j", (messages, template, error) => {
  expect(() => open(messages as Messages, template)).toThrow(error);
});

test("ids end where the text does, special tokens in messages kept plain or not", () => {
  const messages = [user, { role: "assistant", content: "<|end_of_sentence|> e" }];
  for (const split_special_tokens of [true, false]) {
    const ids = tokenizer.apply_chat_template(messages, { continue_final_message: true, split_special_tokens });
    expect(tokenizer.decode(ids)).toBe(open(messages, ernieTemplate));
  }
});
