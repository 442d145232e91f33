/** `--adapter` on the command line: one, several with weights, switched off in a chat, served; and what is refused. */
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";
import { settings } from "../../src/cli/settings.ts";
import { adapterFolder } from "../adapterfolder.ts";
import { run } from "./run.ts";

const BASE = fileURLToPath(new URL("../../models/small-moe", import.meta.url));
const PROMPT = ["generate", "To save a document, press the key with", "--greedy", "--max-new-tokens", "12", "--threads", "1"];

test("generate --adapter answers with the adapter; a weight of 0 is the base, and two halves are a whole", async () => {
  const folder = await adapterFolder(BASE, 1);
  const base = await run(PROMPT);
  const adapted = await run([...PROMPT, "--adapter", folder]);
  expect([base.code, adapted.code]).toEqual([0, 0]);
  expect(adapted.out).not.toBe(base.out);
  expect((await run([...PROMPT, "--adapter", `${folder}=0`])).out).toBe(base.out);
  expect((await run([...PROMPT, "--adapter", `${folder}=0.5`, "--adapter", `${folder}=0.5`])).out).toBe(adapted.out);
}, 60_000);

test("chat --adapter, and /adapter off and on in the conversation", async () => {
  const folder = await adapterFolder(BASE, 1, {}, 0.5);
  const flags = ["chat", "--greedy", "--max-new-tokens", "8", "--threads", "1"];
  const question = "Who are you?";
  const ask = async (lines: string[], ...more: string[]) => {
    const { code, out, err } = await run([...flags, ...more], { input: `${lines.join("\n")}\n` });
    expect(code, err).toBe(0);
    return { answers: out.trim().split("\n"), err };
  };
  const [base] = (await ask([question])).answers;
  const { answers, err } = await ask(
    [question, "/reset", "/adapter off", question, "/reset", "/adapter on", question],
    "--adapter",
    folder,
  );
  expect(answers[0]).not.toBe(base);
  expect(answers).toEqual([answers[0], base, answers[0]]);
  expect(err).toContain("adapter: off");
  const without = await run(flags, { input: "/adapter on\n" });
  expect([without.code, without.err]).toEqual([1, expect.stringContaining("no adapter is loaded; start the chat with --adapter FOLDER")]);
}, 60_000);

test("folders and weights that make no sense are refused in one line", async () => {
  for (const [value, message] of [
    ["/nosuch", "/nosuch: no such folder, and not a hub id either"],
    ["", "It must be a folder or a hub id, or like folder=0.5."],
    ["folder=half", "It must be a folder or a hub id, or like folder=0.5."],
  ]) {
    const { code, err } = await run([...PROMPT, "--adapter", value]);
    expect(code).toBe(1);
    expect(err).toContain(message);
    expect(err.trim().split("\n").at(-1)).toMatch(/^mixtape: /);
  }
}, 60_000);

test("serve --adapter names the model where there are several", async () => {
  const model = [{ name: "a", path: "x" }];
  const both = [...model, { name: "b", path: "y" }];
  const shop = { model: null, name: "shop", folder: "f" };
  expect((await settings({ model, adapter: [shop] })).models[0].adapters).toEqual({ shop: "f" });
  const { models } = await settings({ model: both, adapter: [{ ...shop, model: "b" }] });
  expect(models.map(({ adapters }) => adapters)).toEqual([{}, { shop: "f" }]);
  await expect(settings({ model: both, adapter: [shop] })).rejects.toThrow(
    "--adapter shop: say whose it is, as model:name=folder; the models are a, b",
  );
  await expect(settings({ model, adapter: [{ ...shop, model: "c" }] })).rejects.toThrow("--adapter c:shop: say whose it is");
});
