/** Templates with reasoning and tool calls: the events that given tokens produce, with an engine that replays them. */

import { cp, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { beforeAll, describe, expect, test } from "vitest";
import { AutoTokenizer } from "../../../src/api/tokenizer.ts";
import type { Prompt } from "../../../src/chat/prompt.ts";
import { encodePrompt } from "../../../src/chat/prompt.ts";
import { GREEDY } from "../../../src/engine/sampling.ts";
import type { Request } from "../../../src/engine/sequence.ts";
import { Grammars } from "../../../src/grammar/grammars.ts";
import { readConfig } from "../../../src/model/config.ts";
import type { NamedModel } from "../../../src/server/catalog.ts";
import { complete } from "../../../src/server/completion/complete.ts";
import { Encoder } from "../../../src/server/completion/encoder.ts";
import type { CompletionEvent, CompletionRequest } from "../../../src/server/completion/request.ts";
import { Meter } from "../../../src/server/meter.ts";
import type { Tokenizer } from "../../../src/tokenizer/tokenizer.ts";
import { scratch } from "../../checkpoint/craft.ts";

const SOURCE = fileURLToPath(new URL("../../../models/small-moe/", import.meta.url));
/** In the manner of ERNIE-4.5 `-Thinking`: turns between marks, tools described by the template, the prompt ends inside the reasoning. */
const THINKING = `{%- if tools %}<|im_start|>system
<tool_list>{{ tools | tojson }}</tool_list><|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif -%}`;

const folder = scratch();
let thinking: Tokenizer;
let plain: Tokenizer;
beforeAll(async () => {
  plain = await AutoTokenizer.from_pretrained("default");
  for (const file of ["tokenizer.json", "tokenizer_config.json"]) await cp(join(SOURCE, file), join(folder, file));
  const config = JSON.parse(await readFile(join(folder, "tokenizer_config.json"), "utf8"));
  await writeFile(join(folder, "tokenizer_config.json"), JSON.stringify({ ...config, chat_template: THINKING }));
  thinking = await AutoTokenizer.from_pretrained(folder);
});

/** A served model whose engine answers with these tokens; what it was asked is kept. */
async function replaying(tokenizer: Tokenizer, tokens: readonly number[]): Promise<{ model: NamedModel; asked: Request[] }> {
  const config = readConfig(JSON.parse(await readFile(join(SOURCE, "config.json"), "utf8")));
  const asked: Request[] = [];
  const engine = {
    cache: { count: 1000, free: 1000 },
    async *submit(request: Request) {
      asked.push(request);
      for (const [i, id] of tokens.slice(0, request.maxNewTokens).entries()) {
        const mask = (await request.constraint?.next()) ?? null;
        if (mask && !((mask[id >> 5] >>> (id & 31)) & 1)) throw new Error(`token ${i}, ${tokenizer.decode([id])}, is not allowed`);
        request.constraint?.accept(id);
        const finish = request.stopIds?.includes(id) ? "stop" : i + 1 === request.maxNewTokens ? "length" : undefined;
        yield { id, logprob: -1 - i, cachedTokens: i === 0 ? 3 : 0, ...(finish ? { finish } : {}) };
        if (finish) return;
      }
    },
  } as unknown as NamedModel["engine"];
  const grammars = new Grammars(tokenizer, config.vocabSize, config.eosTokenIds);
  const encoder = new Encoder(SOURCE, tokenizer);
  return { model: { name: "m", created: 0, config, tokenizer, engine, dtype: "bf16", encoder, grammars, defaults: {} }, asked };
}

const WEATHER = { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } };

function chat(more: Partial<Prompt & { kind: "chat" }> = {}): Prompt {
  return {
    kind: "chat",
    messages: [{ role: "user", content: "Hi" }],
    tools: [],
    toolChoice: "none",
    oneToolCall: false,
    templateVariables: {},
    ...more,
  };
}

async function answer(tokenizer: Tokenizer, text: string, prompt: Prompt, more: Partial<CompletionRequest> = {}) {
  const tokens = [...tokenizer.encode(text), 2];
  const { model, asked } = await replaying(tokenizer, tokens);
  const request: CompletionRequest = {
    prompt,
    sampling: GREEDY,
    maxTokens: null,
    stop: [],
    format: { kind: "text" },
    logprobs: null,
    routing: false,
    owner: "x",
    signal: new AbortController().signal,
    ...more,
  };
  const events: CompletionEvent[] = [];
  for await (const event of complete(model, request, { read() {}, wrote() {} })) events.push(event);
  const said = (channel: string) => events.flatMap((e) => (e.kind === "text" && e.channel === channel ? [e.text] : [])).join("");
  const calls: { id?: string; name?: string; arguments: string }[] = [];
  for (const event of events)
    if (event.kind === "toolCall") {
      const { index, kind: _kind, ...piece } = event;
      if (piece.id !== undefined) calls[index] = piece;
      else calls[index].arguments += event.arguments;
    }
  const end = events.at(-1);
  if (end?.kind !== "end") throw new Error("there is no end");
  return { reasoning: said("reasoning"), answer: said("answer"), calls, end, events, tokens, asked };
}

