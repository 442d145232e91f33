/** Wrong bodies get errors that say what was seen, what is allowed and what to send; checking stops at the first fault. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { check, noted } from "../../src/server/check.ts";
import { ServerError } from "../../src/server/errors.ts";
import { MOST_FIELDS, MOST_VALUES, parseBody } from "../../src/server/http/body.ts";
import { BODIES } from "../../src/server/http/openai/schema.ts";
import { nearest } from "../../src/tokenizer/nearest.ts";
import { type Running, start } from "./start.ts";

const messages = [{ role: "user", content: "Hi" }];
const chat = (more: object) => ({ model: "default", messages, ...more });
const said = (message: object) => ({ model: "default", messages: [message] });
const CHAT = "/v1/chat/completions";
const TEXTS = "/v1/completions";

/** Body, the field that the error names, and what it says. */
const WRONG: readonly (readonly [route: keyof typeof BODIES, body: unknown, param: string | null, message: string])[] = [
  [CHAT, [], null, "the body is an empty list; it must be an object"],
  [CHAT, null, null, "the body is null; it must be an object"],
  [CHAT, "hello", null, "the body is a text; it must be an object"],
  [CHAT, { messages }, "model", "model is missing; it must be the name of a model, as GET /v1/models lists them"],
  [CHAT, { model: "", messages }, "model", "model is an empty text; it must be the name of a model"],
  [CHAT, { model: "default" }, "messages", 'messages is missing; it must be a list of messages like {"role": "user", "content": "…"}'],
  [CHAT, chat({ messages: [] }), "messages", "messages is an empty list; it must have at least one element"],
  [CHAT, chat({ messages: "Hi" }), "messages", "messages is a text; it must be a list of messages"],
  [CHAT, chat({ messages: ["Hi"] }), "messages[0]", 'messages[0] is a text; it must be a message like {"role": "user"'],
  [CHAT, said({ role: "user", content: null }), "messages[0].content", "content is null; it must be a text, or a list of parts {"],
  [CHAT, said({ role: "user" }), "messages[0].content", "messages[0].content is missing; it must be a text, or a list of parts"],
  [
    CHAT,
    said({ role: "tool", content: "x" }),
    "messages[0].tool_call_id",
    "tool_call_id is missing; it must be a text: the id of the call",
  ],
  [CHAT, said({ role: "assistent", content: "x" }), "messages[0].role", "did you mean 'assistant'?"],
  [
    CHAT,
    said({ role: "What do I owe?", content: "x" }),
    "messages[0].role",
    "messages[0].role is a text; it must be 'system', 'developer'",
  ],
  [CHAT, said({ content: "x" }), "messages[0].role", "messages[0].role is missing; it must be 'system', "],
  [CHAT, said({ role: "user", contnet: "x" }), "messages[0].contnet", "no field 'contnet' in messages[0]; did you mean 'content'?"],
  [
    CHAT,
    said({
      role: "user",
      content: [
        { type: "text", text: "x" },
        { type: "image_url", image_url: { url: "x" } },
      ],
    }),
    "messages[0].content[1].type",
    "is 'image_url'; it must be 'text': models here read text, no images, audio or files",
  ],
  [CHAT, said({ role: "user", content: ["x"] }), "messages[0].content[0]", 'is a text; it must be a part {"type": "text", "text": "…"}'],
  [CHAT, said({ role: "user", content: [{ type: "text" }] }), "messages[0].content[0].text", "text is missing; it must be a text"],
  [
    CHAT,
    said({ role: "assistant", tool_calls: [{ id: "a", type: "function", function: { name: "f", arguments: {} } }] }),
    "messages[0].tool_calls[0].function.arguments",
    "is an object; it must be a text: the arguments as JSON",
  ],
  [CHAT, chat({ topk: 3 }), "topk", "there is no field 'topk' in the body; did you mean 'top_k'?"],
  [CHAT, chat({ max_token: 3 }), "max_token", "did you mean 'max_tokens'?"],
  [CHAT, chat({ maxTokens: 3 }), "maxTokens", "did you mean 'max_tokens'?"],
  [CHAT, chat({ repitition_penalty: 1 }), "repitition_penalty", "did you mean 'repetition_penalty'?"],
  [CHAT, chat({ max_new_tokens: 3 }), "max_new_tokens", "there is no field 'max_new_tokens' in the body; send 'max_tokens'"],
  [CHAT, chat({ functions: [] }), "functions", "send 'tools', whose elements are like"],
  [CHAT, chat({ prompt: "Hi" }), "prompt", "send 'messages', or the prompt to /v1/completions"],
  [CHAT, chat({ frobnicate: 1 }), "frobnicate", "there is no field 'frobnicate' in the body"],
  [CHAT, chat({ stream_options: { include_usge: true } }), "stream_options.include_usge", "did you mean 'include_usage'?"],
  [CHAT, chat({ temperature: "1" }), "temperature", "temperature is a text; it must be a number"],
  [CHAT, chat({ temperature: 3 }), "temperature", "temperature is 3; it must be at most 2"],
  [CHAT, chat({ top_k: 1.5 }), "top_k", "top_k is a number with decimals; it must be a whole number"],
  [CHAT, chat({ n: 0 }), "n", "n is 0; it must be at least 1"],
  [CHAT, chat({ stream: "yes" }), "stream", "stream is a text; it must be true or false"],
  [CHAT, chat({ stop: [1] }), "stop[0]", "stop[0] is a number; it must be a text"],
  [CHAT, chat({ stop: "a".repeat(2000) }), "stop", "stop has 2000 characters; at most 1024 are allowed"],
  [CHAT, chat({ model: "a".repeat(2000) }), "model", "model has 2000 characters; at most 1024 are allowed"],
  [CHAT, chat({ stop: ["a", "b", "c", "d", "e"] }), "stop", "stop has 5 elements; at most 4 are allowed"],
  [CHAT, chat({ logit_bias: [1] }), "logit_bias", "logit_bias is a list; it must be an object of token ids and numbers"],
  [CHAT, chat({ logit_bias: { hello: 1 } }), "logit_bias", "logit_bias has an entry with a wrong name: token ids are whole numbers"],
  [CHAT, chat({ logit_bias: { 5: 101 } }), "logit_bias[5]", "is 101; it must be at most 100"],
  [
    CHAT,
    chat({ response_format: "json" }),
    "response_format",
    'response_format is a text; it must be an object like {"type": "json_schema"',
  ],
  [
    CHAT,
    chat({ response_format: { type: "json" } }),
    "response_format.type",
    "is 'json'; it must be 'text', 'json_object' or 'json_schema'",
  ],
  [
    CHAT,
    chat({ response_format: { type: "json_schema" } }),
    "response_format.json_schema",
    "json_schema is missing; it must be an object like",
  ],
  [
    CHAT,
    chat({ response_format: { type: "json_schema", json_schema: { name: "a" } } }),
    "response_format.json_schema.schema",
    "schema is missing; it must be a JSON schema: an object",
  ],
  [CHAT, chat({ tools: [{ name: "f" }] }), "tools[0].type", "tools[0].type is missing; it must be 'function'"],
  [
    CHAT,
    chat({ tools: [{ type: "function", function: { name: "f", paramters: {} } }] }),
    "tools[0].function.paramters",
    "did you mean 'parameters'?",
  ],
  [CHAT, chat({ tools: [{ type: "function", function: { name: "a b" } }] }), "tools[0].function.name", "1 to 64 letters, digits, _ and -"],
  [CHAT, chat({ tool_choice: "any" }), "tool_choice", "tool_choice is 'any'; it must be 'none', 'auto'"],
  [
    TEXTS,
    { model: "default" },
    "prompt",
    "prompt is missing; it must be a text, a list of texts, a list of token ids, or a list of such lists",
  ],
  [TEXTS, { model: "default", prompt: [{}] }, "prompt[0]", "prompt[0] is an object; it must be a whole number, a text or a list"],
  [TEXTS, { model: "default", prompt: ["a", 1] }, "prompt[1]", "prompt[1] is a number; it must be a text"],
  [TEXTS, { model: "default", prompt: [[1], ["a"]] }, "prompt[1][0]", "prompt[1][0] is a text; it must be a whole number"],
  [TEXTS, { model: "default", prompt: "a", suffix: "b" }, "suffix", "leave it out"],
  [TEXTS, { model: "default", prompt: "a", best_of: 2 }, "best_of", "only 1 is supported"],
  ["/v1/embeddings", { model: "default", input: 5 }, "input", "input is a number; it must be a text, a list of texts"],
  ["/detokenize", { model: "default", tokens: ["a"] }, "tokens[0]", "tokens[0] is a text; it must be a whole number"],
  ["/tokenize", { model: "default", txt: "a" }, "txt", "did you mean 'text'?"],
];

