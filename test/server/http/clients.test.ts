/** Popular clients against a real server: the Vercel AI SDK through `mixtape/ai`, LangChain.js, and the README's curl. */
import { HumanMessage, SystemMessage } from "@langchain/core/messages";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { embedMany, generateObject, generateText, Output, streamText, tool } from "ai";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { createMixtape } from "../../../src/ai.ts";
import { type Running, start } from "../start.ts";

let running: Running;
beforeAll(async () => {
  running = await start();
});
afterAll(() => running.server.stop());

const QUESTION = "Find me a hotel in London.";
const Hotel = z.object({ stars: z.int().min(1).max(5), area: z.enum(["north", "south"]), names: z.array(z.string().max(8)).max(2) });

describe("AI SDK", () => {
  const mixtape = () => createMixtape({ baseURL: `${running.url}/v1`, apiKey: "none" });

  test("generateText", async () => {
    const { text, usage, finishReason } = await generateText({
      model: mixtape()("default"),
      prompt: QUESTION,
      temperature: 0,
      maxOutputTokens: 16,
    });
    const direct = await running.client.chat.completions.create({
      model: "default",
      messages: [{ role: "user", content: QUESTION }],
      temperature: 0,
      max_tokens: 16,
    });
    expect(text).toBe(direct.choices[0].message.content);
    expect(usage.outputTokens).toBe(direct.usage?.completion_tokens);
    expect(finishReason).toBe(direct.choices[0].finish_reason);
  });

  test("streamText", async () => {
    const { textStream, usage } = streamText({ model: mixtape()("default"), prompt: QUESTION, temperature: 0, maxOutputTokens: 16 });
    const pieces: string[] = [];
    for await (const piece of textStream) pieces.push(piece);
    expect(pieces.length).toBeGreaterThan(3);
    expect((await usage).outputTokens).toBeGreaterThan(3);
  });

  test("objects by a schema, whole and as output of a text", async () => {
    const { object } = await generateObject({ model: mixtape()("default"), schema: Hotel, prompt: QUESTION, temperature: 1, seed: 3 });
    expect(Hotel.parse(object)).toEqual(object);
    const { output } = await generateText({
      model: mixtape()("default"),
      output: Output.object({ schema: Hotel }),
      prompt: QUESTION,
      seed: 4,
    });
    expect(Hotel.parse(output)).toEqual(output);
  });

  test("a required tool is called", async () => {
    const called: unknown[] = [];
    const { toolCalls, toolResults } = await generateText({
      model: mixtape()("default"),
      prompt: "Weather in Rome?",
      toolChoice: "required",
      seed: 5,
      tools: {
        weather: tool({
          description: "The weather of a city",
          inputSchema: z.object({ city: z.enum(["Rome", "Paris"]) }),
          execute: (input) => {
            called.push(input);
            return { sunny: true };
          },
        }),
      },
    });
    expect(toolCalls.length).toBeGreaterThan(0);
    expect(called).toEqual(toolCalls.map((call) => call.input));
    expect(toolResults[0].output).toEqual({ sunny: true });
  });

  test("embedMany", async () => {
    const { embeddings } = await embedMany({ model: mixtape().embeddingModel("default"), values: ["one", "two"] });
    expect(embeddings.map((e) => e.length)).toEqual([320, 320]);
  });

  test("an error carries the server's message", async () => {
    const asked = generateText({ model: mixtape()("nope"), prompt: "x", maxRetries: 0 });
    await expect(asked).rejects.toMatchObject({ statusCode: 404, message: expect.stringContaining("nope") });
  });
});

describe("LangChain.js", () => {
  const chat = (more: object = {}) =>
    new ChatOpenAI({ model: "default", apiKey: "none", configuration: { baseURL: `${running.url}/v1` }, maxRetries: 0, ...more });

  test("invoke, and stream", async () => {
    const messages = [new SystemMessage("You book hotels."), new HumanMessage(QUESTION)];
    const model = chat({ temperature: 0, maxTokens: 16 });
    const answer = await model.invoke(messages);
    expect(answer.usage_metadata?.output_tokens).toBeGreaterThan(3);
    let streamed = "";
    for await (const piece of await model.stream(messages)) streamed += piece.text;
    expect(streamed).toBe(answer.text);
  });

  test("structured output, by schema and by a call", async () => {
    for (const method of ["jsonSchema", "functionCalling"] as const) {
      const value = await chat({ temperature: 1 }).withStructuredOutput(Hotel, { method, name: "hotel", strict: true }).invoke(QUESTION);
      expect(Hotel.parse(value)).toEqual(value);
    }
  });

  test("tools", async () => {
    const weather = langchainTool(({ city }: { city: string }) => city, {
      name: "weather",
      description: "The weather of a city",
      schema: z.object({ city: z.enum(["Rome", "Paris"]) }),
    });
    const { tool_calls } = await chat().bindTools([weather], { tool_choice: "weather" }).invoke("Weather in Rome?");
    expect(tool_calls?.[0]).toMatchObject({ name: "weather", args: { city: expect.stringMatching(/^(Rome|Paris)$/) } });
  });

  test("embeddings", async () => {
    const embeddings = new OpenAIEmbeddings({ model: "default", apiKey: "none", configuration: { baseURL: `${running.url}/v1` } });
    expect(await embeddings.embedQuery("one")).toHaveLength(320);
  });
});
