/** `generate` on the fixture checkpoints: its output, and the effect of each option. Long because every option has a test. */
import { getEventListeners } from "node:events";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { AutoModelForCausalLM, type CausalLM } from "../../src/api/model.ts";
import { TextStreamer } from "../../src/api/streamers.ts";
import { scratch } from "../checkpoint/craft.ts";
import { GOLDENS, type Goldens, openGoldens } from "../goldens.ts";
import { readModel, words, writeModel } from "./folders.ts";

const LOAD = { dtype: "fp32", threads: 2, kv_cache_tokens: 4096 };
const temporary = scratch();

/** Puts padding to the left (or right) of rows, up to the longest and `extra` more. */
function pad(rows: readonly (readonly number[])[], side: "left" | "right", extra = 0) {
  const length = Math.max(...rows.map((r) => r.length)) + extra;
  const join = (row: readonly number[], filler: number[]) => (side === "left" ? [...filler, ...row] : [...row, ...filler]);
  return {
    input_ids: rows.map((row) => join(row, new Array(length - row.length).fill(0))),
    attention_mask: rows.map((row) =>
      join(
        row.map(() => 1),
        new Array(length - row.length).fill(0),
      ),
    ),
  };
}

describe.each(["moe-tiny", "dense-tiny", "moe-bias", "dense-bias", "moe-ragged"])("%s continues as transformers does", (variant) => {
  let model: CausalLM;
  let goldens: Goldens;
  let prompts: number[][];
  let answers: (readonly number[])[];
  const options = { max_new_tokens: 24, eos_token_id: null };
  beforeAll(async () => {
    goldens = await openGoldens(variant);
    model = await AutoModelForCausalLM.from_pretrained(goldens.folder, LOAD);
    prompts = await Promise.all(goldens.lengths.map((n) => goldens.ids(n)));
    answers = goldens.lengths.map((n) => goldens.greedy[n]);
  });
  afterAll(() => model.dispose());

  test("prompts of different lengths in one batch", async () => {
    expect(await model.generate({ input_ids: prompts, ...options })).toEqual(prompts.map((p, i) => [...p, ...answers[i]]));
  });

  test.each(["left", "right"] as const)("padding on the %s, returned unchanged", async (side) => {
    const inputs = pad(prompts, side, 3);
    expect(await model.generate({ ...inputs, ...options })).toEqual(inputs.input_ids.map((row, i) => [...row, ...answers[i]]));
  });

  test("one row without the outer list", async () => {
    expect(await model.generate({ input_ids: prompts[1], ...options })).toEqual([[...prompts[1], ...answers[1]]]);
  });
});