function errorOf(act: () => unknown): ServerError {
  try {
    act();
  } catch (error) {
    if (error instanceof ServerError) return error;
    throw error;
  }
  throw new Error("nothing was wrong");
}

test.each(WRONG)("%s %j", (route, body, param, message) => {
  const error = errorOf(() => check(BODIES[route], body));
  expect([error.code, error.param]).toEqual(["invalid_request", param]);
  expect(error.message).toContain(message);
});

test("what clients send besides is let through or left out, as before", () => {
  const body = chat({
    metadata: { any: "thing" },
    user: "me",
    temperature: null,
    tools: [{ type: "function", function: { name: "f", parameters: { type: "object", anything: [1, { a: null }] }, strict: null } }],
    chat_template_kwargs: { enable_thinking: false },
    messages: [
      { role: "developer", content: [{ type: "text", text: "a", cache_control: {} }], name: null },
      { role: "assistant", content: null, refusal: null, annotations: [], audio: null, function_call: null },
    ],
  });
  expect(check(BODIES[CHAT], body)).toEqual({
    ...chat({}),
    temperature: null,
    tools: body["tools" as never],
    chat_template_kwargs: { enable_thinking: false },
    messages: [
      { role: "developer", content: [{ type: "text", text: "a" }], name: null },
      { role: "assistant", content: null, refusal: null },
    ],
  });
});

