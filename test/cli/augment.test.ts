/** `mixtape augment` as users run it: files, reports, models, errors. */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, onTestFinished, test } from "vitest";
import { METHODS } from "../../src/train/augment/copies.ts";
import { TARGETS } from "../../src/train/augment/fields.ts";
import { FORMATS } from "../../src/train/data/files.ts";
import { LAYOUTS } from "../../src/train/data/layout.ts";
import { run, temporary, tinyModel } from "./run.ts";

const synonyms = fileURLToPath(new URL("../fixtures/data/synonyms.txt", import.meta.url));
const REVIEWS = `review,label\n${["好吃，送得迅速", "有点慢，餐厅很远", "Please buy a quick gift for Anna", "begin the work now, it is easy"].map((text) => `"${text}",1`).join("\n")}\n`;

test("--help lists all methods, fields, formats and layouts", async () => {
  const help = (await run(["augment", "--help"])).out.replace(/\s+/g, " ");
  expect(help).toContain(METHODS.join(", "));
  expect(help).toContain(TARGETS.join(", "));
  for (const names of [FORMATS, LAYOUTS]) expect(help).toContain(names.map((name) => `"${name}"`).join(", "));
});

test("EDA on a table: more rows, two reports, the same bytes again", async () => {
  const folder = temporary();
  const [input, output] = [join(folder, "in.csv"), join(folder, "out.csv")];
  writeFileSync(input, REVIEWS);
  const args = [
    "augment",
    input,
    output,
    "--method",
    "eda",
    "--columns",
    "text=review",
    "--synonyms",
    synonyms,
    "--fraction",
    "1",
    "--copies",
    "4",
    "--mark",
    "how",
  ];
  const { code, out, err } = await run(args);
  expect([code, err]).toEqual([0, `report: ${join(folder, "out.report.md")}, ${join(folder, "out.report.json")}\n`]);
  const report = JSON.parse(readFileSync(join(folder, "out.report.json"), "utf8"));
  expect(report).toMatchObject({
    rows: 4,
    chosen: 4,
    written: 4 + report.made,
    labels: { before: { 1: 4 }, after: { 1: 4 + report.made } },
  });
  expect(report.made).toBeGreaterThan(6);
  expect(out).toContain(`4 rows, ${report.made} new: ${4 + report.made} rows in ${output}`);
  const rows = readFileSync(output, "utf8");
  expect(rows.split("\n")[0]).toBe("review,label,how");
  expect(rows).toMatch(/(美味|可口)，送得|送得(快速|飞快)/);
  expect(readFileSync(join(folder, "out.report.md"), "utf8")).toContain("## Samples");

  expect(await run(args)).toEqual({ code: 1, out: "", err: `mixtape: ${output} exists: give another name, or --overwrite\n` });
  expect((await run([...args, "--overwrite"])).code).toBe(0);
  expect(readFileSync(output, "utf8")).toBe(rows);
  await run([...args, "--overwrite", "--seed", "9"]);
  expect(readFileSync(output, "utf8")).not.toBe(rows);
});

test("back-translation through a server: the key from the environment, answers kept for the next run", async () => {
  const folder = temporary();
  const [input, output] = [join(folder, "in.jsonl"), join(folder, "out.jsonl")];
  writeFileSync(input, '{"prompt": "Tell Anna to come at 5 pm", "completion": "fine"}\n');
  const seen: (string | undefined)[] = [];
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    const { model, messages } = JSON.parse(body);
    seen.push(request.headers.authorization, model);
    const content = messages[0].content.includes("into French") ? "Dis à Anna de venir à 5 pm" : "Ask Anna to be here at 5 pm";
    response.end(JSON.stringify({ choices: [{ message: { content } }] }));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onTestFinished(() => void server.close());
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1`;
  const args = [
    "augment",
    input,
    output,
    "--method",
    "back-translation",
    "--endpoint",
    url,
    "--model",
    "big",
    "--through",
    "French",
    "--fraction",
    "1",
  ];
  const env = { MY_KEY: "secret" };
  expect(await run([...args, "--api-key-env", "MY_KEY"], { env })).toMatchObject({ code: 0 });
  expect(seen).toEqual(["Bearer secret", "big", "Bearer secret", "big"]);
  const rows = readFileSync(output, "utf8")
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(rows).toEqual([
    { prompt: "Tell Anna to come at 5 pm", completion: "fine" },
    { prompt: "Ask Anna to be here at 5 pm", completion: "fine" },
  ]);
  expect((await run([...args, "--overwrite"])).code).toBe(0);
  expect(seen).toHaveLength(4);
  expect(readFileSync(join(folder, "out.translations.jsonl"), "utf8").trimEnd().split("\n")).toHaveLength(2);
  expect(readFileSync(join(folder, "out.report.json"), "utf8")).not.toContain("secret");
});

test("back-translation through a model of ours", async () => {
  const folder = temporary();
  const [input, output] = [join(folder, "in.jsonl"), join(folder, "out.jsonl")];
  writeFileSync(input, '{"text": "abc abc abc"}\n');
  const { code, out, err } = await run([
    "augment",
    input,
    output,
    "--method",
    "back-translation",
    "--model",
    tinyModel(),
    "--fraction",
    "1",
    "--max-new-tokens",
    "4",
    "--no-cache",
  ]);
  expect([code, err]).toEqual([0, expect.stringContaining("report:")]);
  expect(out).toContain("back-translation:"); // random weights: what comes back is rejected, or a copy
  expect(existsSync(join(folder, "out.translations.jsonl"))).toBe(false);
});

test("near duplicates are removed without a method", async () => {
  const folder = temporary();
  const [input, output] = [join(folder, "in.jsonl"), join(folder, "out.jsonl")];
  writeFileSync(input, ["The same text again", "the same  text AGAIN", "Another one"].map((text) => JSON.stringify({ text })).join("\n"));
  const { out } = await run(["augment", input, output, "--dedupe", "0.9"]);
  expect(out).toBe(`3 rows, without 1 near duplicates, 0 new: 2 rows in ${output}\n`);
  expect(readFileSync(output, "utf8")).toBe('{"text":"The same text again"}\n{"text":"Another one"}\n');
});

test("wrong options and rows: one line, exit code 1, no file", async () => {
  const folder = temporary();
  const [input, output] = [join(folder, "in.jsonl"), join(folder, "out.jsonl")];
  writeFileSync(input, '{"text": "fine"}\n{"text": 3}\n');
  const fails = async (args: readonly string[], message: string) => {
    const { code, err } = await run(["augment", input, output, ...args]);
    expect([code, err]).toEqual([1, expect.stringContaining(message)]);
    expect(err.trimEnd()).not.toContain("\n");
    expect(existsSync(output)).toBe(false);
  };
  await fails([], "give a method (synonyms, insert, swap, delete, back-translation), or dedupe");
  await fails(["--method", "eda,foo"], "'foo' is none of synonyms, insert, swap, delete, back-translation.");
  await fails(["--method", "swap", "--fraction", "1.5"], "It must be a number above 0 and at most 1.");
  await fails(["--method", "swap", "--columns", "label"], "It must be like label=category.");
  await fails(["--method", "swap", "--columns", "labels=x"], "columns");
  await fails(["--method", "swap", "--fields", "label"], "'label' is none of user, system,");
  await fails(["--method", "back-translation"], "back-translation needs --model");
  await fails(["--method", "swap"], "in.jsonl, line 2: text must be a text, not 3");
  await fails(["--method", "synonyms", "--wordnet", folder], "WordNet's file index.sense cannot be read");
});
