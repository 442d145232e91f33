/** Numbers at their extremes, from every side: each is honoured, or refused by name. And the defaults of generation_config.json. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readDefaults, resolveSampling } from "../../src/api/defaults.ts";
import { checkSampling } from "../../src/engine/sampling.ts";
import { AutoModelForCausalLM, type CausalLM } from "../../src/index.ts";
import { chatRequest, completionRequest } from "../../src/server/http/openai/request.ts";
import type { ChatBody, CompletionBody } from "../../src/server/http/openai/schema.ts";

const PROMPT = [300, 412, 5000, 77];
const who = { owner: "me", signal: new AbortController().signal };

describe("extremes", () => {
  let model: CausalLM;
  beforeAll(async () => {
    model = await AutoModelForCausalLM.from_pretrained("default", { kv_cache_tokens: 4096 });
  });
  afterAll(() => model?.dispose());
  const draw = async (options: object) =>
    (
      await model.generate({ input_ids: [PROMPT], max_new_tokens: 12, eos_token_id: null, do_sample: true, seed: 5, top_p: 1, ...options })
    )[0];

  test.each([1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 9.9e-6])("a temperature of %d is greedy", async (temperature) => {
    const greedy = await draw({ do_sample: false });
    for (const seed of [1, 2, 3]) expect(await draw({ temperature, seed })).toEqual(greedy);
  });

  test.each([2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32 + 1, 2 ** 53 - 1])("a top_k of %d is no limit", async (top_k) => {
    expect(await draw({ temperature: 2, top_k })).toEqual(await draw({ temperature: 2, top_k: 0 }));
  });

  test.each([
    ["no_repeat_ngram_size", 2 ** 32 + 1],
    ["min_p", 1e-45],
    ["top_p", 1 - 1e-12],
  ])("%s %d has no effect", async (name, value) => {
    expect(await draw({ temperature: 2, [name]: value })).toEqual(await draw({ temperature: 2 }));
  });

  test.each([
    ["top_p", 1e-45],
    ["min_p", 1],
  ])("%s %d leaves the likeliest", async (name, value) => {
    expect(await draw({ temperature: 2, [name]: value })).toEqual(await draw({ do_sample: false }));
  });

  test.each([
    [{ temperature: 1e6, repetition_penalty: 1e6, presence_penalty: -1e6, frequency_penalty: 1e6 }],
    [{ temperature: 1e-5, repetition_penalty: 0.01, presence_penalty: 1e6, logit_bias: { 5: -1e6, 6: 1e6, 7: Number.NEGATIVE_INFINITY } }],
  ])("%j at once give tokens", async (options) => {
    for (const id of await draw(options)) expect(id).toBeLessThan(20_480);
  });

  test.each([
    ["temperature", [-1, -1e-45, 1e39, 1_000_001, Number.NaN, Number.POSITIVE_INFINITY, "1"]],
    ["top_k", [-1, 1.5, Number.NaN, "4"]],
    ["top_p", [-1e-9, 1.1, Number.NaN]],
    ["min_p", [-1e-9, 1.1, Number.NaN]],
    ["repetition_penalty", [0, 1e-3, 1e39, Number.NaN]],
    ["presence_penalty", [1e39, -1e39, Number.NaN, Number.NEGATIVE_INFINITY]],
    ["frequency_penalty", [1e7, -1e7, Number.NaN]],
    ["no_repeat_ngram_size", [-1, 0.5]],
    ["seed", [-1, 0.5, 2 ** 53]],
    [
      "logit_bias",
      [{ "-1": 1 }, { "": 1 }, { "1e3": 1 }, { 99999999: 1 }, { [2 ** 32 + 1]: 1 }, { 5: 1e39 }, { 5: Number.NaN }, { 5: "1" }],
    ],
    ["max_new_tokens", [0, -1, 1.5, Number.NaN]],
  ])("%s: values out of range are refused by name", async (name, values) => {
    for (const value of values)
      await expect(draw({ temperature: 1, [name]: value }), String(value)).rejects.toThrow(new RegExp(`^${name}\\b.*must be`));
  });
});

describe("the defaults of generation_config.json", () => {
  const DEFAULTS = {
    do_sample: true,
    temperature: 0.7,
    top_k: 20,
    top_p: 0.8,
    min_p: 0.05,
    repetition_penalty: 1.1,
    presence_penalty: 0.2,
    frequency_penalty: 0.1,
    no_repeat_ngram_size: 3,
  };
  const body = { model: "m", messages: [{ role: "user", content: "x" }], seed: 1 } as unknown as ChatBody;

  test("mean the same to the library and to the server's chats and completions", () => {
    const library = resolveSampling({ seed: 1 }, DEFAULTS, true);
    expect(library).toMatchObject({ temperature: 0.7, topK: 20, topP: 0.8, minP: 0.05, repetitionPenalty: 1.1, noRepeatNgram: 3 });
    expect(library).toMatchObject({ presencePenalty: 0.2, frequencyPenalty: 0.1 });
    expect(chatRequest(body, DEFAULTS, who).sampling).toEqual(library);
    const completion = { model: "m", prompt: "x", seed: 1 } as unknown as CompletionBody;
    expect(completionRequest(completion, { kind: "text", text: "x" }, DEFAULTS, who).sampling).toEqual(library);
  });

  test("give way to what a request says", () => {
    const asked = { ...body, temperature: 1.5, top_p: 0 } as ChatBody;
    expect(chatRequest(asked, DEFAULTS, who).sampling).toMatchObject({
      temperature: 1.5,
      topK: 20,
      topP: 0,
      noRepeatNgram: 3,
    });
    expect(chatRequest({ ...body, temperature: 0 } as ChatBody, DEFAULTS, who).sampling).toMatchObject({ temperature: 0, topK: 0 });
    expect(chatRequest({ ...body, seed: -1 } as ChatBody, {}, who).sampling.seed).toBe(2 ** 53 - 1);
  });

  test.each([
    [{ temperature: "hot" }, 'generation_config.json: temperature is "hot"; it must be a number'],
    [{ do_sample: "yes" }, 'generation_config.json: do_sample is "yes"; it must be true or false'],
    [{ top_p: 1.5 }, "generation_config.json: top_p is 1.5; it must be a number from 0 to 1"],
    [{ top_k: -1 }, "generation_config.json: top_k is -1; it must be a whole number from 0 to 2^53 - 1"],
    [{ repetition_penalty: 0 }, "generation_config.json: repetition_penalty is 0; it must be a number from 0.01 to 1000000"],
  ])("%j is an error that names file and field", (defaults, message) => {
    expect(() => readDefaults(defaults, { vocabSize: 100 })).toThrow(message);
  });

  test("that have no effect are named", () => {
    const warnings = (raw: object) => readDefaults({ ...raw }, { vocabSize: 100 }).warnings.join("; ");
    expect(warnings({ ...DEFAULTS, num_beams: 1, min_length: 0, bad_words_ids: null, suppress_tokens: [], typical_p: 1 })).toBe("");
    expect(warnings({ min_new_tokens: 5, num_beams: 4 })).toMatch(/min_new_tokens has no effect.*num_beams has no effect/);
  });

  test("are within the engine's ranges for the bundled model", () => {
    expect(() => checkSampling(resolveSampling({ seed: 0 }, DEFAULTS, true), 20_480)).not.toThrow();
  });
});