test("errors repeat nothing private, however it is misplaced", () => {
  const secret = "my password is 1234";
  for (const body of [
    secret,
    [secret],
    { [secret]: 1 },
    said({ role: secret }),
    said({ [secret]: 1 }),
    chat({ stop: { [secret]: 1 } }),
    chat({ tool_choice: secret }),
  ]) {
    const { message } = errorOf(() => check(BODIES[CHAT], body));
    if (typeof body === "object" && secret in body) continue; // an unknown field is named
    expect(message).not.toContain("1234");
  }
});

describe("bounds", () => {
  /** A list of the wrong type that counts how many of its elements are looked at. */
  const counting = (length: number) => {
    let read = 0;
    const get = (all: number[], key: string | symbol) => {
      if (/^\d+$/.test(String(key))) read++;
      return Reflect.get(all, key);
    };
    return { list: new Proxy(new Array<number>(length).fill(1), { get }), read: () => read };
  };

  test("a list's count comes before its elements, and checking stops at the first fault", () => {
    for (const [count, most] of [
      [1000, 10],
      [1000, 1000],
    ]) {
      const { list, read } = counting(count);
      errorOf(() => check(z.array(z.string()).max(most), list));
      expect(read()).toBeLessThan(5);
    }
  });

  test("a record's count comes before its entries", () => {
    const entries = Object.fromEntries(Array.from({ length: 11 }, (_, i) => [`k${i}`, "x"]));
    expect(errorOf(() => check(noted(z.record(z.string(), z.number()), { entries: 10 }), entries)).message).toContain(
      "11 entries; at most 10",
    );
  });

  test("a list without a bound is a bug of ours", () => {
    expect(() => check(z.array(z.string()), [])).toThrow("internal:");
  });

  test.each([
    ["values", `[${"1,".repeat(MOST_VALUES)}1]`],
    ["values", `[${"[],".repeat(MOST_VALUES / 2)}[]]`],
    ["fields", `[${'{"a":1},'.repeat(MOST_FIELDS)}{"a":1}]`],
    ["texts", '""'.repeat(MOST_VALUES + MOST_FIELDS + 1)],
  ])("too many %s are counted before anything is parsed", (what, text) => {
    expect(errorOf(() => parseBody(Buffer.from(text), 100)).message).toMatch(new RegExp(`holds more than \\d+ ${what}`));
  });

  test("as many as are allowed are parsed; commas and colons within texts do not count", () => {
    expect(parseBody(Buffer.from(`[${"1,".repeat(MOST_VALUES - 2)}1]`), 100)).toHaveLength(MOST_VALUES - 1);
    expect(parseBody(Buffer.from(JSON.stringify([",:[{".repeat(MOST_VALUES)])), 100)).toHaveLength(1);
  });
});

test.each([
  ["topk", "top_k"],
  ["top-k", "top_k"],
  ["TopP", "top_p"],
  ["max_token", "max_tokens"],
  ["max_tokesn", "max_tokens"],
  ["sead", "seed"],
  ["x", null],
  ["frobnicate", null],
  ["temperature".repeat(1000), null],
])("the name nearest to %s is %s", (name, meant) => {
  expect(nearest(name, ["top_k", "top_p", "max_tokens", "seed", "n", "temperature"])).toBe(meant);
});

describe("the server", () => {
  let running: Running;
  beforeAll(async () => {
    running = await start();
  });
  afterAll(() => running.server.stop());

  test("every route that takes a body is one that the reader's thread knows", async () => {
    const { paths } = (await (await fetch(`${running.url}/docs/json`)).json()) as {
      paths: Record<string, { post?: { requestBody?: object } }>;
    };
    const routes = Object.keys(paths).filter((path) => paths[path].post);
    expect(routes.sort()).toEqual(Object.keys(BODIES).sort());
    for (const route of routes) expect(paths[route].post?.requestBody).toBeDefined();
  });

  test("small or large, a body has the same errors and the same answer", async () => {
    const ask = async (body: object) => {
      const { server } = running;
      const reply = await server.app.inject({ method: "POST", url: "/detokenize", payload: body });
      const { error, text } = reply.json();
      return [reply.statusCode, error?.message, error?.param, text?.slice(0, 10)];
    };
    for (const wrong of [{ tokens: "a" }, { tokens: [5, "a"] }, { tokns: [5] }, { tokens: [5], more: 1 }, { tokens: [5] }]) {
      const body = { model: "default", ...wrong };
      const large = { ...body, padding: undefined };
      const text = `${JSON.stringify(large).slice(0, -1)}${" ".repeat(20_000)}}`;
      const reply = await running.server.app.inject({
        method: "POST",
        url: "/detokenize",
        headers: { "content-type": "application/json" },
        payload: text,
      });
      const { error, text: answer } = reply.json();
      expect([reply.statusCode, error?.message, error?.param, answer?.slice(0, 10)]).toEqual(await ask(body));
    }
  });
});
