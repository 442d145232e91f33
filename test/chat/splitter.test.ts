/** Reasoning, answers and calls are split the same way, however the text is cut into pieces. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { CallReader } from "../../src/chat/call.ts";
import { type Piece, Splitter, type SplitterOptions } from "../../src/chat/splitter.ts";

/** The pieces, with adjacent texts of one kind joined. */
function joined(pieces: readonly Piece[]): string[] {
  const out: string[] = [];
  let last = "";
  for (const piece of pieces) {
    if (piece.kind === "callEnd") out.push(piece.whole ? "end" : "cut");
    else if (piece.kind === last) out[out.length - 1] += piece.text;
    else out.push(`${piece.kind}: ${piece.text}`);
    last = piece.kind;
  }
  return out;
}

function split(text: string, options: Partial<SplitterOptions>, sizes: readonly number[] = [text.length]): string[] {
  const splitter = new Splitter({ thinks: false, calls: false, insideReasoning: false, ...options });
  const pieces: Piece[] = [];
  for (let at = 0, i = 0; at < text.length; i++) {
    const size = Math.max(1, sizes[i % sizes.length] ?? 1);
    pieces.push(...splitter.push(text.slice(at, at + size)));
    at += size;
  }
  return joined([...pieces, ...splitter.finish()]);
}

const THINKS = { thinks: true, insideReasoning: true };
const CASES: readonly [string, Partial<SplitterOptions>, string[]][] = [
  ["\nlet me see\n</think>\n\nyes", THINKS, ["reasoning: let me see", "answer: yes"]],
  ["hm</think>\n<response>\nyes, 1 < 2\n</response>\n", THINKS, ["reasoning: hm", "answer: yes, 1 < 2"]],
  ["<think>hm</think>yes", { thinks: true }, ["reasoning: hm", "answer: yes"]],
  ["\n<think>\nhm", { thinks: true }, ["reasoning: hm"]],
  ["no tags at all ", { thinks: true }, ["answer: no tags at all"]],
  ["</think></think> x", THINKS, ["answer: </think> x"]],
  ["a</think>write <think> like this", THINKS, ["reasoning: a", "answer: write <think> like this"]],
  ["a</think>b </response> c", THINKS, ["reasoning: a", "answer: b </response> c"]],
  ["a < b <thin", THINKS, ["reasoning: a < b <thin"]],
  ["<tool_call>\n{}\n</tool_call>", { calls: true }, ["call: \n{}\n", "end"]],
  [
    "Well: \n<tool_call>1</tool_call>\n<tool_call>2</tool_call> so",
    { calls: true },
    ["answer: Well:", "call: 1", "end", "call: 2", "end", "answer: so"],
  ],
  ["<tool_call>{", { calls: true }, ["call: {", "cut"]],
  ["<tool_call>", { calls: true }, ["cut"]],
  ["<tool_call>x</tool_call>", {}, ["answer: <tool_call>x</tool_call>"]],
  ["<think>x</think>", { calls: true }, ["answer: <think>x</think>"]],
  ["  spaces stay  ", { calls: true }, ["answer:   spaces stay  "]],
  [
    "r <tool_call> r</think><tool_call>c</tool_call><response>a</response>",
    { ...THINKS, calls: true },
    ["reasoning: r <tool_call> r", "call: c", "end", "answer: a"],
  ],
];

test.each(CASES)("%j", (text, options, expected) => {
  expect(split(text, options)).toEqual(expected);
});

test("in any pieces", () => {
  fc.assert(
    fc.property(
      fc.constantFrom(...CASES),
      fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 12 }),
      ([text, options, expected], sizes) => {
        expect(split(text, options, sizes)).toEqual(expected);
      },
    ),
    { numRuns: 500 },
  );
});

