/**
 * Numbers at their extremes (float32, int32, 2^53, NaN, infinity, -0), by the library, the server, gRPC, the command line and
 * generation_config.json: each is honoured exactly, or refused by name with its range.
 */
import { Command } from "commander";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readDefaults } from "../../src/api/defaults.ts";
import { resolveGeneration } from "../../src/api/generation.ts";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";
import { instructionSets } from "../../src/backend/native.ts";
import { addSamplingOptions, generationOptions } from "../../src/cli/options.ts";
import { type RANGES, seedOf } from "../../src/engine/sampling.ts";
import { type ErnieConfig, readConfig } from "../../src/model/config.ts";
import { chatRequest } from "../../src/server/http/openai/request.ts";
import { readModel, writeModel } from "../api/folders.ts";
import { scratch } from "../checkpoint/craft.ts";
import { openGoldens } from "../goldens.ts";
import { failure, startGrpcHere, whole } from "../server/grpc/reflected.ts";
import { post } from "../server/start.ts";

const temporary = scratch();
const MAX = Number.MAX_SAFE_INTEGER;
const DENORMAL = 1e-45;
const HOT = { do_sample: true, temperature: 2, seed: 7 };

/** Option, value, and the value that it must mean the same as; or null where it must be refused. */
const TABLE: readonly (readonly [name: keyof typeof RANGES, value: number, same: Record<string, unknown> | null])[] = [
  ...[1e-5 - 1e-9, 1e-30, 1.2e-38, 1e-38, 1e-40, DENORMAL, 5e-324, 0, -0].map((t) => ["temperature", t, { do_sample: false }] as const),
  ...[1e6 + 1, 1e30, 3.5e38, 1e39, 1e308, Number.POSITIVE_INFINITY, Number.NaN, -1e-45, -1].map((t) => ["temperature", t, null] as const),
  ...[512, 513, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 32 + 1, MAX, -0].map((k) => ["top_k", k, { ...HOT, top_k: 0 }] as const),
  ...[-1, 1.5, 2 ** 53, 1e300, Number.NaN, Number.POSITIVE_INFINITY].map((k) => ["top_k", k, null] as const),
  ...[0, -0, DENORMAL, 1e-10].map((p) => ["top_p", p, { do_sample: false }] as const),
  ["top_p", 1 - 2 ** -53, { ...HOT, top_p: 1 }],
  ...[-DENORMAL, 1 + 1e-9, 2, Number.NaN, Number.NEGATIVE_INFINITY].map((p) => ["top_p", p, null] as const),
  ...[-0, 5e-324, DENORMAL].map((p) => ["min_p", p, { ...HOT, min_p: 0 }] as const),
  ["min_p", 1, { do_sample: false }],
  ...[-DENORMAL, 1.0001, Number.NaN].map((p) => ["min_p", p, null] as const),
  ...[0, -0, 0.009, -1, 1e6 + 1, DENORMAL, 1e39, Number.NaN].map((p) => ["repetition_penalty", p, null] as const),
  ...[1e6 + 1, -1e7, 1e39, Number.NEGATIVE_INFINITY, Number.NaN].flatMap((p) => [
    ["presence_penalty", p, null] as const,
    ["frequency_penalty", p, null] as const,
  ]),
  ...[-0, 5e-324].flatMap((p) => [["presence_penalty", p, HOT] as const, ["frequency_penalty", p, HOT] as const]),
  ...[10_000, 2 ** 31, 2 ** 32 + 2, MAX].map((n) => ["no_repeat_ngram_size", n, HOT] as const),
  ...[-1, 0.5, 2 ** 53, Number.NaN].map((n) => ["no_repeat_ngram_size", n, null] as const),
  ["seed", -0, { ...HOT, seed: 0 }],
  ...[-1, 0.5, 2 ** 53, 2 ** 64, Number.NaN, Number.POSITIVE_INFINITY].map((n) => ["seed", n, null] as const),
];