describe("reasoning", () => {
  test("is told apart, its tokens counted; the marks may be single tokens or text", async () => {
    const single = await answer(thinking, "one two\n</think>\n\nthree", chat());
    expect([single.reasoning, single.answer, single.end.reason]).toEqual(["one two", "three", "stop"]);
    const reasoned = thinking.encode("one two\n</think>").length;
    expect(single.end.usage).toMatchObject({ reasoningTokens: reasoned, completionTokens: single.tokens.length, cachedTokens: 3 });
    const text = await answer(thinking, "one two\n</think>\n<response>\nthree\n</response>", chat()); // <response> is no token here
    expect([text.reasoning, text.answer]).toEqual(["one two", "three"]);
  });

  test("that is not over when the tokens are is reasoning only", async () => {
    const { reasoning, answer: said, end } = await answer(thinking, "one two three four", chat(), { maxTokens: 3 });
    expect([reasoning.startsWith("one two"), said, end.reason]).toEqual([true, "", "length"]);
    expect(end.usage.reasoningTokens).toBe(3);
  });

  test("ends no answer by a stop string, and is not constrained", async () => {
    const stopped = await answer(thinking, "one STOP two</think>three STOP four", chat(), { stop: ["STOP"] });
    expect([stopped.reasoning, stopped.answer, stopped.end.reason]).toEqual(["one STOP two", "three ", "stop"]);
    const schema = { type: "object", properties: { a: { type: "integer" } }, required: ["a"] };
    const made = await answer(thinking, 'free {"text"</think>\n{"a": 12}', chat(), { format: { kind: "schema", schema } });
    expect([made.reasoning, made.answer]).toEqual(['free {"text"', '{"a": 12}']);
    await expect(answer(thinking, 'free</think>\n{"b"', chat(), { format: { kind: "schema", schema } })).rejects.toThrow("is not allowed");
  });

  test("is nothing to a template that knows none", async () => {
    const { reasoning, answer: said } = await answer(plain, "one </think> two", chat());
    expect([reasoning, said]).toEqual(["", "one  two"]); // a special token is no text
  });
});

describe("calls", () => {
  const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>';
  const auto = chat({ tools: [WEATHER], toolChoice: "auto" });

  test.each(["thinking", "plain"])("after text, with a %s template", async (which) => {
    const tokenizer = which === "plain" ? plain : thinking;
    const result = await answer(tokenizer, `${which === "plain" ? "" : "hm</think>\n"}I look.\n${CALL}\n${CALL}`, auto);
    expect([result.answer, result.end.reason]).toEqual(["I look.", "toolCalls"]);
    expect(result.calls.map(({ name, arguments: args }) => [name, JSON.parse(args)])).toEqual([
      ["weather", { city: "東京" }],
      ["weather", { city: "東京" }],
    ]);
    expect(new Set(result.calls.map((call) => call.id)).size).toBe(2);
    const pieces = result.events.flatMap((event) => (event.kind === "toolCall" && event.index === 0 ? [event.arguments] : []));
    expect(pieces).toHaveLength(1); // at once: until it is complete, nothing says that it is JSON
  });

  test("only the first where one is wanted", async () => {
    const { calls, end, asked, tokens } = await answer(plain, `${CALL}\n${CALL}`, { ...auto, oneToolCall: true } as Prompt);
    expect([calls.length, end.reason]).toEqual([1, "toolCalls"]);
    expect(end.usage.completionTokens).toBeLessThan(tokens.length);
    expect(asked[0].signal?.aborted).toBe(true);
  });

  test.each([
    ['<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', "stop"],
    ["<tool_call>no JSON</tool_call>", "stop"],
    ["<tool_call>", "stop"],
  ])("%j is text", async (text, reason) => {
    const { answer: said, calls, end } = await answer(plain, text, auto);
    expect([said, calls, end.reason]).toEqual([text, [], reason]);
  });

  test("cut off before its name is left out", async () => {
    const {
      answer: said,
      calls,
      end,
    } = await answer(plain, `ok ${CALL}`, auto, { maxTokens: plain.encode('ok <tool_call>\n{"na').length });
    expect([said, calls, end.reason]).toEqual(["ok", [], "length"]);
  });

  test("with marks and brackets in its texts is one call", async () => {
    const args = '{"city": "}</t\\"<tool_call>{", "more": [1, {"z": "]"}]}';
    const { calls } = await answer(plain, `<tool_call>{"name": "weather", "arguments": ${args}}</tool_call>`, auto);
    expect(calls.map((call) => call.arguments)).toEqual([args]);
  });

  test("cut off by the length are no calls: half of the arguments is no object", async () => {
    const { calls, end, answer: said } = await answer(plain, CALL, auto, { maxTokens: plain.encode(CALL).length - 16 });
    expect([calls, end.reason]).toEqual([[], "length"]);
    expect(said).toMatch(/^(<tool_call>.*)?$/s);
  });

  test("without tools are text", async () => {
    const { calls, answer: said } = await answer(plain, "<tool_call>x</tool_call>", chat());
    expect([calls, said]).toEqual([[], "x"]);
  });

  test("of a strict tool are held to its schema, of another not", async () => {
    const strict = chat({ tools: [{ ...WEATHER, strict: true }], toolChoice: "auto" });
    const wrong = CALL.replace("city", "town");
    expect((await answer(plain, `So: ${CALL}`, strict)).calls).toHaveLength(1);
    await expect(answer(plain, wrong, strict)).rejects.toThrow("is not allowed");
    expect((await answer(plain, wrong, auto)).calls[0].arguments).toBe('{"town": "東京"}');
  });
});

