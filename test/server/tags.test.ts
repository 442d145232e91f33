/** Reasoning, answers and calls come apart the same way, however the text is cut. */
import fc from "fast-check";
import { expect, test } from "vitest";
import { type Piece, TagSplitter } from "../../src/server/tags.ts";
import { withoutTools } from "../../src/server/tools.ts";

interface Split {
  readonly answer: string;
  readonly reasoning: string;
  readonly calls: readonly { readonly name: string; readonly arguments: string }[];
}

function split(pieces: readonly string[], reasoning = false): Split {
  const splitter = new TagSplitter(reasoning);
  const all: Piece[] = [...pieces.flatMap((p) => splitter.push(p)), ...splitter.finish()];
  const calls: { name: string; arguments: string }[] = [];
  for (const piece of all) {
    if (piece.kind !== "toolCall") continue;
    if (piece.name !== undefined) calls[piece.index] = { name: piece.name, arguments: "" };
    calls[piece.index].arguments += piece.arguments;
  }
  const of = (channel: string) => all.flatMap((p) => (p.kind === "text" && p.channel === channel ? [p.text] : [])).join("");
  return { answer: of("answer"), reasoning: of("reasoning"), calls };
}

const CASES: [string, boolean, string, Split][] = [
  ["a plain answer", false, "Hello < world", { answer: "Hello < world", reasoning: "", calls: [] }],
  [
    "a thinking model's answer",
    true,
    "\nLet me see.\n</think>\n\n<response>\nIt is 42.\n</response>\n",
    { answer: "It is 42.\n", reasoning: "Let me see.\n", calls: [] },
  ],
  ["thinking that the text opens itself", false, "<think>hm</think>yes", { answer: "yes", reasoning: "hm", calls: [] }],
  [
    "two calls behind a thought",
    true,
    'I ask.</think>\n<tool_call>\n{"name": "a", "arguments": {"x": "}</t\\"", "y": [1, {"z": 2}]}}\n</tool_call>\n<tool_call>{"name":"b","arguments":{}}</tool_call>',
    {
      answer: "",
      reasoning: "I ask.",
      calls: [
        { name: "a", arguments: '{"x": "}</t\\"", "y": [1, {"z": 2}]}' },
        { name: "b", arguments: "{}" },
      ],
    },
  ],
  [
    "a call with its arguments first",
    false,
    '<tool_call>{"arguments": {"n": 1}, "name": "c"}</tool_call>',
    { answer: "", reasoning: "", calls: [{ name: "c", arguments: '{"n":1}' }] },
  ],
  ["what is no call is shown", false, "<tool_call>call mom</tool_call>", { answer: "call mom", reasoning: "", calls: [] }],
  ["a call that was cut off before its name is left out", false, 'ok <tool_call>{"na', { answer: "ok ", reasoning: "", calls: [] }],
];

test.each(CASES)("%s, in any pieces", (_, reasoning, text, wanted) => {
  expect(split([text], reasoning)).toEqual(wanted);
  expect(split([...text], reasoning)).toEqual(wanted);
  fc.assert(
    fc.property(fc.array(fc.nat(text.length), { maxLength: 12 }), (cuts) => {
      const at = [0, ...cuts.sort((a, b) => a - b), text.length];
      expect(
        split(
          at.slice(1).map((end, i) => text.slice(at[i], end)),
          reasoning,
        ),
      ).toEqual(wanted);
    }),
  );
});

test("nothing is held back longer than it must be", () => {
  const splitter = new TagSplitter(false);
  expect(splitter.push("a <")).toEqual([{ kind: "text", channel: "answer", text: "a " }]);
  expect(splitter.push("b>")).toEqual([{ kind: "text", channel: "answer", text: "<b>" }]);
});

test("for templates that know no tools, everything that was said of them stands in the messages", () => {
  const messages = withoutTools(
    [
      { role: "system", content: "Be brief." },
      { role: "user", content: "Weather?" },
      { role: "assistant", content: null, tool_calls: [{ id: "1", type: "function", function: { name: "w", arguments: '{"c":"Rome"}' } }] },
      { role: "tool", tool_call_id: "1", content: "sunny" },
    ],
    [{ name: "w", description: "the weather", parameters: { type: "object" } }],
  );
  expect(messages.map((m) => m.role)).toEqual(["system", "user", "assistant", "user"]);
  const all = JSON.stringify(messages);
  for (const part of ["Be brief.", "the weather", "Rome", "sunny"]) expect(all).toContain(part);
});
