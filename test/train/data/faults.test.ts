/** Rows that cannot be used are reported with file, line and reason, up to a limit; so are options and files. */
import { appendFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { DataError } from "../../../src/train/data/fault.ts";
import type { OpenOptions } from "../../../src/train/data/open.ts";
import { all, bundled, folderOf, openDataset, openFile } from "./files.ts";

const GOOD = '{"text": "good"}';

test.each<[string, string | Uint8Array, string]>([
  ["a.jsonl", `${GOOD}\n\n{"text": \n${GOOD}`, "line 3: broken JSON: Unexpected end of JSON input"],
  ["a.jsonl", `${GOOD}\n[1]\n`, "line 2: not a JSON object: [1]"],
  ["a.jsonl", `${GOOD}\n{"other": 1}\n`, 'line 2: there is no column "text": the columns are "other"'],
  ["a.jsonl", `${GOOD}\n{"text": null}\n`, 'line 2: the column "text" is empty'],
  ["a.jsonl", `${GOOD}\n{"text": "  "}\n`, "line 2: text is empty"],
  ["a.jsonl", `${GOOD}\n{"text": 5}\n`, "line 2: text must be a text, not 5"],
  [
    "a.jsonl",
    Buffer.concat([Buffer.from(`${GOOD}\n{"text": "`), Uint8Array.of(0xff), Buffer.from('"}\n')]),
    "line 2: not valid UTF-8: convert the file, or remove the row",
  ],
  ["a.jsonl", `${GOOD}\n{"text": "${"x".repeat(2000)}"}\n${GOOD}`, "line 2: the row has 2012 bytes; max_row_bytes allows 1000"],
  ["a.json", `[${GOOD},\n{"text": }]`, "line 2: broken JSON"],
  ["a.json", `[${GOOD},\n{"text": "cut`, "line 2: the file ends inside the JSON array: it was cut off"],
  ["a.csv", "text,n\ngood,1\none,two,3\n", "line 3: 3 columns, where the first row has 2"],
  ["a.csv", 'text,n\ngood,1\n"open,2\nmore,3\n', "line 3: a quote that opens in this row is never closed"],
  ["a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "line 1: there is no answer of the assistant to learn"],
  ["a.jsonl", '{"messages": [{"content": "a"}]}', 'line 1: messages[0] has no role: {"content":"a"}'],
  [
    "a.jsonl",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
    "line 1: messages[1] (assistant) has no content",
  ],
  [
    "a.jsonl",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    'line 1: messages[0].content[0] must be like {"type": "text", "text": "…"}, not {"type":"image_url"}',
  ],
  [
    "a.jsonl",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}',
    "line 1: the weight of messages[1] is 0.5; it must be 0 or 1",
  ],
  [
    "a.jsonl",
    '{"messages": [{"role": "user", "content": "<image>"}], "images": ["a.png"]}',
    "line 1: the row has images, which cannot be trained on yet",
  ],
  ["a.jsonl", '{"messages": [], "label": true}', "line 1: messages with a label of true or false are unpaired preferences"],
  ["a.jsonl", '{"conversations": [{"from": "robot", "value": "a"}]}', 'line 1: conversations[0] is from "robot"; known are human, user'],
  ["a.jsonl", '{"conversations": [{"from": "function_call", "value": "weather"}]}', 'line 1: conversations[0] is not JSON: "weather"'],
])("%s %j: %s", async (name, content, message) => {
  const error = await openFile(name, content, { max_row_bytes: 1000 }).catch((cause) => cause);
  expect(error).toBeInstanceOf(DataError);
  expect(error.message).toContain(`${name}, ${message}`);
  expect(error.rows).toHaveLength(1);
});

test("a row that is nested too deeply is a bad one", async () => {
  const deep = `${'{"a":'.repeat(20_000)}1${"}".repeat(20_000)}`;
  const row = `{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f", "parameters": ${deep}}]}`;
  await expect(openFile("a.jsonl", `${row}\n`)).rejects.toThrow("a.jsonl, line 1: the row is nested too deeply");
});

test("bad rows up to the limit are skipped and reported, one more is an error that lists the first five", async () => {
  const rows = Array.from({ length: 20 }, (_, i) => (i % 3 === 0 ? { bad: i } : { text: `row ${i}` }));
  const told: number[] = [];
  const data = await openFile("a.jsonl", rows, { max_bad_rows: 7, layout: "text", onBadRow: ({ line }) => told.push(line) });
  expect([data.length, data.statistics().badRows, told]).toEqual([13, 7, [1, 4, 7, 10, 13, 16, 19]]);
  expect(bundled.decode((await data.row(12)).input_ids)).toBe("row 19</s>");
  const error = await openFile("a.jsonl", rows, { max_bad_rows: 6, layout: "text" }).catch((cause) => cause);
  expect(error.message).toMatch(
    /^at least 7 rows cannot be used, and max_bad_rows allows 6:\n( {2}.*line (1|4|7|10|13): .*\n){5}Mend them/,
  );
  const few = await openFile("a.jsonl", [...rows.slice(0, 4), { text: "end" }], { layout: "text" }).catch((cause) => cause);
  expect(few.message).toMatch(/^2 rows cannot be used, and max_bad_rows allows 0:/);
});

test.each<[Readonly<Record<string, unknown>>, string]>([
  [{ max_lenght: 3 }, 'Unrecognized key: "max_lenght"'],
  [{ max_length: 1 }, "max_length: Too small"],
  [{ layout: "chat" }, "layout: Invalid option"],
  [{ columns: { txt: "a" } }, "columns"],
  [
    { overflow: "split", layout: "completion", columns: { prompt: "text", completion: "text" } },
    "overflow: split is for texts; these rows are of the kind completion",
  ],
  [
    { task: "classification" },
    "these rows are of the kind text, and classification takes label (text and label): choose another task, or another layout",
  ],
  [{ task: "preference" }, "these rows are of the kind text, and preference takes preference"],
])("options %j: %s", async (options, message) => {
  await expect(openFile("a.jsonl", [{ text: "good" }], options as Partial<OpenOptions>)).rejects.toThrow(message);
});

test.each<[string, string, string]>([
  ["a.jsonl", "\n\n", "a.jsonl: there are no rows"],
  ["a.json", "", "a.json: the file is empty: it must be a JSON array"],
  ["a.json", '{"text": "a"}', "not a JSON array: it must begin with [ (one object a line is JSONL: give format: jsonl)"],
  ["a.json", "[] []", "there is more behind the end of the JSON array"],
  ["a.csv", "a,a\n1,2\n", 'a.csv, line 1: the header cannot be read: two columns have the name "a"'],
  ["a.csv", "a,b\n1,2\n", 'the columns are "a", "b", which is no known layout (chosen + rejected; messages;'],
  ["a.jsonl.gz", "x", "a.jsonl.gz: the file is packed: unpack it"],
  ["a.docx", "x", "a.docx: its format cannot be told from its ending (.jsonl,"],
  ["a.parquet", "not parquet at all", "a.parquet: not a Parquet file that can be read"],
])("%s %j: %s", async (name, content, message) => {
  await expect(openFile(name, content)).rejects.toThrow(message);
});

test("sources without files are named", async () => {
  const folder = folderOf({ "a.bin": "x" });
  await expect(openDataset(join(folder, "none.jsonl"), { tokenizer: bundled })).rejects.toThrow(
    "none.jsonl: there is no such file or folder",
  );
  await expect(openDataset(folder, { tokenizer: bundled })).rejects.toThrow("the folder has no file that ends in .jsonl");
  await expect(openDataset(join(folder, "*.jsonl"), { tokenizer: bundled })).rejects.toThrow("matches the pattern");
  await expect(openDataset([], { tokenizer: bundled })).rejects.toThrow("the list of files is empty");
});

test("longer rows: an error by default, cut or left out where that is wanted", async () => {
  const rows = [
    { prompt: "short", completion: " one" },
    { prompt: "short", completion: " word".repeat(50) },
    { prompt: "word ".repeat(50), completion: " lost" },
  ];
  await expect(openFile("a.jsonl", rows, { max_length: 20 })).rejects.toThrow(
    /line 2: it has \d+ tokens; max_length is 20 \(overflow: truncate or skip/,
  );
  const cut = await openFile("a.jsonl", rows, { max_length: 20, overflow: "truncate" });
  expect((await all(cut.rows())).map(({ input_ids }) => input_ids.length)).toEqual([cut.tokens(0), 20]);
  expect(cut.statistics()).toMatchObject({ truncated: 1, skipped: 1, examples: 2 });
  const left = await openFile("a.jsonl", rows, { max_length: 20, overflow: "skip" });
  expect(left.statistics()).toMatchObject({ truncated: 0, skipped: 2, examples: 1 });
  await expect(openFile("a.jsonl", rows.slice(2), { max_length: 20, overflow: "skip" })).rejects.toThrow(
    "all 1 are longer than max_length (20)",
  );
});

test("a conversation that becomes too long: its first turns are kept", async () => {
  const messages = Array.from({ length: 40 }, (_, i) => ({ role: i % 2 ? "assistant" : "user", content: `message number ${i}` }));
  const data = await openFile("a.jsonl", [{ messages }], { max_length: 100, overflow: "skip" });
  expect(data.length).toBeGreaterThan(2);
  expect(data.length + data.statistics().skipped).toBe(20);
});

test("labels outside the classes, and labels of the wrong kind", async () => {
  const rows = [
    { text: "a", label: "x" },
    { text: "b", label: "y" },
  ];
  const open = (options: object, data: readonly object[] = rows) =>
    openFile("a.jsonl", data, { task: "classification", ...options } as object);
  await expect(open({ labels: ["x", "z"] })).rejects.toThrow('line 2: the label "y" is none of the classes "x", "z"');
  await expect(open({ labels: ["x", "x"] })).rejects.toThrow('labels: "x" is there twice');
  await expect(open({ problem_type: "regression" })).rejects.toThrow('line 1: label must be a number for regression, not "x"');
  await expect(open({ problem_type: "multi_label_classification" })).rejects.toThrow('line 1: label must be a list of classes, not "x"');
  await expect(open({}, [...rows, { text: "c", label: ["x"] }])).rejects.toThrow('line 3: label must be one class, not ["x"]');
  await expect(open({}, [{ text: "c", label: { a: 1 } }])).rejects.toThrow('line 1: label must be a name or a number, not {"a":1}');
});

test("a file that changes while it is used is noticed", async () => {
  const folder = folderOf({ "a.jsonl": Array.from({ length: 100 }, (_, i) => ({ text: `row ${i}` })) });
  const path = join(folder, "a.jsonl");
  const data = await openDataset(path, { tokenizer: bundled });
  appendFileSync(path, '\n{"text": "more"}');
  expect(bundled.decode((await data.row(50)).input_ids)).toBe("row 50</s>");
  writeFileSync(path, Array.from({ length: 100 }, (_, i) => JSON.stringify({ text: `raw ${i}` })).join("\n"));
  await expect(data.row(60)).rejects.toThrow("a.jsonl, line 61: the row has changed since it was indexed");
  writeFileSync(path, "");
  await expect(data.row(70)).rejects.toThrow("the file has become shorter since it was indexed");
});

test("numbers outside are refused, and a signal stops the pass", async () => {
  const data = await openFile("a.jsonl", [{ text: "one row" }]);
  await expect(data.row(1)).rejects.toThrow("there is no example 1: there are 1, counted from 0");
  await expect(data.epoch(0).row(-1)).rejects.toThrow("there is no position -1 in an epoch of 1");
  await expect(openFile("a.jsonl", [{ text: "a b" }], { signal: AbortSignal.abort(new Error("stopped")) })).rejects.toThrow("stopped");
});
