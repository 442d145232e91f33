/** Rows in, rows and changed copies out: which are chosen, what of them changes, what the report says; the same bytes for the same seed. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type AugmentOptions, augment } from "../../../src/train/augment/augment.ts";
import { markdown } from "../../../src/train/augment/report.ts";
import { joined, openCilin, openWordnet } from "../../../src/train/augment/thesaurus.ts";
import { Translator } from "../../../src/train/augment/translate.ts";
import { fixtures, folderOf } from "../data/files.ts";

const thesaurus = joined(await openWordnet(), await openCilin(join(fixtures, "synonyms.txt")));
const EDA = ["synonyms", "insert", "swap", "delete"] as const;
const WORDS = ["buy", "a", "quick", "large", "house", "near", "the", "river", "and", "begin", "work", "now"];
const texts = (n: number) =>
  Array.from({ length: n }, (_, i) => `${WORDS.map((_, k) => WORDS[(i * 7 + k * 5) % WORDS.length]).join(" ")} ${i}`);

async function run(name: string, content: string | readonly unknown[], options: Partial<AugmentOptions> = {}, output = "out.jsonl") {
  const folder = folderOf({ [name]: content });
  const path = join(folder, output);
  const report = await augment(join(folder, name), path, { methods: EDA, thesaurus, ...options });
  const text = readFileSync(path, "utf8");
  const rows = output.endsWith(".jsonl")
    ? text
        .trimEnd()
        .split("\n")
        .map((line) => JSON.parse(line))
    : [];
  return { report, text, rows, folder };
}

test("the share of rows is exact, originals stay in order, copies follow theirs, numbers stay", async () => {
  const own = texts(200).map((text, i) => ({ text, label: `l${i % 4}`, id: i }));
  const { report, rows } = await run("a.jsonl", own, { fraction: 0.15, copies: 2, mark: "how" });
  expect(report).toMatchObject({ rows: 200, eligible: 200, chosen: 30, written: rows.length });
  expect(rows.filter(({ how }) => how === "").map(({ how: _, ...row }) => row)).toEqual(own);
  const made = rows.filter(({ how }) => how !== "");
  expect(made).toHaveLength(report.made);
  expect(made.length).toBeGreaterThan(50);
  for (const [i, row] of rows.entries())
    if (row.how !== "") {
      const before = own[row.id];
      expect(rows.slice(Math.max(0, i - 2), i).some(({ id }) => id === row.id)).toBe(true);
      expect(row.text).not.toBe(before.text);
      expect(row.label).toBe(before.label);
      expect(row.text).toMatch(new RegExp(`\\b${row.id}\\b`));
    }
  expect(new Set(made.map(({ how }) => how))).toEqual(new Set(EDA));
  const total = Object.values(report.methods).reduce(
    (sum, { made: m, rejected }) => sum + m + Object.values(rejected).reduce((a, b) => a + b, 0),
    0,
  );
  expect(total).toBe(60);
  const after = Object.fromEntries(["l0", "l1", "l2", "l3"].map((label) => [label, rows.filter((row) => row.label === label).length]));
  expect(report.labels).toEqual({ before: { l0: 50, l1: 50, l2: 50, l3: 50 }, after });
});

test("the same seed gives the same bytes and report, another seed others", async () => {
  const rows = texts(100).map((text) => ({ text }));
  const outcome = async (seed: number) => {
    const { text, report } = await run("a.jsonl", rows, { seed, fraction: 0.5 });
    return [text, markdown({ ...report, input: [], output: "", samples: report.samples.map((sample) => ({ ...sample, place: "" })) })];
  };
  const first = await outcome(1);
  expect(await outcome(1)).toEqual(first);
  expect(await outcome(2)).not.toEqual(first);
});

test("what a user writes changes, whatever the layout; answers, labels and the rest never do", async () => {
  const [text] = texts(1);
  const answer = "begin"; // a word of the text that the answer repeats: it is kept
  const cases: [object, readonly string[]][] = [
    [
      {
        messages: [
          { role: "system", content: text },
          { role: "user", content: text },
          { role: "assistant", content: answer },
        ],
        n: 1,
      },
      ["messages", "1", "content"],
    ],
    [
      {
        messages: [
          { role: "user", content: [{ type: "text", text }] },
          { role: "assistant", content: answer },
        ],
      },
      ["messages", "0", "content", "0", "text"],
    ],
    [
      {
        conversations: [
          { from: "human", value: text },
          { from: "gpt", value: answer },
        ],
        tools: "[]",
      },
      ["conversations", "0", "value"],
    ],
    [{ instruction: text, input: "", output: answer }, ["instruction"]],
    [{ prompt: text, completion: answer }, ["prompt"]],
    [{ prompt: [{ role: "user", content: text }], completion: [{ role: "assistant", content: answer }] }, ["prompt", "0", "content"]],
    [{ text, other: text }, ["text"]],
    [{ text, label: answer }, ["text"]],
    [{ prompt: text, chosen: answer, rejected: "work" }, ["prompt"]],
    [
      { conversations: [{ from: "human", value: text }], chosen: { from: "gpt", value: answer }, rejected: { from: "gpt", value: "no" } },
      ["conversations", "0", "value"],
    ],
  ];
  for (const [row, path] of cases) {
    const { rows, report } = await run("a.jsonl", [row], { fraction: 1, copies: 4, only_new: true });
    expect(report.made, JSON.stringify(row)).toBeGreaterThan(1);
    for (const made of rows) {
      const at = path.slice(0, -1).reduce((value, key) => value[key], made);
      const key = path[path.length - 1];
      expect(at[key]).not.toBe(text);
      if (!("other" in row)) expect(at[key]).toContain(answer);
      at[key] = text;
      expect(made).toEqual(row);
    }
  }
});

test("other fields, where they are asked for; conversations as JSON text stay text", async () => {
  const [text] = texts(1);
  const row = {
    messages: JSON.stringify([
      { role: "user", content: "short" },
      { role: "assistant", content: text },
    ]),
  };
  const { rows } = await run("a.jsonl", [row], { fraction: 1, methods: ["swap"], only_new: true, targets: ["assistant"] });
  const [user, assistant] = JSON.parse(rows[0].messages);
  expect(user.content).toBe("short");
  expect(assistant.content).not.toBe(text);
});

test("tables in, tables out: the same columns, quoted where need be", async () => {
  const csv = `id,text,label\n${texts(20)
    .map((text, i) => `${i},"${text}, ""so""\nhe said",x`)
    .join("\n")}\n`;
  const { text, report } = await run("a.csv", csv, { fraction: 0.5, methods: ["swap"] }, "out.csv");
  expect(report.made).toBe(10);
  const again = await run("a.csv", text, { methods: ["swap"], fraction: 0.01, only_new: true });
  expect(again.report.rows).toBe(30);
  expect(Object.keys(again.rows[0])).toEqual(["id", "text", "label"]);
  expect(again.rows[0].text).toContain('"so"');
  await expect(run("a.csv", csv, { methods: ["swap"] }, "out.tsv")).rejects.toThrow(
    "a field has a tab or a line break, which TSV cannot hold",
  );
  const array = await run("a.csv", csv, { methods: ["swap"], fraction: 0.5 }, "out.json");
  expect(JSON.parse(array.text)).toHaveLength(30);
});

test("near duplicates are left out and reported, and are not copied", async () => {
  const [a, b] = texts(2);
  const rows = [
    { text: a, id: 0 },
    { text: b, id: 1 },
    { text: `${a.toUpperCase()}!`, id: 2 },
    { text: b, id: 3 },
  ];
  const { report, rows: out } = await run("a.jsonl", rows, { methods: [], dedupe: 0.9 });
  expect(out.map(({ id }) => id)).toEqual([0, 1]);
  expect(report).toMatchObject({ rows: 4, duplicates: 2, made: 0, written: 2 });
  expect(report.duplicateSamples.map(({ place, of }) => [place.slice(-6), of.slice(-6)])).toEqual([
    ["line 3", "line 1"],
    ["line 4", "line 2"],
  ]);
  expect(markdown(report)).toContain("near duplicates left out | 2");
});

test("back-translation: what loses a name or a number, comes back the same or in another script is rejected", async () => {
  const answers: Record<string, string> = {
    "Tell Anna it is 5 pm": "Please tell Anna that it is 5 pm",
    "Tell Paul it is 6 pm": "Please tell Paul that it is 7 pm",
    "Nothing changes here": "nothing changes here.",
    "This becomes Chinese soon": "这很快就会变成中文了",
    "This becomes far too long": "word ".repeat(40),
  };
  const translator = await Translator.open({
    ask: async (prompt) => {
      const text = prompt.slice(prompt.indexOf("\n\n") + 2);
      return prompt.includes("into Chinese") ? text : (answers[text] ?? "?");
    },
    model: "m",
    concurrency: 4,
    attempts: 1,
    cache: null,
  });
  const rows = Object.keys(answers).map((text) => ({ text }));
  const { report, rows: made } = await run("a.jsonl", rows, { methods: ["back-translation"], translator, fraction: 1, only_new: true });
  expect(made).toEqual([{ text: "Please tell Anna that it is 5 pm" }]);
  expect(report.methods["back-translation"]).toEqual({
    made: 1,
    rejected: {
      "a name, a number or something else to keep was lost": 1,
      "the translation back has another length": 1,
      "the translation back is in another script": 1,
      "the translation back is the text itself": 1,
    },
  });
});

test("bad rows are counted against a limit, options are checked, and a failed run leaves no file", async () => {
  const rows = [{ text: texts(1)[0] }, { other: 1 }];
  const { report } = await run("a.jsonl", rows, { max_bad_rows: 1, fraction: 1 });
  expect(report).toMatchObject({ rows: 1, badRows: 1 });
  const folder = folderOf({ "a.jsonl": rows });
  const out = join(folder, "out.jsonl");
  const bad = (options: Partial<AugmentOptions>) => augment(join(folder, "a.jsonl"), out, { methods: EDA, thesaurus, ...options });
  await expect(bad({})).rejects.toThrow(/a\.jsonl, line 2: there is no column "text"/);
  expect([existsSync(out), existsSync(`${out}.partial`)]).toEqual([false, false]);
  await expect(bad({ methods: [] })).rejects.toThrow("give a method (synonyms, insert, swap, delete, back-translation), or dedupe");
  await expect(bad({ fraction: 2 })).rejects.toThrow("fraction is 2; it must be above 0 and at most 1");
  await expect(bad({ copies: 0 })).rejects.toThrow("copies is 0; it must be a whole number from 1 to 100");
  await expect(bad({ thesaurus: undefined })).rejects.toThrow("synonyms and insert need a thesaurus");
  await expect(bad({ methods: ["back-translation"] })).rejects.toThrow("back-translation needs a translator");
  await expect(augment(join(folder, "a.jsonl"), join(folder, "out.yaml"), { methods: EDA, thesaurus })).rejects.toThrow(
    "give the output such an ending",
  );
  await expect(augment(join(folder, "a.jsonl"), join(folder, "no/out.jsonl"), { methods: ["swap"], max_bad_rows: 1 })).rejects.toThrow(
    "the rows cannot be written",
  );
});
