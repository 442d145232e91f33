/** Clients of the ecosystem beside OpenAI's own: the AI SDK and LangChain.js, as docs/clients.md shows them. */
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { tool as langTool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { embedMany, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { type Running, start } from "./start.ts";

let running: Running;
beforeAll(async () => {
  running = await start();
});
afterAll(() => running.server.stop());

describe("the AI SDK", () => {
  const provider = () =>
    createOpenAICompatible({ name: "mixtape", baseURL: `${running.url}/v1`, supportsStructuredOutputs: true, includeUsage: true });

  test("a text, whole and streamed", async () => {
    const model = provider()("default");
    const options = { model, prompt: "Find me a hotel in London.", temperature: 0, maxOutputTokens: 16 };
    const { text, usage } = await generateText(options);
    expect(usage.inputTokens).toBeGreaterThan(5);
    const stream = streamText(options);
    let streamed = "";
    for await (const part of stream.textStream) streamed += part;
    expect(streamed).toBe(text);
    expect((await stream.usage).outputTokens).toBe(usage.outputTokens);
  });

  test("an object of a schema", async () => {
    const schema = z.strictObject({ city: z.string().max(10), stars: z.number().int().min(1).max(5) });
    const { object } = await generateObject({ model: provider()("default"), schema, prompt: "A hotel", maxOutputTokens: 100 });
    expect(schema.parse(object)).toEqual(object);
  });

  test("a tool that must be called", async () => {
    const { toolCalls } = await generateText({
      model: provider()("default"),
      prompt: "Book two nights.",
      maxOutputTokens: 100,
      toolChoice: { type: "tool", toolName: "book" },
      tools: {
        book: tool({
          description: "Books nights",
          inputSchema: jsonSchema<{ nights: number }>({
            type: "object",
            properties: { nights: { enum: [1, 2, 3] } },
            required: ["nights"],
            additionalProperties: false,
          }),
        }),
      },
    });
    expect(toolCalls[0].toolName).toBe("book");
    expect([1, 2, 3]).toContain((toolCalls[0].input as { nights: number }).nights);
  });

  test("embeddings", async () => {
    const { embeddings } = await embedMany({ model: provider().textEmbeddingModel("default"), values: ["hotel", "train"] });
    expect(embeddings.map((e) => e.length)).toEqual([320, 320]);
  });
});

describe("LangChain.js", () => {
  const chat = (options: object = {}) =>
    new ChatOpenAI({
      model: "default",
      apiKey: "none",
      temperature: 0,
      maxTokens: 16,
      configuration: { baseURL: `${running.url}/v1` },
      ...options,
    });

  test("a message, whole and streamed", async () => {
    const whole = await chat().invoke("Find me a hotel in London.");
    let streamed = "";
    for await (const part of await chat().stream("Find me a hotel in London.")) streamed += part.content as string;
    expect(streamed).toBe(whole.content);
    expect(whole.usage_metadata?.input_tokens).toBeGreaterThan(5);
  });

  test("structured output and tools", async () => {
    const schema = z.object({ yes: z.boolean() });
    const answer = await chat({ maxTokens: 60 })
      .withStructuredOutput(schema, { method: "jsonSchema", name: "answer" })
      .invoke("Is London in England?");
    expect(schema.parse(answer)).toEqual(answer);
    const book = langTool(() => "done", { name: "book", description: "Books", schema: z.object({ nights: z.enum(["one", "two"]) }) });
    const { tool_calls } = await chat({ maxTokens: 120 }).bindTools([book], { tool_choice: "book" }).invoke("Book two nights.");
    expect(tool_calls?.[0]).toMatchObject({ name: "book", args: { nights: expect.stringMatching(/^(one|two)$/) } });
  });

  test("embeddings", async () => {
    const embeddings = new OpenAIEmbeddings({ model: "default", apiKey: "none", configuration: { baseURL: `${running.url}/v1` } });
    expect((await embeddings.embedQuery("hotel")).length).toBe(320);
  });
});
