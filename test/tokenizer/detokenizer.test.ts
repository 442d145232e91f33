import fc from "fast-check";
import { expect, test } from "vitest";
import type { Step } from "../../src/tokenizer/decoder.ts";
import { Detokenizer } from "../../src/tokenizer/detokenizer.ts";
import { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { fixtureFolder, folder, miniJson } from "./folders.ts";

const replace = { type: "Replace", pattern: { String: "▁" }, content: " " };
const decoders = {
  ernie: { type: "Sequence", decoders: [replace, { type: "ByteFallback" }, { type: "Fuse" }] },
  llama: {
    type: "Sequence",
    decoders: [replace, { type: "ByteFallback" }, { type: "Fuse" }, { type: "Strip", content: " ", start: 1, stop: 2 }],
  },
  metaspace: {
    type: "Sequence",
    decoders: [{ type: "ByteFallback" }, { type: "Metaspace", replacement: "▁", prepend_scheme: "first", split: false }],
  },
  "replaced late": {
    type: "Sequence",
    decoders: [{ type: "ByteFallback" }, { type: "Fuse" }, replace, { ...replace, pattern: { String: "aab" } }],
  },
  bytes: { type: "ByteLevel" },
};

function streamed(tokenizer: Tokenizer, ids: readonly number[], cuts: readonly number[], skip: boolean, clean: boolean): string {
  const detokenizer = new Detokenizer(tokenizer, { skip_special_tokens: skip, clean_up_tokenization_spaces: clean });
  let text = "";
  for (let i = 0, k = 0; i < ids.length; k++) {
    const count = cuts[k % Math.max(1, cuts.length)] ?? 1;
    const part = count === 1 ? detokenizer.push(ids[i] ?? -1) : detokenizer.push(ids.slice(i, i + count));
    expect(part).not.toMatch(/\p{Surrogate}/u);
    text += part;
    i += count;
  }
  return text + detokenizer.finish();
}

test.each(Object.entries(decoders))("%s: streamed text equals decoded text for any ids", async (_, decoder) => {
  const tokenizer = await Tokenizer.open(folder({ "tokenizer.json": miniJson({ decoder }) }));
  const character = fc.string({ unit: "binary", minLength: 1, maxLength: 3 }).map((text) => tokenizer.encode(text));
  const id = fc.integer({ min: 0, max: tokenizer.size - 1 }).map((each) => [each]);
  const tail = fc.integer({ min: 262, max: tokenizer.size - 1 }).map((each) => [each]);
  fc.assert(
    fc.property(
      fc.array(fc.oneof(character, id, tail)).map((lists) => lists.flat()),
      fc.array(fc.integer({ min: 1, max: 5 })),
      fc.boolean(),
      fc.boolean(),
      (ids, cuts, skip, clean) => {
        const whole = tokenizer.decode(ids, { skip_special_tokens: skip, clean_up_tokenization_spaces: clean });
        expect(streamed(tokenizer, ids, cuts, skip, clean)).toBe(whole);
      },
    ),
    { numRuns: 300 },
  );
});

test("clean-up equals replacing in the whole text", async () => {
  const tokenizer = await Tokenizer.open(fixtureFolder("ernie.json", "tokenizer.json"));
  const pieces = [" ", "  ", ".", "?", " ,", "'", " ' ", "n't", "'m", "'ve", "'s", "'re", "a", "!"];
  const patterns = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"];
  fc.assert(
    fc.property(fc.array(fc.constantFrom(...pieces)), (parts) => {
      const text = parts.join("");
      const clean = patterns.reduce((result, pattern) => result.replaceAll(pattern, pattern.trim()), text);
      expect(tokenizer.decode(tokenizer.encode(text), { clean_up_tokenization_spaces: true })).toBe(clean);
    }),
  );
});

test("characters come out with their last byte, and never half", async () => {
  const tokenizer = await Tokenizer.open(folder({ "tokenizer.json": miniJson() }));
  const push = (ids: number[]) => {
    const detokenizer = tokenizer.detokenizer();
    return [...ids.map((id) => detokenizer.push(id)), detokenizer.finish()];
  };
  const byte = (...values: number[]) => values.map((value) => 6 + value);
  expect(push(byte(0xf0, 0x9f, 0x99, 0x82, 0xe4, 0xbd))).toEqual(["", "", "", "🙂", "", "", "\ufffd\ufffd"]);
  expect(push([...byte(0xe4, 0xbd), 263])).toEqual(["", "", "\ufffd\ufffda", ""]);
  expect(push(byte(0xef, 0xbb, 0xbf))).toEqual(["", "", "\ufeff", ""]); // a byte order mark is a character
  expect(push(byte(0xed, 0xa0, 0x80)).join("")).toBe("\ufffd\ufffd\ufffd"); // a surrogate is none
  expect(push(byte(0xe4, 0x41)).join("")).toBe("\ufffdA");
  expect(push([1, 263, 2])).toEqual(["", "a", "", ""]); // special tokens are left out by default
});

test("the dummy prefix goes once, at the beginning only", async () => {
  const tokenizer = await Tokenizer.open(fixtureFolder("llama.model", "tokenizer.model"));
  const ids = tokenizer.encode("a b  c");
  expect(streamed(tokenizer, ids, [1], true, false)).toBe("a b  c");
});

test("finish ends it", async () => {
  const detokenizer = new Detokenizer(await Tokenizer.open(folder({ "tokenizer.json": miniJson() })));
  expect([detokenizer.push(263), detokenizer.finish(), detokenizer.finish()]).toEqual(["a", "", ""]);
  expect(() => detokenizer.push(263)).toThrow("push after finish");
});

test("a token costs the same late as early", async () => {
  const { vocabulary } = await Tokenizer.open(folder({ "tokenizer.json": miniJson() }));
  let work = 0; // tokens looked up, and characters that the decoder was given
  const counted = new Proxy(vocabulary, {
    get(target, key) {
      if (key === "token")
        return (id: number) => {
          work++;
          return target.token(id);
        };
      if (key !== "decoder") return Reflect.get(target, key);
      return ((next) => {
        const flow = target.decoder(next);
        const push = (piece: string) => {
          work += piece.length;
          flow.push(piece);
        };
        return { push, finish: () => flow.finish() };
      }) satisfies Step;
    },
  });
  const detokenizer = new Detokenizer({ vocabulary: counted, clean_up_tokenization_spaces: false });
  const workOf = (count: number) => {
    work = 0;
    for (let i = 0; i < count; i++) detokenizer.push(263 + (i % 3));
    return work;
  };
  const early = workOf(3000);
  expect(early).toBeGreaterThan(3000);
  workOf(30_000);
  expect(workOf(3000)).toBe(early);
});
