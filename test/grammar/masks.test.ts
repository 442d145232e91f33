/** Masks against the definition: a token is allowed if, and only if, its bytes can be followed one by one. With a real vocabulary. */
import { beforeAll, expect, test } from "vitest";
import { Automaton, type State } from "../../src/grammar/automaton.ts";
import { schemaGrammar } from "../../src/grammar/schema.ts";
import { Trie } from "../../src/grammar/trie.ts";
import { AutoTokenizer } from "../../src/index.ts";

const VOCABULARY = 20_480;
const ENDS = [2, 5];
let trie: Trie;
beforeAll(async () => {
  trie = await Trie.build((await AutoTokenizer.from_pretrained("default")).vocabulary, VOCABULARY);
});

const object = (properties: Record<string, unknown>) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
});

test.each<[what: string, schema: Record<string, unknown>, prefix: string]>([
  ["a string, at its start", { type: "string" }, '"'],
  ["a string, later", { type: "string" }, '"Laura'],
  ["a short string", { type: "string", maxLength: 5 }, '"'],
  ["a short string, near its end", { type: "string", maxLength: 5 }, '"abc'],
  ["a full string", { type: "string", maxLength: 5 }, '"abcde'],
  ["a string of moderate length", { type: "string", maxLength: 20 }, '"'],
  ["a long string", { type: "string", maxLength: 200 }, '"Laura'],
  ["a long string, near its end", { type: "string", maxLength: 40 }, `"${"x".repeat(30)}`],
  ["a least length", { type: "string", minLength: 3, maxLength: 200 }, '"'],
  ["a great least length", { type: "string", minLength: 100 }, '"'],
  ["in an escape", { type: "string", maxLength: 20 }, '"a\\'],
  ["in an escape's digits", { type: "string", maxLength: 20 }, '"a\\u00'],
  ["in a character of several bytes", { type: "string", maxLength: 20 }, '"中\u00e9'],
  ["a counted pattern", { type: "string", pattern: "^.{1,40}$" }, '"'],
  ["a counted pattern, near its end", { type: "string", pattern: "^.{1,40}$" }, `"${"x".repeat(30)}`],
  ["a property", object({ name: { type: "string", maxLength: 40 }, city: { type: "string" } }), '{"name": "Laura'],
  ["any value", {}, '{"a": [1, "'],
  ["a map", { type: "object", additionalProperties: { type: "string", maxLength: 30 } }, '{"a": "b'],
  ["a format", { type: "string", format: "date-time" }, '"2026-1'],
])("%s", (_, schema, prefix) => {
  const automaton = new Automaton(schemaGrammar(schema), trie, ENDS, new Map());
  const follow = (from: State | null, bytes: Uint8Array): State | null => {
    let state = from;
    for (const byte of bytes) state = state && automaton.accept(state, byteToken[byte]);
    return state;
  };
  const byteToken = Array.from({ length: 256 }, (_, byte) => trie.bytes.findIndex((b) => b.length === 1 && b[0] === byte));
  const state = follow(automaton.start, Buffer.from(prefix));
  if (state === null) throw new Error("the prefix is not allowed");
  const mask = automaton.mask(state);
  const wrong: string[] = [];
  for (let id = 0; id < VOCABULARY; id++) {
    const bytes = trie.bytes[id];
    if (bytes.length === 0) continue;
    const allowed = ((mask[id >> 5] >> (id & 31)) & 1) === 1;
    if (allowed !== (follow(state, bytes) !== null))
      wrong.push(`${allowed ? "allows" : "lacks"} ${JSON.stringify(Buffer.from(bytes).toString())}`);
  }
  expect(wrong).toEqual([]);
});
