// Models and prompts that don't work: one clear line on standard error, exit code 1, nothing on standard output.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { run, temporary, tinyModel } from "./run.ts";

async function fault(args: readonly string[], input = ""): Promise<string> {
  const { code, out, err } = await run(args, { input });
  expect(code, err).toBe(1);
  expect(out).toBe("");
  expect(err).toMatch(/^mixtape: .+\n$/); // one line: `.` matches no line break
  return err.slice("mixtape: ".length, -1);
}

const config = (model: string) => JSON.parse(readFileSync(join(model, "config.json"), "utf8")) as Record<string, unknown>;

test("a missing folder", async () => {
  expect(await fault(["generate", "-m", "/no/such/folder", "x"])).toBe(
    "/no/such/folder: no such folder, and not a hub id either (org/name)",
  );
});

test("a hub id that is not in the cache, offline", async () => {
  expect(await fault(["generate", "-m", "org/model", "--cache-dir", temporary(), "x"])).toContain("run once online");
});

test("no tokenizer", async () => {
  const model = tinyModel({ "tokenizer.json": null });
  expect(await fault(["generate", "-m", model, "x"])).toBe(`no tokenizer in ${model}: it has neither tokenizer.json nor tokenizer.model`);
});

test("an empty prompt, as an argument, from a pipe, and as ids", async () => {
  const model = tinyModel();
  for (const args of [["generate", ""], ["generate"], ["routing", "  "]])
    expect(await fault([...args, "-m", model], "\n")).toBe("the prompt is empty: at least one character is needed");
  expect(await fault(["generate", "--ids", ",", "-m", model])).toContain("The prompt is empty");
  expect(await fault(["chat", "", "-m", model])).toContain("the question is empty");
});

test("broken JSON", async () => {
  expect(await fault(["generate", "x", "-m", tinyModel({ "config.json": '{"a": 1,}' })])).toMatch(/config\.json: broken JSON/);
  expect(await fault(["generate", "x", "-m", tinyModel({ "tokenizer.json": "{" })])).toMatch(
    /tokenizer\.json: broken JSON: unexpected end/,
  );
  expect(await fault(["info", tinyModel({ "config.json": "[]" })])).toMatch(/config\.json: not a JSON object/);
});

test("an unknown architecture lists the known ones", async () => {
  const model = tinyModel({ "config.json": { ...config(tinyModel()), architectures: ["LlamaForCausalLM"] } });
  const message = await fault(["generate", "x", "-m", model]);
  expect(message).toMatch(/LlamaForCausalLM is not supported; supported are Ernie4_5_MoeForCausalLM, Ernie4_5ForCausalLM/);
});

test("a prompt longer than the model's positions", async () => {
  const model = tinyModel({ "config.json": { ...config(tinyModel()), max_position_embeddings: 8 } });
  expect(await fault(["generate", "abcdefghijkl", "-m", model])).toBe("the prompt has 12 tokens; the model's longest position is 8");
  expect(await fault(["chat", "abcdefghijkl", "-m", model])).toMatch(
    /^the message has \d+ tokens, and the model takes 6 besides its answer/,
  );
});

test("a token id outside the vocabulary", async () => {
  for (const command of ["generate", "routing"])
    expect(await fault([command, "--ids", "3,512", "-m", tinyModel()])).toBe("token id 512 is outside the vocabulary of 512");
  expect(await fault(["generate", "x", "--logit-bias", "512=1", "-m", tinyModel()])).toMatch(/logit_bias: the token id is 512/);
});

test("truncated weights", async () => {
  const model = tinyModel();
  const file = join(model, "model.safetensors");
  writeFileSync(file, readFileSync(file).subarray(0, 5000));
  expect(await fault(["generate", "x", "-m", model])).toContain("model.safetensors");
  expect(await fault(["info", model])).toContain("model.safetensors");
});

test("chat with a model without a template points to generate; routing with a dense one says that it has no experts", async () => {
  const base = tinyModel({ "tokenizer_config.json": {} });
  expect(await fault(["chat", "hi", "-m", base])).toMatch(/has no chat template.*mixtape generate/);
  expect(await fault(["generate", "--chat", "hi", "-m", base])).toContain("needs a chat template");
  expect(await fault(["routing", "--ids", "1,2", "-m", tinyModel({}, "dense-tiny")])).toContain("is a dense model");
});

test("MIXTAPE_DEBUG=1 shows the stack after the line", async () => {
  const { code, err } = await run(["generate", "-m", "/no/such/folder", "x"], { env: { MIXTAPE_DEBUG: "1" } });
  expect(code).toBe(1);
  expect(err).toMatch(/^mixtape: \/no\/such\/folder: .+\n[\s\S]*\n {4}at /);
});