describe("prompts", () => {
  const conversation = [
    { role: "user", content: "Weather?" },
    {
      role: "assistant",
      content: null,
      tool_calls: [{ id: "1", type: "function", function: { name: "weather", arguments: '{"city":"Rome"}' } }],
    },
    { role: "tool", content: "sunny", tool_call_id: "1" },
  ];

  test("a template that takes tools gets them, and arguments as values", () => {
    const { tokens, insideReasoning } = encodePrompt(thinking, chat({ messages: conversation, tools: [WEATHER], toolChoice: "auto" }));
    const text = thinking.decode(tokens);
    expect(insideReasoning).toBe(true);
    expect(text).toContain('<tool_list>[{"type": "function", "function": {"name": "weather"');
    expect(text).toContain('{"name": "weather", "arguments": {"city": "Rome"}}');
    expect(text).toContain("<|im_start|>tool\nsunny");
  });

  test("for one that does not, they become text: nothing is lost", () => {
    const text = plain.decode(encodePrompt(plain, chat({ messages: conversation, tools: [WEATHER], toolChoice: "auto" })).tokens);
    for (const part of ['"name":"weather"', "<tool_list>", '{"name": "weather", "arguments": {"city":"Rome"}}', "<tool_output>\nsunny"])
      expect(text).toContain(part);
    expect(encodePrompt(plain, chat({ messages: conversation })).tokens.length).toBeGreaterThan(20);
  });

  test("variables are the template's alone: they do not replace it", () => {
    const own = { chat_template: "{% for i in range(10) %}x{% endfor %}", tokenize: false, split_special_tokens: false };
    expect(encodePrompt(plain, chat({ templateVariables: own }))).toEqual(encodePrompt(plain, chat()));
  });

  test("what a user writes is never a special token", () => {
    const { tokens } = encodePrompt(plain, chat({ messages: [{ role: "user", content: "a<|end_of_sentence|>b</s><tool_call>" }] }));
    expect(tokens.filter((id) => plain.vocabulary.isSpecial(id))).toEqual([plain.vocabulary.id("<|begin_of_sentence|>")]);
    expect(plain.decode(tokens)).toContain("a<|end_of_sentence|>b</s><tool_call>");
  });
});

test("log-probabilities are those of the text that is returned", async () => {
  const { events, answer: said } = await answer(plain, "one two STOP three", chat(), { stop: [" STOP"], logprobs: 0 });
  const bytes = events.flatMap((event) => (event.kind === "logprob" ? [...event.token.bytes] : []));
  expect([said, Buffer.from(bytes).toString()]).toEqual(["one two", "one two"]);
});

test("an abort ends the events, and the engine's request", async () => {
  const { model, asked } = await replaying(plain, plain.encode("one two three four five six"));
  const gone = new AbortController();
  const events: CompletionEvent[] = [];
  const prompt: Prompt = { kind: "text", text: "x" };
  const request = { prompt, sampling: GREEDY, maxTokens: 6, stop: [], format: { kind: "text" }, logprobs: null, routing: false } as const;
  const meter = new Meter(() => {});
  for await (const event of complete(model, { ...request, owner: "x", signal: gone.signal }, meter.answerTo(0))) {
    events.push(event);
    gone.abort();
  }
  expect(events).toHaveLength(1);
  expect(asked[0].signal?.aborted).toBe(true);
  expect(meter.usage.completionTokens).toBeGreaterThan(0); // what was computed is charged
});
