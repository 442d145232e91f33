// `generate`, `info` and `quantize` on a tiny model with random weights.
import { spawn } from "node:child_process";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { binary, finished, run, temporary, tinyModel } from "./run.ts";

test("--ids prints the greedy continuation as ids, and --text as text", async () => {
  const model = tinyModel();
  const args = ["generate", "-m", model, "--ids", "5,6 7", "--greedy", "--max-new-tokens", "6"];
  const ids = await run(args);
  expect(ids).toMatchObject({ code: 0, err: "" });
  expect(ids.out).toMatch(/^\d+(,\d+){5}\n$/);
  const { ids: told } = JSON.parse((await run([...args, "--json"])).out) as { ids: number[] };
  expect(`${told.join(",")}\n`).toBe(ids.out);
  expect((await run([...args, "--text"])).out).not.toBe(ids.out);
});

test("--json has everything about an answer, and its seed gives it again", async () => {
  const model = tinyModel();
  const args = ["generate", "中文 abc", "-m", model, "--temperature", "1", "--max-new-tokens", "5", "--json"];
  const first = JSON.parse((await run(args)).out) as Record<string, unknown> & { ids: number[]; logprobs: number[]; seed: number };
  expect(first).toMatchObject({ prompt: "中文 abc", prompt_tokens: 6, new_tokens: 5, finish_reason: "length" });
  expect(first.logprobs).toHaveLength(5);
  expect(first.logprobs.every((x) => x <= 0)).toBe(true);
  expect(first["seconds"]).toBeGreaterThan(0);
  const again = JSON.parse((await run([...args, "--seed", String(first.seed)])).out) as { ids: number[]; text: string };
  expect(again.ids).toEqual(first.ids);
  expect(again.text).toBe(first["text"]);
});

test("standard input is the prompt, and what streams equals the text", async () => {
  const model = tinyModel();
  const options = ["-m", model, "--greedy", "--max-new-tokens", "12"];
  const piped = await run(["generate", ...options], { input: "abc\n" });
  const { text } = JSON.parse((await run(["generate", "abc", "--json", ...options])).out) as { text: string };
  expect(piped).toEqual({ code: 0, out: `${text}\n`, err: "" });
});

test("--stop ends before the text, --num-return-sequences gives several", async () => {
  const model = tinyModel();
  const options = ["generate", "abc", "-m", model, "--max-new-tokens", "20", "--json"];
  const whole = JSON.parse((await run([...options, "--greedy"])).out) as { text: string };
  const stop = whole.text.slice(6, 9);
  const cut = JSON.parse((await run([...options, "--greedy", "--stop", stop])).out) as { text: string; finish_reason: string };
  expect(cut).toMatchObject({ text: whole.text.slice(0, whole.text.indexOf(stop)), finish_reason: "stop" });
  const { answers } = JSON.parse((await run([...options, "--num-return-sequences", "3", "--seed", "4"])).out) as {
    answers: { seed: number }[];
  };
  expect(answers.map((a) => a.seed)).toEqual([4, 5, 6]);
});

test("--no-repeat-ngram-size and --logit-bias reach the model", async () => {
  const options = ["generate", "--ids", "5", "-m", tinyModel(), "--greedy", "--max-new-tokens", "8"];
  const biased = await run([...options, "--logit-bias", "9=1000"]);
  expect(biased.out).toBe("9,9,9,9,9,9,9,9\n");
  const varied = (await run([...options, "--logit-bias", "9=1000", "--no-repeat-ngram-size", "1"])).out.trim().split(",");
  expect(new Set(varied).size).toBe(8);
});

test("a reader that leaves ends it quietly", async () => {
  const child = spawn(process.execPath, [
    binary,
    "generate",
    "abc",
    "-m",
    tinyModel(),
    "--max-new-tokens",
    "3000",
    "--logit-bias",
    "2=-inf",
  ]);
  child.stdout.once("data", () => child.stdout.destroy());
  expect(await finished(child)).toMatchObject({ code: 0, err: "" });
});

test("Ctrl-C ends it with 130", async () => {
  const child = spawn(process.execPath, [
    binary,
    "generate",
    "abc",
    "-m",
    tinyModel(),
    "--max-new-tokens",
    "3000",
    "--logit-bias",
    "2=-inf",
  ]);
  child.stdout.once("data", () => child.kill("SIGINT"));
  const { code, err, out } = await finished(child);
  expect([code, err]).toEqual([130, ""]);
  expect(out.endsWith("\n")).toBe(true);
});

test("info counts parameters, those of chosen experts as active", async () => {
  const model = tinyModel();
  const facts = JSON.parse((await run(["info", model, "--json"])).out) as {
    parameters: { total: number; active: number };
    tokenizer: object;
  };
  // Three mixtures of 8 experts, 2 chosen, of 3 matrices 32 x 64.
  expect(facts.parameters.total - facts.parameters.active).toBe(3 * 6 * 3 * 32 * 64);
  expect(facts.tokenizer).toMatchObject({ file: "tokenizer.json", vocabulary: 512, chat_template: true });
  const { code, out } = await run(["info", "-m", model]);
  expect(code).toBe(0);
  for (const part of ["Ernie4_5_MoeForCausalLM", "8 a layer, 2 chosen", "KV cache a token", "tokenizer.json"]) expect(out).toContain(part);
});

test("info describes a folder without weights and without a tokenizer as far as it goes", async () => {
  const { code, out } = await run(["info", tinyModel({ "model.safetensors": null, "tokenizer.json": null })]);
  expect(code).toBe(0);
  expect(out).toContain("no model.safetensors in the folder");
});

test("quantize writes a folder that runs, and says the sizes", async () => {
  const out = join(temporary(), "int8");
  const done = await run(["quantize", tinyModel(), out, "--dtype", "int8"]);
  expect(done).toMatchObject({ code: 0, err: "" });
  expect(done.out).toMatch(/^before {2}1\.\d+ MB \(f32\)\nafter {3}[\d.]+ kB \(int8\), \d+ % of it, \d+ tensors in .+\n$/);
  expect(readdirSync(out)).toContain("tokenizer.json");
  expect((await run(["generate", "abc", "-m", out, "--greedy", "--max-new-tokens", "3"])).code).toBe(0);
});