describe("options", () => {
  let model: CausalLM;
  let p1: number[];
  let p7: number[];
  let p33: number[];
  /** 285 x 7, 89 x 2, then 416. */
  let greedy7: readonly number[];
  let greedy33: readonly number[];
  beforeAll(async () => {
    const goldens = await openGoldens("moe-tiny");
    model = await AutoModelForCausalLM.from_pretrained(goldens.folder, LOAD);
    [p1, p7, p33] = await Promise.all([goldens.ids(1), goldens.ids(7), goldens.ids(33)]);
    [greedy7, greedy33] = [goldens.greedy[7], goldens.greedy[33]];
  });
  afterAll(() => model.dispose());
  const answer = async (options: object, prompt = p7) =>
    (await model.generate({ input_ids: [prompt], eos_token_id: null, max_new_tokens: 24, ...options }))[0].slice(prompt.length);
  const sampled = { do_sample: true, temperature: 3 };

  describe("length", () => {
    test("max_length counts the prompt", async () => {
      const [row] = await model.generate({ input_ids: [p7], max_length: 12, eos_token_id: null });
      expect(row).toEqual([...p7, ...greedy7.slice(0, 5)]);
    });

    test("max_length counts padding, as in transformers", async () => {
      const inputs = pad([p7], "left", 3);
      const [row] = await model.generate({ ...inputs, max_length: 12, eos_token_id: null });
      expect(row).toEqual([...inputs.input_ids[0], ...greedy7.slice(0, 2)]);
    });

    test("max_new_tokens overrides max_length", async () => {
      expect(await answer({ max_new_tokens: 3, max_length: 8 })).toEqual(greedy7.slice(0, 3));
    });

    test("256 new tokens by default", async () => {
      const [row] = await model.generate({ input_ids: [p7], eos_token_id: null });
      expect(row.length).toBe(7 + 256);
    });

    test("a prompt that fills max_length is an error", async () => {
      await expect(model.generate({ input_ids: [p7], max_length: 7 })).rejects.toThrow(/^the prompt has 7 tokens, and max_length is 7; /);
    });
  });

  describe("eos_token_id", () => {
    test("a number ends the answer and is part of it", async () => {
      expect(await answer({ eos_token_id: 89 })).toEqual(greedy7.slice(0, 8));
    });

    test("a list: whichever comes first", async () => {
      expect(await answer({ eos_token_id: [416, 89] })).toEqual(greedy7.slice(0, 8));
      expect(await answer({ eos_token_id: [416, 511] })).toEqual(greedy7.slice(0, 10));
    });

    test("null: none, and finish reasons are reported", async () => {
      const out = async (eos_token_id: number | null) =>
        (await model.generate({ input_ids: [p7], eos_token_id, max_new_tokens: 24, return_dict_in_generate: true })).finish_reasons;
      expect(await answer({ eos_token_id: null })).toEqual(greedy7);
      expect(await out(null)).toEqual(["length"]);
      expect(await out(89)).toEqual(["stop"]);
    });

    test("each prompt of a batch ends on its own", async () => {
      const rows = await model.generate({ input_ids: [p7, p33], eos_token_id: [89, 360], max_new_tokens: 24 });
      expect(rows).toEqual([
        [...p7, ...greedy7.slice(0, 8)],
        [...p33, ...greedy33.slice(0, 2)],
      ]);
    });
  });

  describe("defaults of the folder", () => {
    const load = async (name: string, generation: Record<string, unknown> | null, config: Record<string, unknown> = {}) => {
      const tiny = await readModel("moe-tiny");
      return AutoModelForCausalLM.from_pretrained(
        await writeModel(temporary, name, { ...tiny, generation, config: { ...tiny.config, ...config } }),
        LOAD,
      );
    };

    test("generation_config.json sets them, and options override it", async () => {
      const other = await load("defaults", { eos_token_id: [89], max_new_tokens: 20, repetition_penalty: 1, do_sample: false });
      const short = await load("defaults-short", { max_new_tokens: 4 });
      const answerOf = async (m: CausalLM, options: object = {}) => (await m.generate({ input_ids: [p7], ...options }))[0].slice(7);
      expect(await answerOf(other)).toEqual(greedy7.slice(0, 8));
      expect(await answerOf(other, { eos_token_id: null })).toEqual(greedy7.slice(0, 20));
      expect(await answerOf(other, { eos_token_id: 285 })).toEqual(greedy7.slice(0, 1));
      expect(await answerOf(short)).toEqual(greedy7.slice(0, 4));
      expect(await answerOf(short, { max_length: 9 }), "max_length asked for counts more than a default").toEqual(greedy7.slice(0, 2));
      await other.dispose();
      await short.dispose();
    });

    test("sampling by default, greedy on request", async () => {
      const other = await load("defaults-sampling", { do_sample: true, temperature: 3, top_k: 200, max_new_tokens: 12 });
      const draw = async (options: object) => (await other.generate({ input_ids: [p7], ...options }))[0].slice(7);
      expect(await draw({ seed: 1 })).toEqual(await answer({ do_sample: true, temperature: 3, top_k: 200, seed: 1, max_new_tokens: 12 }));
      expect(await draw({ seed: 1 })).not.toEqual(await draw({ seed: 2 }));
      expect(await draw({ do_sample: false })).toEqual(greedy7.slice(0, 12));
      expect(await draw({ top_k: 1, seed: 1 })).toEqual(greedy7.slice(0, 12));
      await other.dispose();
    });

    test("config.json names the end token if generation_config.json does not", async () => {
      const other = await load("defaults-eos", null, { eos_token_id: [5, 89] });
      expect((await other.generate({ input_ids: [p7], max_new_tokens: 24 }))[0].slice(7)).toEqual(greedy7.slice(0, 8));
      await other.dispose();
    });
  });

  describe("sampling", () => {
    test("the same seed repeats, another differs, and without one every answer differs", async () => {
      expect(await answer({ ...sampled, seed: 11 })).toEqual(await answer({ ...sampled, seed: 11 }));
      expect(await answer({ ...sampled, seed: 11 })).not.toEqual(await answer({ ...sampled, seed: 12 }));
      expect(await answer({ ...sampled, seed: 11 })).not.toEqual(await answer({ ...sampled, seed: 11 + 2 ** 40 }));
      expect(await answer(sampled)).not.toEqual(await answer(sampled));
    });

    test("temperature 0 and top_k 1 are greedy", async () => {
      expect(await answer({ do_sample: true, temperature: 0 })).toEqual(greedy7);
      expect(await answer({ do_sample: true, top_k: 1 })).toEqual(greedy7);
      expect(await answer({ do_sample: false, temperature: 3, top_k: 2 }), "not sampling: ignored").toEqual(greedy7);
    });

    test("num_return_sequences: answers to one prompt are consecutive and all different, with consecutive seeds", async () => {
      const rows = await model.generate({
        input_ids: [p7, p33],
        num_return_sequences: 3,
        ...sampled,
        seed: 40,
        max_new_tokens: 12,
        eos_token_id: null,
      });
      expect(rows.map((r) => r.length)).toEqual([19, 19, 19, 45, 45, 45]);
      rows.forEach((r, i) => {
        expect(r.slice(0, i < 3 ? 7 : 33)).toEqual(i < 3 ? p7 : p33);
      });
      expect(new Set(rows.map((r) => r.slice(-12).join())).size).toBe(6);
      expect(rows[1].slice(7)).toEqual(await answer({ ...sampled, seed: 41, max_new_tokens: 12 }));
    });

    test("the same prompt twice in a batch gets two answers", async () => {
      const [a, b] = await model.generate({ input_ids: [p7, p7], ...sampled, seed: 3, max_new_tokens: 12, eos_token_id: null });
      expect(a).not.toEqual(b);
    });

    test("several greedy answers are an error", async () => {
      await expect(answer({ num_return_sequences: 2 })).rejects.toThrow(/num_return_sequences is 2, but without do_sample/);
    });
  });

  describe("controls", () => {
    test("logit_bias forbids and forces, as a record or a map", async () => {
      const without = await answer({ logit_bias: { 285: Number.NEGATIVE_INFINITY } });
      expect(without).not.toContain(285);
      const { logits } = await model.forward({ input_ids: [p7] });
      const last = [...logits.data.subarray(6 * 512)];
      last[285] = Number.NEGATIVE_INFINITY;
      expect(without[0]).toBe(last.indexOf(Math.max(...last)));
      expect(await answer({ logit_bias: new Map([[77, 1000]]) })).toEqual(new Array(24).fill(77));
      const drawn = await answer({ do_sample: true, temperature: 50, seed: 5, logit_bias: { 3: 1000, 4: 1000 } });
      expect(new Set(drawn)).toEqual(new Set([3, 4]));
    });

    test("a bias for every token", async () => {
      const bias = Object.fromEntries(Array.from({ length: 512 }, (_, id) => [id, id === 300 ? 0 : Number.NEGATIVE_INFINITY]));
      expect(await answer({ logit_bias: bias })).toEqual(new Array(24).fill(300));
    });

    test("no_repeat_ngram_size: no pair of tokens twice, prompt included", async () => {
      const all = [...p7, ...(await answer({ no_repeat_ngram_size: 2, max_new_tokens: 60 }))];
      const pairs = all.slice(1).map((id, i) => `${all[i]},${id}`);
      expect(new Set(pairs).size).toBe(pairs.length);
    });

    test("penalties: of what occurred, prompt included; of the answer alone, once and by count", async () => {
      const { logits } = await model.forward({ input_ids: [p33] });
      const last = [...logits.data.subarray(32 * 512)];
      const order = [...last.keys()].sort((a, b) => last[b] - last[a]);
      // A presence penalty leaves the first token alone (nothing is answered yet), then pushes it far down.
      const presence = await answer({ presence_penalty: 1000 }, p33);
      expect(presence[0]).toBe(order[0]);
      expect(new Set(presence).size).toBe(24);
      const frequency = await answer({ frequency_penalty: 1000 }, p33);
      expect(frequency[0]).toBe(order[0]);
      expect(new Set(frequency).size).toBe(24);
      // A strong repetition penalty makes tokens of the prompt unlikely from the start.
      const repetition = await answer({ repetition_penalty: 1e6 }, p33);
      expect(new Set([...p33, ...repetition]).size).toBe(new Set(p33).size + 24);
    });
  });

  describe("stop_strings", () => {
    test("end the answer, also if they span tokens", async () => {
      const tokenizer = await words();
      expect(await answer({ stop_strings: "w89.", tokenizer })).toEqual(greedy7.slice(0, 8));
      expect(await answer({ stop_strings: ["never", "9.w41"], tokenizer })).toEqual(greedy7.slice(0, 10));
      expect(await answer({ stop_strings: ["w285.w285.w285."], tokenizer })).toEqual(greedy7.slice(0, 3));
      expect(await answer({ stop_strings: ["w89.w285."], tokenizer })).toEqual(greedy7);
      const out = await model.generate({
        input_ids: [p7, p33],
        stop_strings: "w89.",
        tokenizer,
        max_new_tokens: 24,
        return_dict_in_generate: true,
      });
      expect(out.finish_reasons).toEqual(["stop", "length"]);
    });

    test("of the prompt do not count", async () => {
      const tokenizer = await words();
      expect(await answer({ stop_strings: `w${p7[6]}.`, tokenizer })).toEqual(greedy7);
    });

    test("need a tokenizer, and text", async () => {
      await expect(answer({ stop_strings: "x" })).rejects.toThrow("stop_strings needs the option 'tokenizer'");
      await expect(answer({ stop_strings: [""], tokenizer: await words() })).rejects.toThrow("stop_strings must be non-empty strings");
    });
  });

  describe("streamers", () => {
    const recorder = () => {
      const events: unknown[] = [];
      return { events, put: (ids: readonly number[]) => void events.push([...ids]), end: () => void events.push("end") };
    };

    test("get the prompt, then each id, then the end", async () => {
      const streamer = recorder();
      await answer({ streamer, max_new_tokens: 5 });
      expect(streamer.events).toEqual([p7, ...greedy7.slice(0, 5).map((id) => [id]), "end"]);
    });

    test("receive each id when it is generated, not at the end", async () => {
      let seen = 0;
      const controller = new AbortController();
      const put = () => void (++seen === 4 && controller.abort(new Error("enough")));
      await expect(answer({ streamer: { put, end() {} }, signal: controller.signal, max_new_tokens: 2000 })).rejects.toThrow("enough");
      expect(seen).toBeLessThan(20);
    });

    test("take one answer only", async () => {
      await expect(model.generate({ input_ids: [p7, p7], streamer: recorder() })).rejects.toThrow(
        "a streamer takes one answer, and 2 were asked for",
      );
    });

    test("that throw end the request", async () => {
      const streamer = recorder();
      const put = () => {
        throw new Error("full");
      };
      await expect(answer({ streamer: { ...streamer, put }, max_new_tokens: 2000 })).rejects.toThrow("full");
      expect(streamer.events).toEqual(["end"]);
      await expect.poll(() => model.engine.cache.free).toBe(model.engine.cache.count);
    });

    test("TextStreamer writes the text as it is generated", async () => {
      const tokenizer = await words();
      const pieces: string[] = [];
      const ids: number[] = [];
      const make = (options: object = {}) =>
        new TextStreamer(tokenizer, { callback_function: (text) => void pieces.push(text), ...options });
      await answer({
        streamer: make({ skip_prompt: true, token_callback_function: (each: number[]) => void ids.push(...each) }),
        max_new_tokens: 9,
      });
      expect(pieces).toEqual(greedy7.slice(0, 9).map((id) => `w${id}.`));
      expect(ids).toEqual(greedy7.slice(0, 9));
      pieces.length = 0;
      await answer({ streamer: make(), max_new_tokens: 2 });
      expect(pieces.join("")).toBe(tokenizer.decode([...p7, ...greedy7.slice(0, 2)], { skip_special_tokens: true }));
    });
  });

  describe("signal", () => {
    test("aborts with its reason, frees the cache, and does not affect others", async () => {
      const controller = new AbortController();
      const other = model.generate({ input_ids: [p33], max_new_tokens: 24, eos_token_id: null });
      const aborted = model.generate({ input_ids: [p7, p33], max_new_tokens: 3000, eos_token_id: null, signal: controller.signal });
      setTimeout(() => controller.abort(new RangeError("changed my mind")), 15);
      await expect(aborted).rejects.toThrow(new RangeError("changed my mind"));
      expect((await other)[0].slice(33)).toEqual(greedy33);
      await expect.poll(() => model.engine.cache.free).toBe(model.engine.cache.count);
      expect(await answer({})).toEqual(greedy7);
    });

    test("one signal for many calls: no warning, and nothing stays attached to it", async () => {
      const warnings: string[] = [];
      const listen = (warning: Error) => void warnings.push(warning.message);
      process.on("warning", listen);
      const { signal } = new AbortController();
      await Promise.all(Array.from({ length: 20 }, () => model.generate({ input_ids: [p7], max_new_tokens: 2, signal })));
      await new Promise((resolve) => setImmediate(resolve));
      process.off("warning", listen);
      expect(warnings).toEqual([]);
      expect(getEventListeners(signal, "abort")).toEqual([]);
    });

    test("aborted before: nothing runs", async () => {
      let put = 0;
      const streamer = { put: () => void put++, end() {} };
      await expect(answer({ signal: AbortSignal.abort(), streamer })).rejects.toThrow(/aborted/);
      expect(put).toBe(0);
    });

    test("an error in one answer ends the others of the call", async () => {
      await expect(model.generate({ input_ids: [p7, [512]], max_new_tokens: 3000, eos_token_id: null })).rejects.toThrow(
        "token id 512 is outside the vocabulary of 512",
      );
      await expect.poll(() => model.engine.cache.free).toBe(model.engine.cache.count);
    });
  });

  describe("return_dict_in_generate", () => {
    const logSoftmax = (x: Float32Array) => {
      const top = Math.max(...x);
      const total = Math.log(x.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top;
      return [...x].map((v) => v - total);
    };

    test.each([
      ["greedy", {}],
      ["penalised", { repetition_penalty: 1.5, logit_bias: { 285: -3 } }],
      ["sampled", { do_sample: true, temperature: 2, top_k: 50, seed: 4 }],
    ])("%s: log-probabilities are those of the model alone", async (_name, options) => {
      const out = await model.generate({
        input_ids: [p7, p33],
        max_new_tokens: 10,
        eos_token_id: null,
        return_dict_in_generate: true,
        top_logprobs: 5,
        ...options,
      });
      for (const [i, prompt] of [p7, p33].entries()) {
        const sequence = out.sequences[i];
        const { logits } = await model.forward({ input_ids: [sequence] });
        out.logprobs[i].forEach((logprob, t) => {
          const at = prompt.length - 1 + t;
          const expected = logSoftmax(logits.data.subarray(at * 512, (at + 1) * 512));
          expect(Math.abs(logprob - expected[sequence[at + 1]])).toBeLessThan(1e-4);
          const best = [...expected.keys()].sort((a, b) => expected[b] - expected[a]).slice(0, 5);
          const top = out.top_logprobs?.[i][t] ?? [];
          expect(top.map((each) => each.id)).toEqual(best);
          for (const each of top) expect(Math.abs(each.logprob - expected[each.id])).toBeLessThan(1e-4);
        });
        expect(out.logprobs[i].length).toBe(10);
      }
    });

    test("a larger top_logprobs starts with the entries of a smaller one", async () => {
      const top = async (top_logprobs: number) =>
        (await model.generate({ input_ids: [p7], max_new_tokens: 3, return_dict_in_generate: true, top_logprobs })).top_logprobs?.[0];
      const all = (await top(512)) ?? [];
      expect(all.map((each) => new Set(each.map((e) => e.id)).size)).toEqual([512, 512, 512]);
      for (const each of all) expect(each.reduce((sum, e) => sum + Math.exp(e.logprob), 0)).toBeCloseTo(1, 5);
      expect(await top(7)).toEqual(all.map((each) => each.slice(0, 7)));
    });

    test("top_logprobs beyond the vocabulary is an error, and 0 returns none", async () => {
      await expect(answer({ top_logprobs: 513 })).rejects.toThrow("top_logprobs is 513; it must be a whole number from 0 to");
      expect(await model.generate({ input_ids: [p7], max_new_tokens: 2, return_dict_in_generate: true })).not.toHaveProperty(
        "top_logprobs",
      );
    });
  });

  describe("invalid options are errors that say so", () => {
    test("unknown options, with the nearest that is known, or a list of them", async () => {
      await expect(answer({ topk: 5 } as object)).rejects.toThrow(/^generate has no option 'topk'; did you mean 'top_k'\?$/);
      await expect(answer({ max_tokens: 5 })).rejects.toThrow(/^generate has no option 'max_tokens'; did you mean 'max_new_tokens'\?$/);
      await expect(answer({ zzz: 5 } as object)).rejects.toThrow(
        /^generate has no option 'zzz'; it has input_ids, attention_mask, max_length, .*num_beams$/,
      );
    });

    test.each([
      [{ max_new_tokens: 0 }, "max_new_tokens is 0; it must be a whole number from 1 to 2^53 - 1"],
      [{ max_new_tokens: 1.5 }, "max_new_tokens is 1.5; it must be a whole number"],
      [{ max_length: -1 }, "max_length is -1; it must be a whole number"],
      [{ num_return_sequences: 0 }, "num_return_sequences is 0; it must be a whole number from 1 to 4096"],
      [{ num_beams: 4 }, "num_beams is 4; beam search is not supported"],
      [{ do_sample: true, temperature: -1 }, "temperature is -1; it must be a number from 0 to 1000000"],
      [{ do_sample: true, temperature: Number.NaN }, "temperature is NaN"],
      [{ do_sample: true, top_k: -1 }, "top_k is -1; it must be a whole number from 0 to 2^53 - 1"],
      [{ do_sample: true, top_k: 1.5 }, "top_k is 1.5"],
      [{ do_sample: true, top_p: -0.1 }, "top_p is -0.1; it must be a number from 0 to 1"],
      [{ do_sample: true, top_p: 1.01 }, "top_p is 1.01"],
      [{ do_sample: true, min_p: 2 }, "min_p is 2; it must be a number from 0 to 1"],
      [{ repetition_penalty: 0 }, "repetition_penalty is 0; it must be a number from 0.01 to 1000000"],
      [{ presence_penalty: Number.POSITIVE_INFINITY }, "presence_penalty is Infinity"],
      [{ frequency_penalty: Number.NaN }, "frequency_penalty is NaN"],
      [{ no_repeat_ngram_size: -2 }, "no_repeat_ngram_size is -2"],
      [{ seed: -1 }, "seed is -1; it must be a whole number from 0"],
      [{ seed: 2 ** 53 }, "seed is"],
      [{ logit_bias: { 512: 1 } }, "logit_bias: the token id is 512; it must be a whole number below 512"],
      [{ logit_bias: { 5: Number.NaN } }, "logit_bias: the bias of token 5 is NaN"],
      [{ logit_bias: { 5: Number.POSITIVE_INFINITY } }, "logit_bias: the bias of token 5 is Infinity"],
      [{ eos_token_id: -1 }, "eos_token_id is -1, not a token id or a list of them"],
      [{ eos_token_id: [2, 0.5] }, "eos_token_id is [2,0.5]"],
    ])("%o", async (options, message) => {
      await expect(answer(options)).rejects.toThrow(message);
    });

    test.each([
      [{ input_ids: [] }, "the prompt is empty: input_ids has no rows"],
      [{ input_ids: [[]] }, "the prompt is empty: at least one token is needed"],
      [{ input_ids: [[5, 6]], attention_mask: [[0, 0]] }, "the prompt is empty"],
      [{ input_ids: [[5, 6]], attention_mask: [[1]] }, "attention_mask has another shape than input_ids"],
      [{ input_ids: [[5, 6]], attention_mask: [[1, 1], [1]] }, "attention_mask has another shape than input_ids"],
      [{ input_ids: [[5, 6, 7]], attention_mask: [[1, 0, 1]] }, "attention_mask, row 0: padding must stand before or after the tokens"],
      [{ input_ids: "hello" }, "input_ids must be rows of token ids: number[][]"],
      [{ input_ids: ["hello"] }, "input_ids must be rows of token ids: number[][]"],
      [{ input_ids: [null] }, "input_ids must be rows of token ids: number[][]"],
      [{}, "input_ids must be rows of token ids: number[][]"],
      [{ input_ids: [[512]] }, "token id 512 is outside the vocabulary of 512"],
      [{ input_ids: [[-1]] }, "token id -1 is outside the vocabulary of 512"],
      [{ input_ids: [[1.5]] }, "token id 1.5 is outside the vocabulary of 512"],
      [{ input_ids: [new Array(4097).fill(5)] }, "the prompt has 4097 tokens; the model's longest position is 4096"],
    ])("inputs, case %#", async (inputs, message) => {
      for (const call of [model.generate(inputs as { input_ids: number[][] }), model.forward(inputs as { input_ids: number[][] })])
        await expect(call).rejects.toThrow(message);
    });

    test("a message is one line", async () => {
      const error = await answer({ bogus: 1 }).catch((e: Error) => e);
      expect((error as Error).message).not.toMatch(/\n/);
    });
  });

  test("an answer ends at the last position", async () => {
    const small = await AutoModelForCausalLM.from_pretrained(`${GOLDENS}dense-bias`, LOAD);
    const out = await small.generate({
      input_ids: [new Array(500).fill(5)],
      max_new_tokens: 100,
      eos_token_id: null,
      return_dict_in_generate: true,
    });
    expect(out.sequences[0].length).toBe(512);
    expect(out.finish_reasons).toEqual(["length"]);
    await small.dispose();
  });

  test("dispose: running and later calls fail, and disposing again does nothing", async () => {
    const other = await AutoModelForCausalLM.from_pretrained(`${GOLDENS}moe-tiny`, LOAD);
    const running = other.generate({ input_ids: [p1], max_new_tokens: 3000, eos_token_id: null });
    const failed = expect(running).rejects.toThrow("the model has been disposed of");
    await new Promise((resolve) => setTimeout(resolve, 20));
    await other.dispose();
    await failed;
    await expect(other.generate({ input_ids: [p1] })).rejects.toThrow("the model has been disposed of");
    await expect(other.forward({ input_ids: [p1] })).rejects.toThrow("the model has been disposed of");
    await other.dispose();
  });
});
