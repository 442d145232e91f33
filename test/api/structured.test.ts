/** `response_format` of `generate`, and conversations with reasoning and tools in `pipeline`: answers have the requested form. */
import { cp, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { Ajv2020 } from "ajv/dist/2020.js";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";
import { pipeline, type TextGenerationPipeline } from "../../src/api/pipeline.ts";
import { AutoTokenizer } from "../../src/api/tokenizer.ts";
import type { Request } from "../../src/engine/sequence.ts";
import { GrammarError } from "../../src/grammar/error.ts";
import type { Message } from "../../src/tokenizer/template.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { scratch } from "../checkpoint/craft.ts";

const SOURCE = fileURLToPath(new URL("../../models/small-moe/", import.meta.url));
const PERSON = {
  type: "object",
  properties: { name: { type: "string", maxLength: 4 }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
  additionalProperties: false,
};
const ENDS = [2, 5];
/** One thread: spinning teams of several threads slow each other down when tests run in parallel. */
const LOAD = { kv_cache_tokens: 16_384, threads: 1 };
const folder = scratch();
let model: CausalLM;
let tokenizer: Tokenizer;
let ids: number[];
beforeAll(async () => {
  model = await AutoModelForCausalLM.from_pretrained("default", LOAD);
  tokenizer = await AutoTokenizer.from_pretrained("default");
  ids = tokenizer.apply_chat_template([{ role: "user", content: "Who are you?" }], { add_generation_prompt: true });
});
afterAll(() => model.dispose());

describe("generate with response_format", () => {
  const textOf = (row: readonly number[], prompt = ids) => tokenizer.decode(row.slice(prompt.length), { skip_special_tokens: true });
  const schema = (of: Readonly<Record<string, unknown>>) => ({ type: "json_schema", json_schema: { name: "answer", schema: of } }) as const;

  test("json_schema: valid JSON and then an end token, greedy and sampled, several in parallel", async () => {
    const valid = new Ajv2020().compile(PERSON);
    const common = { input_ids: [ids, ids.slice(0, -1)], tokenizer, response_format: schema(PERSON), max_new_tokens: 200 };
    const greedy = await model.generate({ ...common, do_sample: false });
    const sampled = await model.generate({ ...common, do_sample: true, temperature: 2, num_return_sequences: 2, seed: 5 });
    expect([greedy.length, sampled.length]).toEqual([2, 4]);
    const prompts = [ids, ids.slice(0, -1)];
    for (const [i, row] of [...greedy, ...sampled].entries()) {
      expect(ENDS).toContain(row.at(-1));
      const value: unknown = JSON.parse(textOf(row, i < 2 ? prompts[i] : prompts[i < 4 ? 0 : 1]));
      expect(valid(value), JSON.stringify(value)).toBe(true);
    }
    expect(new Set(sampled.map(String)).size).toBe(4);
  });

  test("json_object: an object", async () => {
    // Closing brackets are made likely, so that the answer ends.
    const logit_bias = { [tokenizer.encode("}", { add_special_tokens: false }).at(-1) ?? 0]: 30 };
    const options = { tokenizer, response_format: { type: "json_object" } as const, logit_bias, max_new_tokens: 400 };
    const [row] = await model.generate({ input_ids: [ids], ...options, do_sample: false });
    expect(Object.prototype.toString.call(JSON.parse(textOf(row)))).toBe("[object Object]");
  });

  test("regex: the whole text matches, anchored or not", async () => {
    for (const [pattern, expected] of [
      ["(yes|no), [0-9]{3}", /^(yes|no), [0-9]{3}$/],
      ["^[A-C]{2}$", /^[A-C]{2}$/],
      ["第[一二三]章", /^第[一二三]章$/],
      ['"\\\\\n{1,2}', /^"\\\n{1,2}$/],
      ["a|b", /^(a|b)$/],
    ] as const) {
      const options = { tokenizer, response_format: { type: "regex", pattern } as const, max_new_tokens: 60 };
      for (const seed of [1, 2]) {
        const [row] = await model.generate({ input_ids: [ids], ...options, do_sample: true, temperature: 3, seed });
        expect(textOf(row)).toMatch(expected);
        expect(ENDS).toContain(row.at(-1));
      }
    }
  });

  test("text, null and nothing leave the answer free", async () => {
    const answer = (more: object) => model.generate({ input_ids: [ids], max_new_tokens: 12, do_sample: false, ...more });
    const free = await answer({});
    for (const response_format of [{ type: "text" }, undefined, null]) expect(await answer({ response_format })).toEqual(free);
  });

  test("an answer that is cut off says so, and other options still apply", async () => {
    const options = { tokenizer, response_format: schema(PERSON), max_new_tokens: 3, do_sample: false, top_logprobs: 2 };
    const out = await model.generate({ input_ids: [ids], ...options, return_dict_in_generate: true });
    expect(out.finish_reasons).toEqual(["length"]);
    expect(out.top_logprobs?.[0]).toHaveLength(3);
    expect(textOf(out.sequences[0])).toMatch(/^\{/);
    const stopped = await model.generate({ input_ids: [ids], ...options, max_new_tokens: 50, stop_strings: '"name"' });
    expect(textOf(stopped[0])).toMatch(/^\{\s*"name":?\s?$/);
  });

  test.each<[string, object, string, RegExp]>([
    [
      "no tokenizer",
      { tokenizer: undefined, response_format: { type: "json_object" } },
      "",
      /^response_format needs the option 'tokenizer'/,
    ],
    ["no end token", { eos_token_id: null, response_format: { type: "json_object" } }, "", /^response_format needs a token that ends/],
    ["an unknown type", { response_format: { type: "xml" } }, "response_format.type", /is "xml"; it must be one of text, json_object/],
    ["no object", { response_format: "json" }, "response_format", /is "json"; it must be an object/],
    ["no schema", { response_format: { type: "json_schema" } }, "response_format.json_schema.schema", /is missing; it must be/],
    ["no pattern", { response_format: { type: "regex" } }, "response_format.pattern", /is missing; it must be a text/],
    ["a broken pattern", { response_format: { type: "regex", pattern: "(a" } }, "response_format.pattern", /is not a regular expression/],
    ["look-around", { response_format: { type: "regex", pattern: "(?=a)b" } }, "response_format.pattern", /has look-around/],
    [
      "a schema that can't be enforced",
      { response_format: { type: "json_schema", json_schema: { schema: { properties: { a: { type: "string", format: "odd" } } } } } },
      "response_format.json_schema.schema",
      /^the schema can't be enforced: at \/properties\/a: 'format' "odd" is not supported/,
    ],
  ])("%s is an error that names the field", async (_name, options, param, message) => {
    const error: unknown = await model.generate({ input_ids: [ids], tokenizer, max_new_tokens: 5, ...options }).catch((e: unknown) => e);
    expect(error).toBeInstanceOf(RangeError);
    expect((error as Error).message).toMatch(message);
    if (param) expect(error instanceof GrammarError && error.param).toBe(param);
    expect(model.engine.cache.free).toBe(model.engine.cache.count);
  });
});

/** Like ERNIE-4.5 `-Thinking`: the prompt ends inside the reasoning. */
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

const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { enum: ["Rome", "Oslo"] } }, required: ["city"], additionalProperties: false },
    strict: true,
  },
} as const;
const CLOCK = { type: "function", function: { name: "clock", description: "Tells the time." } } as const;

describe("pipeline", () => {
  let plain: TextGenerationPipeline;
  let thinking: TextGenerationPipeline;
  const question: Message[] = [{ role: "user", content: "How is the weather in Rome?" }];
  beforeAll(async () => {
    for (const file of ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "model.safetensors"])
      await cp(join(SOURCE, file), join(folder, file));
    const config = JSON.parse(await readFile(join(folder, "tokenizer_config.json"), "utf8"));
    await writeFile(join(folder, "tokenizer_config.json"), JSON.stringify({ ...config, chat_template: THINKING }));
    plain = await pipeline("text-generation", "default", LOAD);
    thinking = await pipeline("text-generation", folder, LOAD);
  });
  afterAll(() => Promise.all([plain.dispose(), thinking.dispose()]));

  /** The last message when the engine answers with this text, and how many of its tokens were consumed. */
  async function replied(generator: TextGenerationPipeline, text: string, options: object = {}) {
    const tokens = [...generator.tokenizer.encode(text, { add_special_tokens: false }), ENDS[0]];
    const taken: number[] = [];
    const asked: Request[] = [];
    const engine = Object.create(generator.model.engine, {
      submit: {
        value: async function* (request: Request) {
          asked.push(request);
          for (const [i, id] of tokens.slice(0, request.maxNewTokens).entries()) {
            const mask = (await request.constraint?.next()) ?? null;
            if (mask && !((mask[id >> 5] >>> (id & 31)) & 1)) throw new Error(`token ${i} of the replay is not allowed`);
            request.constraint?.accept(id);
            taken.push(id);
            const finish = id === ENDS[0] ? "stop" : i + 1 === request.maxNewTokens ? "length" : undefined;
            yield { id, logprob: -1, ...(finish ? { finish } : {}) };
          }
        },
      },
    });
    Object.defineProperty(generator.model, "engine", { value: engine, configurable: true });
    try {
      const [{ generated_text }] = await generator(question, { max_new_tokens: 200, ...options });
      expect(generated_text.slice(0, -1)).toEqual(question);
      return {
        message: generated_text.at(-1) as Message & { tool_calls?: { id: string }[] },
        taken: taken.length,
        whole: tokens.length,
        asked,
      };
    } finally {
      Reflect.deleteProperty(generator.model, "engine"); // the real one is behind it
    }
  }

  test("without reasoning and tools: the message is the decoded text", async () => {
    const options = { max_new_tokens: 8, do_sample: false };
    const [{ generated_text }] = await plain(question, options);
    const input = tokenizer.apply_chat_template(question, { add_generation_prompt: true });
    const [row] = await model.generate({ input_ids: [input], ...options });
    const content = tokenizer.decode(row.slice(input.length), { skip_special_tokens: true });
    expect(generated_text).toEqual([...question, { role: "assistant", content }]);
    expect(content).not.toBe("");
  });

  test("reasoning is split from the answer", async () => {
    const { message } = await replied(thinking, "It is sunny.\n</think>\n\nNice weather.");
    expect(message).toEqual({ role: "assistant", content: "Nice weather.", reasoning_content: "It is sunny." });
    expect((await replied(plain, "no <b>tags</b> here")).message).toEqual({ role: "assistant", content: "no <b>tags</b> here" });
  });

  const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>';
  const called = {
    id: expect.stringMatching(/^call_\w{24}$/),
    type: "function",
    function: { name: "weather", arguments: '{"city": "Rome"}' },
  };

  test("tool calls are split from the answer, whether or not the template knows tools", async () => {
    const alone = await replied(plain, CALL, { tools: [WEATHER, CLOCK] });
    expect(alone.message).toEqual({ role: "assistant", content: null, tool_calls: [called] });
    const text = tokenizer.decode(alone.asked[0].tokens);
    expect(text).toContain("<tool_list>");
    expect(text).toContain('"name":"clock"');
    const all = await replied(thinking, `hm\n</think>\nLet me see.\n${CALL}\n${CALL}`, { tools: [WEATHER, CLOCK] });
    expect(all.message).toEqual({ role: "assistant", content: "Let me see.", reasoning_content: "hm", tool_calls: [called, called] });
    expect(all.message.tool_calls?.[0].id).not.toBe(all.message.tool_calls?.[1].id);
  });

  test("parallel_tool_calls: false ends the answer after its first call", async () => {
    const { message, taken, whole } = await replied(plain, `${CALL}\n${CALL}`, {
      tools: [CLOCK, { ...WEATHER, function: { name: "weather" } }],
      parallel_tool_calls: false,
    });
    expect(message.tool_calls).toEqual([called]);
    expect(taken).toBeLessThan(whole * 0.7);
  });

  test("stop strings end the answer, not the reasoning, and are not part of it", async () => {
    const text = "one STOP two\n</think>\nthree STOP four five six seven";
    const { message, taken, whole } = await replied(thinking, text, { stop_strings: "STOP" });
    expect(message).toEqual({ role: "assistant", content: "three ", reasoning_content: "one STOP two" });
    expect(taken).toBeLessThan(whole - 3);
    expect((await replied(plain, "one STOP two", { stop_strings: ["x", "STOP"] })).message["content"]).toBe("one ");
  });

  test("without tools, or with tool_choice none, a call is not parsed: the tags are special tokens, the rest is text", async () => {
    for (const options of [{}, { tools: [WEATHER], tool_choice: "none" }])
      expect((await replied(plain, CALL, options)).message).toEqual({
        role: "assistant",
        content: '\n{"name": "weather", "arguments": {"city": "Rome"}}\n',
      });
  });

  test("a call cut off by the length limit is dropped; other text stays", async () => {
    const text = 'Wait. <tool_call>\n{"na';
    const { length } = tokenizer.encode(text, { add_special_tokens: false });
    const { message } = await replied(plain, `${text}me": "weather"}`, { tools: [CLOCK], max_new_tokens: length });
    expect(message).toEqual({ role: "assistant", content: "Wait." });
  });

  test("a required call, generated by the model: its arguments satisfy the schema", async () => {
    const options = { tools: [CLOCK, WEATHER], max_new_tokens: 100, do_sample: true, temperature: 2 };
    const named = { type: "function", function: { name: "weather" } } as const;
    const [{ generated_text }] = await plain(question, { ...options, seed: 1, tool_choice: named });
    const message = generated_text.at(-1) as unknown as {
      content: unknown;
      tool_calls: { function: { name: string; arguments: string } }[];
    };
    expect([message.content, message.tool_calls.length, message.tool_calls[0].function.name]).toEqual([null, 1, "weather"]);
    expect(["Rome", "Oslo"]).toContain((JSON.parse(message.tool_calls[0].function.arguments) as { city: string }).city);
  });

  test("response_format applies after the reasoning", async () => {
    const response_format = { type: "json_schema", json_schema: { schema: { enum: ["yes", "no"] } } } as const;
    const { message } = await replied(thinking, 'free text here</think>\n"yes"', { response_format });
    expect(message).toEqual({ role: "assistant", content: '"yes"', reasoning_content: "free text here" });
    await expect(replied(thinking, "x</think>maybe", { response_format })).rejects.toThrow("is not allowed");
  });

  test("the answer can be continued as a conversation with the result of a call", async () => {
    const { message } = await replied(plain, CALL, { tools: [WEATHER] });
    const result = { role: "tool", tool_call_id: message.tool_calls?.[0].id, content: "sunny" };
    const [{ generated_text }] = await plain([...question, message, result], { tools: [WEATHER], max_new_tokens: 5 });
    expect(generated_text).toHaveLength(4);
  });

  test.each<[string, object, string | Message[], RegExp]>([
    ["tools with a text", { tools: [WEATHER] }, "Hello", /^tools need messages/],
    ["two tools of one name", { tools: [CLOCK, CLOCK] }, question, /two tools have the same name/],
    ["a tool without a name", { tools: [{ type: "function", function: {} }] }, question, /^tools\[0\]\.function\.name must be/],
    ["a tool that is none", { tools: [WEATHER, { name: "x" }] }, question, /^tools\[1\] is not like/],
    [
      "a choice that is no tool",
      { tools: [CLOCK], tool_choice: { type: "function", function: { name: "x" } } },
      question,
      /names 'x'; the tools are clock/,
    ],
    ["a choice without tools", { tool_choice: "required" }, question, /there are no tools/],
    [
      "a call and a format at once",
      { tools: [CLOCK], tool_choice: "required", response_format: { type: "json_object" } },
      question,
      /at once/,
    ],
    ["an unknown option", { max_tokens: 3 }, question, /^generate has no option 'max_tokens'/],
    ["an unknown role", {}, [{ role: "nobody", content: "x" }], /nobody/],
  ])("%s is an error that says so", async (_name, options, prompt, message) => {
    await expect(plain(prompt, options)).rejects.toThrow(message);
  });
});
