/** Every format gives the same rows, whatever stands between them; and the same examples again, in any order. */
import { join } from "node:path";
import { expect, test } from "vitest";
import { all, bundled, fixtures, folderOf, openDataset, openFile } from "./files.ts";

const ROWS = [
  { text: "plain", label: "b" },
  { text: 'a "quoted", text', label: "a" },
  { text: "two\nlines, 中文 and 😀", label: "b" },
  { text: "back\\slash ] } [", label: "a" },
];
const csv = `text,label\r\n${ROWS.map(({ text, label }) => `"${text.replaceAll('"', '""')}",${label}`).join("\r\n")}\r\n`;

test.each([
  ["a.jsonl", ROWS.map((row) => JSON.stringify(row)).join("\n")],
  ["a.jsonl", `\ufeff\n  ${ROWS.map((row) => JSON.stringify(row)).join("\r\n\r\n")}\r\n`],
  ["a.json", JSON.stringify(ROWS)],
  ["a.json", ` [ ${ROWS.map((row) => JSON.stringify(row, null, 2)).join("\n,\n")}\n]\n`],
  ["a.csv", csv],
  ["a.csv", `\ufeff${csv.trimEnd()}`],
])("%s: %j", async (name, content) => {
  const data = await openFile(name, content, { task: "classification" });
  expect(data.labels).toEqual(["a", "b"]);
  const expected = ROWS.map(({ text, label }) => ({ input_ids: bundled.encode(text), labels: label === "a" ? 0 : 1 }));
  expect(await all(data.rows())).toEqual(expected);
  expect(await data.row(3)).toEqual(expected[3]);
  expect(await data.row(2)).toEqual(expected[2]);
});

test("a quote within a field without quotes, and other delimiters", async () => {
  const data = await openFile("a.csv", 'text;label\n5" pipe, long;x\n;y\n"a;b";y\n', {
    task: "classification",
    delimiter: ";",
    max_bad_rows: 1,
  });
  expect((await all(data.rows())).map(({ input_ids }) => bundled.decode(input_ids))).toEqual(['5" pipe, long', "a;b"]);
  expect(data.statistics().badRows).toBe(1);
});

test("TSV: a quote is a character like any other; a file without a header gets names", async () => {
  const data = await openFile("a.tsv", 'He said "hi\tBonjour\nx"\ty\n', { header: ["prompt", "completion"] });
  expect((await all(data.rows())).map(({ input_ids }) => bundled.decode(input_ids))).toEqual(['He said "hiBonjour</s>', 'x"y</s>']);
});

test("rows longer than a chunk of reading, and rows that end at its edge", async () => {
  const edge = 1 << 18;
  const first = { text: "x".repeat(edge - JSON.stringify({ text: "" }).length - 1) };
  const rows = [first, { text: "word ".repeat(120_000).trim() }, { text: "end" }];
  expect(JSON.stringify(rows[0]).length + 1).toBe(edge);
  for (const [name, content] of [
    ["a.jsonl", rows],
    ["a.json", JSON.stringify(rows)],
  ] as const) {
    const data = await openFile(name, content, { max_length: 1_000_000 });
    expect((await all(data.rows())).map(({ input_ids }) => bundled.decode(input_ids))).toEqual(rows.map(({ text }) => `${text}</s>`));
  }
});

test("Parquet as another program writes it: groups of rows, zstd and snappy, lists of structs", async () => {
  const data = await openDataset(join(fixtures, "labels.parquet"), { tokenizer: bundled, task: "classification" });
  expect([data.length, data.labels]).toEqual([5000, ["0", "1", "2"]]);
  for (const i of [0, 2047, 2048, 4999, 3])
    expect(await data.row(i)).toEqual({ input_ids: bundled.encode(`text number ${i}`), labels: i % 3 });
  expect(data.place(2048)).toMatch(/labels\.parquet, row 2049$/);
  const chats = await openDataset(join(fixtures, "messages.parquet"), { tokenizer: bundled });
  expect(bundled.decode((await chats.row(3)).input_ids)).toBe(
    "<|begin_of_sentence|>User: Question 3\nAssistant: Answer 3<|end_of_sentence|>",
  );
});

test("a folder: data files in the order of their paths, texts only where there is nothing else", async () => {
  const folder = folderOf({ "README.md": "about", "b.jsonl": [{ text: "second" }], "a/x.jsonl": [{ text: "first" }], "picture.png": "…" });
  const data = await openDataset(folder, { tokenizer: bundled });
  expect((await all(data.rows())).map(({ input_ids }) => bundled.decode(input_ids))).toEqual(["first</s>", "second</s>"]);
  const matched = await openDataset(join(folder, "**/x*.jsonl"), { tokenizer: bundled });
  expect(matched.length).toBe(1);
  const listed = await openDataset([join(folder, "b.jsonl"), join(folder, "a")], { tokenizer: bundled });
  expect(listed.length).toBe(2);
});

test("a directory of plain text: a document for each file, cut into sequences, ended once", async () => {
  const long = Array.from({ length: 4000 }, (_, i) => `Line ${i} of a long text.`).join("\n");
  const folder = folderOf({ "a.txt": "A short one.\n", "b.txt": long });
  const data = await openDataset(folder, { tokenizer: bundled, max_length: 512 });
  const texts = (await all(data.rows())).map(({ input_ids, labels }) => {
    expect(input_ids.length).toBeLessThanOrEqual(512);
    expect(labels).toEqual([-100, ...input_ids.slice(1)]);
    return bundled.decode(input_ids);
  });
  expect(texts.join("")).toBe(`A short one.\n</s>${long}</s>`);
  expect(await data.row(data.length - 2)).toEqual(await data.row(data.length - 2));
});

test("more files than are kept open", async () => {
  const folder = folderOf(Object.fromEntries(Array.from({ length: 150 }, (_, i) => [`${String(i).padStart(3, "0")}.txt`, `file ${i}`])));
  const data = await openDataset(folder, { tokenizer: bundled });
  const read = await Promise.all(Array.from({ length: 150 }, (_, i) => data.row((i * 7) % 150)));
  expect(read.map(({ input_ids }) => bundled.decode(input_ids))).toEqual(
    Array.from({ length: 150 }, (_, i) => `file ${(i * 7) % 150}</s>`),
  );
  await data.close();
  expect(bundled.decode((await data.row(149)).input_ids)).toBe("file 149</s>");
});