describe.each(["reference", ...instructionSets()])("the library, on %s", (isa) => {
  let model: CausalLM;
  let prompt: number[];
  beforeAll(async () => {
    const { folder, ids } = await openGoldens("moe-tiny").then(async (g) => ({ folder: g.folder, ids: await g.ids(7) }));
    prompt = ids;
    const device = isa === "reference" ? { device: "reference" } : { isa, threads: 1 };
    model = await AutoModelForCausalLM.from_pretrained(folder, { dtype: "fp32", kv_cache_tokens: 1024, ...device });
  });
  afterAll(() => model.dispose());
  const answer = async (options: object) =>
    (await model.generate({ input_ids: [prompt], eos_token_id: null, max_new_tokens: 6, ...options }))[0].slice(7);

  test("every value is honoured or refused", async () => {
    for (const [name, value, same] of TABLE) {
      const what = `${name} ${Object.is(value, -0) ? "-0" : value}`;
      if (same) expect(await answer({ ...HOT, [name]: value }), what).toEqual(await answer(same));
      else
        await expect(answer({ ...HOT, [name]: value }), what).rejects.toThrow(
          new RegExp(`^${name} is ${String(value).replace("+", "\\+")}; it must be a (whole )?number from `),
        );
    }
  });

  test("all controls at all ends at once choose a token", async () => {
    const ends = {
      temperature: [1e-5, 1e6],
      repetition_penalty: [0.01, 1e6],
      presence_penalty: [-1e6, 1e6],
      frequency_penalty: [-1e6, 1e6],
      top_p: [0, 1],
      min_p: [0, 1],
    };
    const names = Object.keys(ends) as (keyof typeof ends)[];
    for (let corner = 0; corner < 2 ** names.length; corner++) {
      const options = Object.fromEntries(names.map((name, i) => [name, ends[name][(corner >> i) & 1]]));
      const tokens = await answer({
        do_sample: true,
        seed: MAX,
        max_new_tokens: 3,
        ...options,
        logit_bias: { 1: corner % 2 ? 1e6 : -1e6 },
      });
      expect(tokens, JSON.stringify(options)).toHaveLength(3);
      for (const id of tokens) expect(id).toBeLessThan(512);
    }
  });
});

test("ids and counts of the library", async () => {
  const { folder, ids } = await openGoldens("moe-tiny").then(async (g) => ({ folder: g.folder, ids: await g.ids(7) }));
  const model = await AutoModelForCausalLM.from_pretrained(folder, { dtype: "fp32", kv_cache_tokens: 1024, threads: 1 });
  const answer = (options: object) => model.generate({ input_ids: [ids], eos_token_id: null, max_new_tokens: 2, ...options });
  for (const [options, error] of [
    [{ logit_bias: { 4294967297: 1 } }, "logit_bias: the token id is 4294967297; it must be a whole number below 512"],
    [{ logit_bias: { "1e1": 1 } }, "logit_bias: the token id is '1e1'; it must be a whole number"],
    [{ logit_bias: { "-1": 1 } }, "logit_bias: the token id is '-1'"],
    [{ logit_bias: new Map([[2 ** 53, 1]]) }, "logit_bias: the token id is 9007199254740992"],
    [{ logit_bias: { 1: 1e39 } }, "logit_bias: the bias of token 1 is 1e+39; it must be a number from -1000000 to 1000000, or -Infinity"],
    [{ logit_bias: { 1: Number.POSITIVE_INFINITY } }, "logit_bias: the bias of token 1 is Infinity"],
    [{ eos_token_id: 4294967298 }, "eos_token_id is 4294967298, not a token id"],
    [{ eos_token_id: 2 ** 31 - 1 }, "eos_token_id: 2147483647 is outside the vocabulary of 512"],
    [{ input_ids: [[4294967297]] }, "token id 4294967297 is outside the vocabulary of 512"],
    [{ max_new_tokens: 2 ** 53 }, "max_new_tokens is 9007199254740992; it must be a whole number from 1 to 2^53 - 1"],
    [{ max_length: 1e300 }, "max_length is 1e+300; it must be a whole number"],
    [{ ...HOT, num_return_sequences: 2 ** 32 + 1 }, "num_return_sequences is 4294967297; it must be a whole number from 1 to 4096"],
    [{ top_logprobs: 2 ** 32 + 1 }, "top_logprobs is 4294967297; it must be a whole number from 0 to"],
  ] as const)
    await expect(answer(options), JSON.stringify(options)).rejects.toThrow(error);
  const forbidding = (await answer({ logit_bias: { [(await answer({}))[0][7]]: Number.NEGATIVE_INFINITY } }))[0];
  expect(forbidding[7]).not.toBe((await answer({}))[0][7]);
  const several = await answer({ ...HOT, seed: MAX, num_return_sequences: 3, max_new_tokens: 8 });
  expect(new Set(several.map(String)).size).toBe(3);
  await model.dispose();
});

test("seeds of several answers count up, and on from the largest", () => {
  expect([seedOf(5, 0), seedOf(5, 3), seedOf(MAX, 0), seedOf(MAX, 1), seedOf(MAX - 1, 3)]).toEqual([5, 8, MAX, 0, 1]);
});

