// `generate`, `info` and `quantize` on a tiny model with random weights.
import { spawn } from "node:child_process";
import { readdirSync, writeFileSync } from "node:fs";
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

test("--json has everything about an answer, and its seed reproduces it", async () => {
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

const SCHEMA = {
  type: "object",
  properties: { a: { enum: ["b", "c"] }, n: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["a", "n"],
  additionalProperties: false,
};

/** A file with this text. */
function fileWith(text: string): string {
  const file = join(temporary(), "answer schema.json");
  writeFileSync(file, text);
  return file;
}

test("--schema: the answer is JSON that satisfies it, also with --ids, several answers, or a byte order mark", async () => {
  const schema = fileWith(`\ufeff${JSON.stringify(SCHEMA)}`);
  const options = ["-m", tinyModel(), "--schema", schema, "--max-new-tokens", "80"];
  const check = (text: string) => {
    const value = JSON.parse(text) as { a: string; n: number };
    expect([Object.keys(value), ["b", "c"].includes(value.a), value.n >= 0 && value.n <= 99]).toEqual([["a", "n"], true, true]);
  };
  const plain = await run(["generate", "abc", "--greedy", ...options]);
  expect(plain).toMatchObject({ code: 0, err: "" });
  check(plain.out);
  const json = await run(["generate", "--chat", "abc", "--json", "--num-return-sequences", "2", "--seed", "3", ...options]);
  const { answers } = JSON.parse(json.out) as { answers: { text: string; finish_reason: string }[] };
  for (const { text } of answers) check(text);
  expect(answers.map((a) => a.finish_reason)).toEqual(["stop", "stop"]);
  check((await run(["generate", "--ids", "5,6", "--text", "--greedy", ...options])).out);
  expect((await run(["generate", "--ids", "5,6", "--greedy", ...options])).out).toMatch(/^\d+(,\d+)+\n$/);
});

test("--regex: the whole answer matches it; an answer that is cut off says so", async () => {
  const options = ["generate", "abc", "-m", tinyModel(), "--regex"];
  const matched = await run([...options, "(ab|中文)+-[0-9]{2}", "--temperature", "2", "--seed", "4", "--max-new-tokens", "300"]);
  expect(matched).toMatchObject({ code: 0, err: "" });
  expect(matched.out).toMatch(/^(ab|中文)+-[0-9]{2}\n$/);
  const cut = await run([...options, "[a-z]{40}", "--greedy", "--max-new-tokens", "5"]);
  expect(cut.out).toMatch(/^[a-z]{5}\n$/);
  expect([cut.code, cut.err]).toEqual([0, "(cut off after 5 tokens, so the answer is incomplete; --max-new-tokens allows more)\n"]);
});

test.each<[string, string | null, string, RegExp]>([
  ["a file that is not there", null, "--schema", /^\/no\/such\.json: cannot be read \(ENOENT/],
  ["broken JSON", '{"type": "object",}', "--schema", /answer schema\.json: broken JSON \(.*position 18/],
  ["no object", "[1]", "--schema", /answer schema\.json: not a JSON schema: it must be an object like/],
  [
    "a keyword that can't be enforced",
    '{"properties": {"when": {"type": "string", "format": "odd"}}}',
    "--schema",
    /answer schema\.json: the schema can't be enforced: at \/properties\/when: 'format' "odd" is not supported; supported are/,
  ],
  ["a type that is none", '{"type": "text"}', "--schema", /answer schema\.json: the schema can't be enforced: .*text/],
  [
    "a schema that is too long",
    JSON.stringify({ description: "x".repeat(70_000) }),
    "--schema",
    /the schema has more than the 65536 characters that are allowed/,
  ],
  ["a broken pattern", "(a", "--regex", /^--regex: the pattern "\(a" is not a regular expression/],
  ["a pattern with look-around", "(?<=a)b", "--regex", /^--regex: the pattern .* has look-around, which is not supported here/],
])("%s is one line that names where it is, before anything is loaded", async (_name, text, option, message) => {
  const value = option === "--regex" ? (text as string) : text === null ? "/no/such.json" : fileWith(text);
  const { code, out, err } = await run(["generate", "abc", "-m", "/no/such/model", option, value]);
  expect([code, out]).toEqual([1, ""]);
  expect(err).toMatch(/^mixtape: .+\n$/);
  expect(err.slice("mixtape: ".length, -1)).toMatch(message);
});

test("it exits quietly when the reader closes the pipe", async () => {
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

test("Ctrl-C ends it with exit code 130", async () => {
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

test("info counts parameters, and those of chosen experts as active", async () => {
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

test("info describes a folder without weights and a tokenizer as far as possible", async () => {
  const { code, out } = await run(["info", tinyModel({ "model.safetensors": null, "tokenizer.json": null })]);
  expect(code).toBe(0);
  expect(out).toContain("no model.safetensors in the folder");
});

test("quantize writes a working folder, and reports the sizes", async () => {
  const out = join(temporary(), "int8");
  const done = await run(["quantize", tinyModel(), out, "--dtype", "int8"]);
  expect(done).toMatchObject({ code: 0, err: "" });
  expect(done.out).toMatch(/^before {2}1\.\d+ MB \(f32\)\nafter {3}[\d.]+ kB \(int8\), \d+ % of it, \d+ tensors in .+\n$/);
  expect(readdirSync(out)).toContain("tokenizer.json");
  expect((await run(["generate", "abc", "-m", out, "--greedy", "--max-new-tokens", "3"])).code).toBe(0);
});
