// `pull` from a hub on loopback, and another command with a model from the hub.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { FakeHub, refuse } from "../checkpoint/fakehub.ts";
import { run, temporary, tinyModel } from "./run.ts";

const hub = new FakeHub();
beforeAll(() => hub.start());
afterAll(() => hub.stop());

function serve(): { env: Record<string, string> } {
  hub.reset();
  const model = tinyModel();
  for (const name of ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
    hub.files.set(name, readFileSync(join(model, name)));
  return { env: { HF_ENDPOINT: hub.endpoint, HF_HUB_CACHE: temporary(), HF_HUB_OFFLINE: "0" } };
}

test("prints the folder on standard output and the downloads on standard error; then the model is available offline", async () => {
  const { env } = serve();
  const { code, out, err } = await run(["pull", "org/model"], { env });
  expect(code, err).toBe(0);
  const folder = out.trimEnd();
  expect(readFileSync(join(folder, "config.json"))).toEqual(hub.files.get("config.json"));
  expect(err).toMatch(/^fetched model\.safetensors \(1\.21 MB, 5 of 5 files\)$/m);
  const quiet = { env: { ...env, HF_HUB_OFFLINE: "1" } };
  expect(await run(["pull", "org/model"], quiet)).toEqual({ code: 0, out, err: "" });
  expect((await run(["generate", "abc", "-m", "org/model", "--offline", "--max-new-tokens", "2"], { env })).code).toBe(0);
});

test("HF_HUB_DISABLE_PROGRESS_BARS=1 silences downloads", async () => {
  const { env } = serve();
  expect((await run(["pull", "org/model"], { env: { ...env, HF_HUB_DISABLE_PROGRESS_BARS: "1" } })).err).toBe("");
});

test("info downloads no weights", async () => {
  const { env } = serve();
  const { code, out } = await run(["info", "org/model"], { env });
  expect(code).toBe(0);
  expect(out).toContain("mixtape pull org/model");
  expect(hub.log.some(({ path }) => path.includes("safetensors"))).toBe(false);
});

test.each([401, 404])("a hub that answers %d: one line, exit code 1", async (status) => {
  const { env } = serve();
  hub.fault = (_request, response) => {
    refuse(response, status);
    return true;
  };
  const { code, out, err } = await run(["pull", "org/model"], { env });
  expect([code, out]).toEqual([1, ""]);
  expect(err).toMatch(/^mixtape: org\/model: .+\n$/);
});
