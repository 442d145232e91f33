/** OpenAI's own client against the server: the behaviour that its users rely on. */
import type OpenAI from "openai";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AutoModelForCausalLM, AutoTokenizer } from "../../../src/index.ts";
import { engineOf, post, type Running, start } from "../start.ts";

let running: Running;
let client: OpenAI;
beforeAll(async () => {
  running = await start();
  client = running.client;
});
afterAll(() => running.server.stop());

const HOTEL = [{ role: "user", content: "Find me a hotel in London." }] as const;
const greedy = { model: "default", temperature: 0 } as const;

describe("chat completions", () => {
  test("the greedy answer equals the library's", async () => {
    const answer = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 24 });
    const tokenizer = await AutoTokenizer.from_pretrained("default");
    const model = await AutoModelForCausalLM.from_pretrained("default");
    const ids = tokenizer.apply_chat_template([...HOTEL], { add_generation_prompt: true });
    const [out] = await model.generate({ input_ids: [ids], do_sample: false, max_new_tokens: 24 });
    await model.dispose();
    expect(answer.choices[0].message).toMatchObject({
      role: "assistant",
      content: tokenizer.decode(out.slice(ids.length), { skip_special_tokens: true }),
    });
    expect(answer.usage?.prompt_tokens).toBe(ids.length);
    expect(answer.usage?.total_tokens).toBe(ids.length + (answer.usage?.completion_tokens ?? 0));
  });

  test("streamed, it is the same text in pieces, with the usage at the end", async () => {
    const whole = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 24 });
    const stream = await client.chat.completions.create({
      ...greedy,
      messages: [...HOTEL],
      max_tokens: 24,
      stream: true,
      stream_options: { include_usage: true },
    });
    let [text, finish, pieces] = ["", "", 0];
    let usage: OpenAI.CompletionUsage | null | undefined;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      pieces += chunk.choices[0]?.delta.content ? 1 : 0;
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    expect(text).toBe(whole.choices[0].message.content);
    expect(pieces).toBeGreaterThan(3);
    expect(finish).toBe(whole.choices[0].finish_reason);
    expect(usage).toMatchObject({ prompt_tokens: whole.usage?.prompt_tokens, completion_tokens: whole.usage?.completion_tokens });
  });

  test("the second turn of a conversation finds the first in the cache", async () => {
    const system = { role: "system", content: "You help people find hotels and restaurants. ".repeat(12) } as const;
    const first = await client.chat.completions.create({ ...greedy, messages: [system, ...HOTEL], max_tokens: 8 });
    const second = await client.chat.completions.create({
      ...greedy,
      messages: [
        system,
        ...HOTEL,
        { role: "assistant", content: first.choices[0].message.content },
        { role: "user", content: "A cheap one." },
      ],
      max_tokens: 8,
    });
    expect(second.usage?.prompt_tokens_details?.cached_tokens).toBeGreaterThanOrEqual(96);
  });

  test("n sampled answers differ, and a seed reproduces them", async () => {
    const ask = () =>
      client.chat.completions.create({ model: "default", messages: [...HOTEL], max_tokens: 12, n: 3, temperature: 1.2, seed: 7 });
    const [a, b] = [await ask(), await ask()];
    const texts = a.choices.map((c) => c.message.content);
    expect(new Set(texts).size).toBeGreaterThan(1);
    expect(b.choices.map((c) => c.message.content)).toEqual(texts);
  });

  test("stop strings end the answer and are not in it", async () => {
    const whole = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 24 });
    const text = whole.choices[0].message.content ?? "";
    const stop = text.slice(8, 12);
    const stopped = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 24, stop: [stop] });
    expect(stopped.choices[0]).toMatchObject({ finish_reason: "stop", message: { content: text.slice(0, text.indexOf(stop)) } });
  });

  test("log-probabilities of each token, with alternatives, likeliest first", async () => {
    const { choices } = await client.chat.completions.create({
      ...greedy,
      messages: [...HOTEL],
      max_tokens: 6,
      logprobs: true,
      top_logprobs: 3,
    });
    const content = choices[0].logprobs?.content ?? [];
    expect(Buffer.from(content.flatMap((t) => t.bytes ?? [])).toString()).toBe(choices[0].message.content);
    for (const { token, logprob, top_logprobs } of content) {
      expect(top_logprobs).toHaveLength(3);
      expect(top_logprobs[0].token).toBe(token);
      expect(top_logprobs[0].logprob).toBeCloseTo(logprob, 3);
      expect(top_logprobs.map((t) => t.logprob)).toEqual(top_logprobs.map((t) => t.logprob).sort((a, b) => b - a));
    }
  });

  test("logit_bias forbids a token", async () => {
    const free = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 1 });
    const tokenizer = await AutoTokenizer.from_pretrained("default");
    const [id] = tokenizer.encode(free.choices[0].message.content ?? "", { add_special_tokens: false });
    const bound = await client.chat.completions.create({ ...greedy, messages: [...HOTEL], max_tokens: 1, logit_bias: { [id]: -100 } });
    expect(bound.choices[0].message.content).not.toBe(free.choices[0].message.content);
  });

  test("routing says which experts each token used", async () => {
    const body = { ...greedy, messages: HOTEL, max_tokens: 4, routing: true };
    const { choices } = (await (await post(running.url, "/v1/chat/completions", body)).json()) as {
      choices: { message: { routing: { layers: number[]; experts: number[][]; weights: number[][] }[] } }[];
    };
    expect(choices[0].message.routing).toHaveLength(4);
    for (const { layers, experts, weights } of choices[0].message.routing) {
      expect(layers).toEqual([1, 2, 3, 4, 5, 6, 7]);
      expect(experts.every((row) => row.length === 4 && new Set(row).size === 4 && row.every((e) => e >= 0 && e < 32))).toBe(true);
      for (const row of weights) expect(row.reduce((a, b) => a + b)).toBeCloseTo(1, 2);
    }
  });

  test("when a client disconnects, what its answer held is freed", async () => {
    const engine = await engineOf(running);
    const leave = new AbortController();
    const stream = await client.chat.completions.create(
      { model: "default", messages: [...HOTEL], max_tokens: 3000, stream: true, temperature: 1, logit_bias: { "2": -100, "5": -100 } },
      { signal: leave.signal },
    );
    const iterator = stream[Symbol.asyncIterator]();
    await iterator.next();
    await iterator.next();
    expect(engine.stats().running).toBe(1);
    leave.abort();
    await expect.poll(() => engine.stats().running).toBe(0);
    expect(engine.cache.free).toBe(engine.cache.count);
  });
});