test("any text at all, in any pieces as in one", () => {
  const words = fc.constantFrom(
    "<think>",
    "</think>",
    "<response>",
    "</response>",
    "<tool_call>",
    "</tool_call>",
    "<",
    ">",
    " ",
    "\n",
    "a",
    "</",
    "t",
  );
  const options = fc
    .record({ thinks: fc.boolean(), calls: fc.boolean(), insideReasoning: fc.constant(false) })
    .chain((o) => fc.constant(o).map((each) => ({ ...each, insideReasoning: each.thinks })));
  fc.assert(
    fc.property(
      fc.array(words, { maxLength: 14 }),
      options,
      fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 8 }),
      (parts, o, sizes) => {
        const text = parts.join("");
        expect(split(text, o, sizes)).toEqual(split(text, o));
      },
    ),
    { numRuns: 2000 },
  );
});

describe("a call's JSON", () => {
  const names = new Set(["f", "weather"]);
  const read = (text: string, sizes: readonly number[], held = false) => {
    const reader = new CallReader(names, held);
    const pieces: { name?: string; arguments: string }[] = [];
    for (let at = 0, i = 0; at < text.length; i++) {
      const size = Math.max(1, sizes[i % sizes.length]);
      const piece = reader.push(text.slice(at, at + size));
      if (piece) pieces.push(piece);
      at += size;
    }
    return { pieces, complete: reader.complete, told: reader.told };
  };

  test("name first, arguments as they come, in any pieces and order of keys, for any arguments", () => {
    const value = fc.dictionary(fc.string({ maxLength: 4 }), fc.jsonValue({ maxDepth: 2 }), { maxKeys: 4 });
    const key = fc.constantFrom("arguments", "parameters");
    fc.assert(
      fc.property(
        value,
        key,
        fc.boolean(),
        fc.constantFrom(undefined, 1),
        fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 1 }),
        fc.boolean(),
        (args, k, swapped, indent, sizes, held) => {
          const call = swapped ? { [k]: args, name: "f", extra: [1, { name: "no" }] } : { extra: "}", name: "f", [k]: args };
          const { pieces, complete } = read(`\n${JSON.stringify(call, null, indent)} \n`, sizes, held);
          expect(complete).toBe(true);
          expect(pieces.map((piece) => piece.name)).toEqual(["f", ...pieces.slice(1).map(() => undefined)]);
          expect(JSON.parse(pieces.map((piece) => piece.arguments).join(""))).toEqual(JSON.parse(JSON.stringify(args)));
        },
      ),
      { numRuns: 500 },
    );
  });

  test.each([
    ['{"name": "weather"}', "{}"],
    ['{"name": "weather", "arguments": null}', "{}"],
    ['{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', '{"city": "Rome"}'],
  ])("%s has the arguments %s", (text, expected) => {
    const { pieces, complete } = read(text, [3]);
    expect([complete, pieces.map((piece) => piece.arguments).join("")]).toEqual([true, expected]);
  });

  test.each([
    '{"name": "unknown", "arguments": {}}',
    '{"name": 1}',
    "no JSON",
    "[]",
    "{}",
    '{"name": "f",',
    "",
    '{"arguments": {"a": 1}}',
    '{name: "f"}',
    // Arguments that are no JSON object.
    '{"name": "f", "arguments": {a: 1}}',
    '{"name": "f", "arguments": {"a": 1,}}',
    '{"name": "f", "arguments": "two"}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": "f", "arguments": "null"}',
    '{"name": "f", "arguments": 2}',
    '{"name": "f", "arguments": [{}]}',
    '{"name": "f", "arguments": {"a": {"b": 1}',
  ])("%j is none", (text) => {
    expect(read(text, [2])).toEqual({ pieces: [], complete: false, told: false });
  });

  test("arguments arrive before the call is over where a grammar holds them", () => {
    const reader = new CallReader(names, true);
    expect(reader.push('{"name": "f", "arguments": {"text": "on')).toEqual({ name: "f", arguments: '{"text": "on' });
    expect(reader.push("ce up")).toEqual({ arguments: "ce up" });
    expect(reader.complete).toBe(false);
  });
});