test("the server and gRPC", async () => {
  const { url, client } = await startGrpcHere();
  const messages = [{ role: "user", content: "Hi" }];
  const http = async (body: object | string) => {
    const text =
      typeof body === "string" ? body : JSON.stringify({ model: "default", messages, max_tokens: 6, seed: 7, temperature: 2, ...body });
    const response = await post(url, "/v1/chat/completions", text);
    return {
      status: response.status,
      ...((await response.json()) as { choices?: { message: { content: string } }[]; error?: { param: string; message: string } }),
    };
  };
  const text = async (body: object) => (await http(body)).choices?.[0].message.content;
  const grpc = async (sampling: object) =>
    (
      await whole(
        client.Chat({
          model: "default",
          messages: [{ role: "ROLE_USER", content: "Hi" }],
          options: { max_tokens: 6, sampling: { seed: 7, temperature: 2, ...sampling } },
        }),
      )
    ).text;
  const [greedy, drawn] = [await text({ temperature: 0 }), await text({})];
  expect(drawn).not.toBe(greedy);
  for (const [fields, same] of [
    ...[1e-38, 1e-40, DENORMAL, 5e-324].map((temperature) => [{ temperature }, greedy] as const),
    ...[0, DENORMAL].map((top_p) => [{ top_p }, greedy] as const),
    [{ min_p: DENORMAL }, drawn],
    [{ min_p: 1 }, greedy],
  ] as const) {
    expect(await text(fields), JSON.stringify(fields)).toBe(same);
    expect(await grpc(fields), JSON.stringify(fields)).toBe(same);
  }
  for (const top_k of [2 ** 31, 2 ** 32 + 1, MAX]) expect(await text({ top_k })).toBe(drawn);
  expect(await grpc({ top_k: 2 ** 32 - 1 })).toBe(drawn);
  expect(await text({ max_tokens: MAX, temperature: 0 })).toContain(greedy);

  for (const [field, value] of [
    ...["1e39", "2.0001", "-1e-45", "1e999", "NaN", '"1"'].map((v) => ["temperature", v] as const),
    ...["9007199254740993", "1e300", "-1", "0.5"].map((v) => ["top_k", v] as const),
    ...["9007199254740993", "-9007199254740993", "18446744073709551616", "0.5", "1e999"].map((v) => ["seed", v] as const),
    ...["0", "4294967297", "1e999"].map((v) => ["n", v] as const),
    ...["0", "9007199254740993", "1.5"].map((v) => ["max_tokens", v] as const),
    ["top_logprobs", "4294967297"],
    ["logit_bias", '{"4294967297": 1}'],
    ["logit_bias", '{"18446744073709551617": 1}'],
    ["logit_bias", '{"1": 1e39}'],
    ["presence_penalty", "1e39"],
    ["frequency_penalty", "-2.01"],
    ["repetition_penalty", "1e-45"],
  ] as const) {
    const { status, error } = await http(`{"model": "default", "messages": ${JSON.stringify(messages)}, "${field}": ${value}}`);
    expect(status, `${field} ${value}`).toBe(400);
    if (value !== "NaN") expect(`${error?.param} ${error?.message}`, `${field} ${value}`).toContain(field); // NaN is no JSON
  }
  const ids = await post(url, "/v1/completions", { model: "default", prompt: [4294967297] });
  expect([ids.status, ((await ids.json()) as { error: { message: string } }).error.message]).toEqual([
    400,
    expect.stringContaining("4294967297"),
  ]);
  for (const sampling of [
    { temperature: Number.NaN },
    { temperature: Number.POSITIVE_INFINITY },
    { seed: "9007199254740993" },
    { seed: "-9223372036854775808" },
    { logit_bias: [{ key: 2 ** 32 - 1, value: 1 }] },
    { min_p: -DENORMAL },
  ]) {
    const { code, details } = await failure(grpc(sampling));
    expect([code, details], JSON.stringify(sampling)).toEqual([3, expect.stringContaining(Object.keys(sampling)[0])]);
  }
});

test("the command line", () => {
  const parse = (...args: string[]) => {
    const command = addSamplingOptions(new Command())
      .exitOverride()
      .configureOutput({ writeErr: () => {} });
    return generationOptions(command.parse(args, { from: "user" }).opts());
  };
  const flag = (name: string) => `--${name.replaceAll("_", "-")}`;
  for (const [name, value, same] of TABLE) {
    const run = () => parse(flag(name), String(value));
    const text = `${name} ${value}`;
    if (same && !Object.is(value, -0)) expect(run()[name], text).toBe(value);
    else if (!same) expect(run, text).toThrow(/It must be a (whole )?number from /);
  }
  expect(() => parse("--logit-bias", "5=1e39")).toThrow("The bias must be a number from -1000000 to 1000000, or -inf");
  expect(() => parse("--logit-bias", "5=nan")).toThrow("The bias must be a number");
  expect(() => parse("--max-new-tokens", "9007199254740993")).toThrow("It must be a whole number from 1 to 2^53 - 1");
  expect(() => parse("--top-k", "1e3")).toThrow("It must be a whole number");
});