describe("tools", () => {
  const tool = (name: string, city: object): OpenAI.ChatCompletionTool => ({
    type: "function",
    function: { name, parameters: { type: "object", properties: { city }, required: ["city"], additionalProperties: false } },
  });
  const tools = [tool("get_weather", { enum: ["Paris", "Rome"] }), tool("get_time", { type: "string", maxLength: 8 })];

  test("naming a tool gives a call of that tool with valid arguments", async () => {
    const { choices } = await client.chat.completions.create({
      model: "default",
      messages: [{ role: "user", content: "How is the weather?" }],
      tools,
      tool_choice: { type: "function", function: { name: "get_weather" } },
      max_tokens: 100,
      temperature: 1,
    });
    expect(choices[0].finish_reason).toBe("tool_calls");
    const call = choices[0].message.tool_calls?.[0] as OpenAI.ChatCompletionMessageFunctionToolCall;
    expect(call.id).toMatch(/^call_\w{24}$/);
    expect(call.function.name).toBe("get_weather");
    expect(["Paris", "Rome"]).toContain(JSON.parse(call.function.arguments).city);
    expect(choices[0].message.content).toBe(null);
  });

  test("streamed, the name comes first and the arguments in pieces", async () => {
    const stream = await client.chat.completions.create({
      model: "default",
      messages: [{ role: "user", content: "How is the weather?" }],
      tools,
      tool_choice: "required",
      parallel_tool_calls: false,
      max_tokens: 200,
      stream: true,
      seed: 3,
    });
    const deltas: OpenAI.ChatCompletionChunk.Choice.Delta.ToolCall[] = [];
    let finish: string | null = null;
    for await (const { choices } of stream) {
      deltas.push(...(choices[0]?.delta.tool_calls ?? []));
      finish = choices[0]?.finish_reason ?? finish;
    }
    expect(finish).toBe("tool_calls");
    expect(deltas[0]).toMatchObject({ index: 0, type: "function", function: { name: expect.stringMatching(/^get_(weather|time)$/) } });
    expect(deltas.slice(1).every((d) => d.id === undefined && d.function?.name === undefined)).toBe(true);
    expect(deltas.length).toBeGreaterThan(2);
    expect(typeof JSON.parse(deltas.map((d) => d.function?.arguments ?? "").join("")).city).toBe("string");
  });

  test("a conversation with calls and results is rendered whole", async () => {
    const { usage } = await client.chat.completions.create({
      ...greedy,
      messages: [
        { role: "user", content: "Weather in Rome?" },
        {
          role: "assistant",
          content: null,
          tool_calls: [{ id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city":"Rome"}' } }],
        },
        { role: "tool", tool_call_id: "call_1", content: "sunny, 31 degrees" },
      ],
      tools,
      max_tokens: 4,
    });
    expect(usage?.prompt_tokens).toBeGreaterThan(120);
  });
});

describe("text completions", () => {
  test("several prompts, echoed, as texts and as ids", async () => {
    const tokenizer = await AutoTokenizer.from_pretrained("default");
    const { choices } = await client.completions.create({ ...greedy, prompt: ["Hello", "你好"], max_tokens: 4, echo: true });
    expect(choices.map((c) => c.text.slice(0, 2))).toEqual(["He", "你好"]);
    const byIds = await client.completions.create({ ...greedy, prompt: [tokenizer.encode("Hello")], max_tokens: 4, echo: true });
    expect(byIds.choices[0].text).toBe(choices[0].text);
  });

  test("the usage counts each prompt once, however many answers it has", async () => {
    const ask = async (prompt: string | string[], n: number) =>
      (await client.completions.create({ model: "default", prompt, n, max_tokens: 2, temperature: 1 })).usage?.prompt_tokens ?? 0;
    const [a, b] = [await ask("Hello there", 1), await ask("你好", 1)];
    expect(await ask(["Hello there", "你好"], 3)).toBe(a + b);
  });

  test.each([
    [{ best_of: 2 }, "best_of", "only 1"],
    [{ suffix: "x" }, "suffix", "leave it out"],
    [{ echo: true, logprobs: 1 }, "echo", "leave out echo or logprobs"],
    [{ prompt: [99999] }, "prompt", "outside the vocabulary"],
  ])("%j is refused", async (more, param, message) => {
    const asked = client.completions.create({ model: "default", prompt: "x", ...more });
    await expect(asked).rejects.toMatchObject({ status: 400, param, message: expect.stringContaining(message) });
  });

  test("streamed, with log-probabilities in the older form", async () => {
    const stream = await client.completions.create({ ...greedy, prompt: "Hello", max_tokens: 4, logprobs: 2, stream: true });
    let text = "";
    const tokens: string[] = [];
    for await (const { choices } of stream) {
      text += choices[0].text;
      tokens.push(...(choices[0].logprobs?.tokens ?? []));
    }
    expect(tokens.join("")).toBe(text);
    expect(tokens).toHaveLength(4);
  });
});

test("models: the list, one of them, and one that does not exist", async () => {
  expect((await client.models.list()).data.map((m) => m.id)).toEqual(["default"]);
  expect((await client.models.retrieve("default")).id).toBe("default");
  await expect(client.models.retrieve("nope")).rejects.toMatchObject({ status: 404, code: "model_not_found" });
});

test("embeddings: of length one, the same as floats and in base64, alike for like texts", async () => {
  const input = ["Where is the railway station?", "Where is the train station?", "春眠不觉晓，处处闻啼鸟。"];
  const base64 = await client.embeddings.create({ model: "default", input }); // the client asks for base64 by itself
  const floats = await client.embeddings.create({ model: "default", input, encoding_format: "float" });
  const [a, b, c] = floats.data.map((d) => d.embedding);
  expect(a).toHaveLength(320);
  expect(Math.hypot(...a)).toBeCloseTo(1, 4);
  base64.data[0].embedding.forEach((x, i) => {
    expect(x).toBeCloseTo(a[i], 6);
  });
  const dot = (x: number[], y: number[]) => x.reduce((sum, v, i) => sum + v * y[i], 0);
  expect(dot(a, b)).toBeGreaterThan(dot(a, c));
});

test("tokens of a text and back; the experts of a text", async () => {
  const text = "混合专家 mixes experts 123";
  const { tokens, count } = (await (await post(running.url, "/tokenize", { model: "default", text })).json()) as {
    tokens: number[];
    count: number;
  };
  expect(count).toBe(tokens.length);
  expect(await (await post(running.url, "/detokenize", { model: "default", tokens })).json()).toEqual({ text });
  const routing = (await (await post(running.url, "/v1/routing", { model: "default", text })).json()) as {
    tokens: { id: number }[];
    layers: { layer: number; experts: number[][]; load: number[] }[];
  };
  expect(routing.tokens.map((t) => t.id)).toEqual(tokens);
  for (const { experts, load } of routing.layers) {
    expect(experts).toHaveLength(count);
    expect(load.reduce((a, b) => a + b)).toBe(4 * count);
  }
});

describe("text completions and texts: errors for too much input or ids outside the vocabulary name the field", () => {
  test.each([
    ["/v1/completions", { prompt: new Array(129).fill("a") }, "prompt"],
    ["/v1/completions", { prompt: new Array(20).fill("a"), n: 16 }, "prompt"],
    ["/v1/completions", { prompt: [999999], echo: true }, "prompt[0]"],
    ["/v1/completions", { prompt: [-1], echo: true }, "prompt"],
    ["/v1/completions", { prompt: [999999] }, "prompt"],
    ["/tokenize", { text: "a".repeat(600_000) }, "text"],
    ["/detokenize", { tokens: [5, 999999] }, "tokens[1]"],
  ])("%s %j", async (path, body, param) => {
    const response = await post(running.url, path, { model: "default", ...body });
    const { error } = (await response.json()) as { error: { param: string | null; message: string } };
    expect([response.status, error.param?.slice(0, param.length)]).toEqual([400, param]);
    if ("prompt" in body && body.prompt.length > 128) expect(error.message).toContain("128"); // instead of saying that it is not a number
  });

  test("top_p of 0 is greedy", async () => {
    const ask = async (more: object) =>
      (await running.client.completions.create({ model: "default", prompt: "The hotel", max_tokens: 8, ...more })).choices[0].text;
    expect(await ask({ top_p: 0, temperature: 2 })).toBe(await ask({ temperature: 0 }));
  });
});

describe("errors name the field, in OpenAI's shape", () => {
  const messages = [...HOTEL];
  test.each([
    [{ model: "default", messages, temperature: 3 }, "temperature", 400],
    [{ model: "default", messages: [] }, "messages", 400],
    [{ model: "default" }, "messages", 400],
    [
      { model: "default", messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "x" } }] }] },
      "messages[0].content[0].type",
      400,
    ],
    [{ model: "default", messages: [{ role: "robot", content: "x" }] }, "messages[0].role", 400],
    [{ model: "default", messages, frobnicate: 1 }, "frobnicate", 400],
    [{ model: "default", messages, logit_bias: { "999999": 1 } }, "logit_bias", 400],
    [{ model: "default", messages, stop: ["a", "b", "c", "d", "e"] }, "stop", 400],
    [{ model: "default", messages, logit_bias: Object.fromEntries(Array.from({ length: 2000 }, (_, i) => [i, 1])) }, "logit_bias", 400],
    [{ model: "default", messages, tool_choice: "required" }, "tool_choice", 400],
    [{ model: "default", messages, top_logprobs: 2 }, "top_logprobs", 400],
    [{ model: "default", messages: [{ role: "user", content: "word ".repeat(5000) }], stream: true }, "messages", 400],
    [
      {
        model: "default",
        messages,
        tools: [{ type: "function", function: { name: "f", strict: true, parameters: { not: {} } } }],
        stream: true,
      },
      "tools[0].function.parameters",
      400,
    ],
    [{ model: "default", messages: [{ role: "user", content: "word ".repeat(5000) }] }, "messages", 400],
    [{ model: "default", messages, chat_template_kwargs: { chat_template: "{{ x }}" } }, "chat_template_kwargs.chat_template", 400],
    [{ model: "nope", messages }, "model", 404],
    [
      { model: "default", messages, response_format: { type: "json_schema", json_schema: { name: "x", schema: { type: "nonsense" } } } },
      "response_format.json_schema.schema",
      400,
    ],
  ])("%j", async (body, param, status) => {
    const response = await post(running.url, "/v1/chat/completions", body);
    const { error } = (await response.json()) as { error: { message: string; type: string; param: string | null; code: string } };
    expect([response.status, error.param]).toEqual([status, param]);
    expect(error.message.length).toBeGreaterThan(10);
    expect(Object.keys(error).sort()).toEqual(["code", "message", "param", "type"]);
    expect(response.headers.get("x-request-id")).toMatch(/^[0-9a-f-]{36}$/);
  });
});