describe("generation_config.json", () => {
  const config = { vocabSize: 512 } as ErnieConfig;

  test.each<readonly [string, unknown]>([
    ...TABLE.filter(([name, value, same]) => same === null && name !== "seed" && Number.isFinite(value)).map(
      ([name, value]) => [name, value] as const,
    ),
    ["temperature", "0.7"],
    ["temperature", true],
    ["top_k", [5]],
    ["do_sample", "yes"],
    ["do_sample", 1],
    ["max_new_tokens", 0],
    ["max_length", 1.5],
    ["eos_token_id", 4294967298],
    ["eos_token_id", "2"],
    ["eos_token_id", [2, -1]],
    ["stop_strings", ["a", ""]],
    ["stop_strings", 5],
    ["stop_strings", new Array(65).fill("a")],
    ["suppress_tokens", [512]],
    ["suppress_tokens", new Array(5000).fill(1)],
    ["bad_words_ids", [5]],
    ["bad_words_ids", [[5], []]],
    ["bad_words_ids", [[4294967297]]],
  ])("refuses %s %j by file and field", (name, value) => {
    expect(() => readDefaults({ [name]: value }, config)).toThrow(new RegExp(`^generation_config.json: ${name} is `));
  });

  test("is refused before anything is loaded", async () => {
    const model = { ...(await readModel("moe-tiny")), generation: { top_p: 1.5 } };
    const folder = await writeModel(temporary, "broken-generation", model);
    await expect(AutoModelForCausalLM.from_pretrained(folder)).rejects.toThrow(
      "generation_config.json: top_p is 1.5; it must be a number from 0 to 1",
    );
  });

  test("null sets nothing; what has no effect is warned of; other fields are ignored", () => {
    const nothing = {
      temperature: null,
      top_k: null,
      eos_token_id: null,
      stop_strings: null,
      do_sample: null,
      num_beams: 1,
      min_new_tokens: 0,
      typical_p: 1,
      transformers_version: "4.56",
    };
    expect(readDefaults(nothing, config)).toEqual({ defaults: { num_beams: 1 }, warnings: [] });
    const { warnings } = readDefaults({ min_new_tokens: 5, forced_eos_token_id: 2, bad_words_ids: [[1, 2]] }, config);
    expect(warnings.map((warning) => /^generation_config.json: (\w+)/.exec(warning)?.[1])).toEqual([
      "bad_words_ids",
      "min_new_tokens",
      "forced_eos_token_id",
    ]);
  });

  test("the library and the server fill in the same", async () => {
    const full = readConfig((await readModel("moe-tiny")).config);
    const raw = {
      do_sample: true,
      temperature: 0.6,
      top_k: 20,
      top_p: 0.9,
      min_p: 0.05,
      repetition_penalty: 1.1,
      presence_penalty: 0.2,
      frequency_penalty: 0.3,
      no_repeat_ngram_size: 3,
      suppress_tokens: [7],
      bad_words_ids: [[9], [7]],
    };
    const { defaults } = readDefaults({ ...raw, max_new_tokens: 9, stop_strings: ["end"] }, full);
    const library = resolveGeneration({ seed: 5, tokenizer: {} as never }, defaults, full);
    const server = chatRequest({ model: "m", messages: [{ role: "user", content: "Hi" }], seed: 5 }, defaults, {
      owner: "x",
      signal: new AbortController().signal,
    });
    expect(server.sampling).toEqual(library.sampling);
    expect(library.sampling).toEqual({
      temperature: 0.6,
      topK: 20,
      topP: 0.9,
      minP: 0.05,
      repetitionPenalty: 1.1,
      presencePenalty: 0.2,
      frequencyPenalty: 0.3,
      noRepeatNgram: 3,
      logitBias: new Map([
        [7, Number.NEGATIVE_INFINITY],
        [9, Number.NEGATIVE_INFINITY],
      ]),
      seed: 5,
    });
    expect([server.maxTokens, server.stop]).toEqual([library.maxNewTokens(3), library.stopStrings]);
  });

  test("no_repeat_ngram_size and suppress_tokens hold while generating", async () => {
    const tiny = await readModel("moe-tiny");
    const plain = await AutoModelForCausalLM.from_pretrained(await writeModel(temporary, "plain", { ...tiny, generation: {} }), {
      threads: 1,
      kv_cache_tokens: 512,
    });
    const first = (await plain.generate({ input_ids: [[1, 2, 3]], max_new_tokens: 1, eos_token_id: null }))[0][3];
    await plain.dispose();
    const folder = await writeModel(temporary, "held", { ...tiny, generation: { no_repeat_ngram_size: 1, suppress_tokens: [first] } });
    const held = await AutoModelForCausalLM.from_pretrained(folder, { threads: 1, kv_cache_tokens: 512 });
    const [tokens] = await held.generate({ input_ids: [[1, 2, 3]], max_new_tokens: 60, eos_token_id: null });
    expect(new Set(tokens).size).toBe(63);
    expect(tokens).not.toContain(first);
    await held.dispose();
  });
});
