/** What may be changed in a text, by which word, and that all else stays: names, numbers, placeholders, code, negations. */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { expect, test } from "vitest";
import { EDITS, edited } from "../../../src/train/augment/edits.ts";
import { keptSpans } from "../../../src/train/augment/keep.ts";
import { joined, openCilin, openWordnet } from "../../../src/train/augment/thesaurus.ts";
import { isNegation, scriptOf, tokensOf } from "../../../src/train/augment/words.ts";
import { Random } from "../../../src/train/random.ts";
import { fixtures, temporary } from "../data/files.ts";

const wordnet = await openWordnet();
const cilin = await openCilin(join(fixtures, "synonyms.txt"));
const thesaurus = joined(wordnet, cilin);
const kept = (text: string, listed: readonly string[] = [], beside: readonly string[] = []) =>
  keptSpans(text, { listed, beside }).map(({ from, to }) => text.slice(from, to));

test.each<[string, readonly string[]]>([
  ["write to a.b@c.org or see https://x.org/a?b=1, (www.y.org).", ["a.b@c.org", "https://x.org/a?b=1", "www.y.org"]],
  ["it cost $1,234.50 or 20% more on 3/4/2024 at 10:30", ["$1,234.50", "20%", "3/4/2024", "10:30"]],
  ["one, twenty and the second", ["one", "twenty", "second"]],
  [
    `hello {name}, {{ user.id }}, $${"{x}"}, <b>bold</b>, [SLOT] and %s`,
    ["{name}", "{{ user.id }}", `$${"{x}"}`, "<b>", "</b>", "[SLOT]", "%s"],
  ],
  ["call `f(x)` as in ```js\nf(1)\n``` now", ["`f(x)`", "```js\nf(1)\n```"]],
  ["open /etc/passwd and report.csv of @anna #tag", ["/etc/passwd", "report.csv", "@anna", "#tag"]],
  ["my friend Anna Smith of NASA likes her iPhone and I'm late", ["Anna", "Smith", "NASA", "iPhone"]],
  ["Good service at Good Hotel. Please wait.", ["Good", "Good", "Hotel"]],
  ["Anna Smith came. Then she left.", ["Anna", "Smith"]],
  ["it is not here, I don't know, never", ["not here", "don't know", "never"]],
  ["等了三十分钟，第二次，没有送到，不好吃，非常好", ["三十", "第二", "没有送到", "不好吃"]],
  ["我读过《红楼梦》两遍", ["《红楼梦》"]],
])("%s: keeps %j", (text, expected) => {
  expect(kept(text)).toEqual(expected);
});

test("listed phrases are kept in any case and as whole words, words of the answer too", () => {
  expect(kept("the Gold card, a goldsmith, a gold Card", ["gold card"])).toEqual(expect.arrayContaining(["Gold card", "gold Card"]));
  expect(kept("a goldsmith", ["gold"])).toEqual([]);
  expect(kept("给我招牌饭", ["招牌饭"])).toEqual(["招牌饭"]);
  expect(kept("which river is longer", [], ["The river Nile"])).toEqual(["river"]);
});

test("tokens joined are the text, whatever is kept", () => {
  fc.assert(
    fc.property(fc.string({ unit: "grapheme" }), fc.array(fc.string({ minLength: 1, maxLength: 3 })), (text, listed) => {
      const spans = keptSpans(text, { listed, beside: [] });
      expect(
        tokensOf(text, spans)
          .map((token) => token.text)
          .join(""),
      ).toBe(text);
      for (const [i, { from }] of spans.entries()) if (i > 0) expect(from).toBeGreaterThanOrEqual(spans[i - 1].to);
    }),
    { seed: 1, numRuns: 100 },
  );
});

test("a search takes time proportional to the text, whatever is in it", () => {
  const time = (n: number) => {
    const started = performance.now();
    for (const piece of ["a", "a-", "<a ", "{a", "a.", "/a", "1,", "@", "`", "《", "[A"]) kept(piece.repeat(n));
    return performance.now() - started;
  };
  time(1000);
  expect(time(32_000)).toBeLessThan(100 * time(2000) + 1000); // 16 times as long, not 256
});

test("English synonyms are those of the most frequent sense, of lemmas that are no names and no forms of verbs", () => {
  expect(wordnet.synonyms("buy")).toEqual(["purchase"]);
  expect(wordnet.synonyms("Quick")).toEqual(["speedy"]);
  for (const word of ["received", "said", "xyzzy", "", "a.b", "zyrian", "'hood", "%"]) expect(wordnet.synonyms(word)).toEqual([]);
});

test("Chinese synonyms: lists of synonyms only, of words with one meaning, no negations", () => {
  expect(thesaurus.synonyms("美味")).toEqual(["可口", "好吃"]);
  expect(thesaurus.synonyms("有点")).toEqual(["稍微"]);
  for (const word of ["餐厅", "骑手", "地方", "没有"]) expect(thesaurus.synonyms(word)).toEqual([]);
  expect(joined(null, null).synonyms("buy")).toEqual([]);
});

test("a dictionary in GB18030 is read, one of another format is refused with its line", async () => {
  const folder = temporary();
  // "Aa01A01= 美味 可口" in GB18030.
  const bytes = Buffer.concat([
    Buffer.from("Aa01A01= "),
    Uint8Array.of(0xc3, 0xc0, 0xce, 0xb6),
    Buffer.from(" "),
    Uint8Array.of(0xbf, 0xc9, 0xbf, 0xda),
  ]);
  writeFileSync(join(folder, "gb.txt"), bytes);
  expect((await openCilin(join(folder, "gb.txt"))).synonyms("可口")).toEqual(["美味"]);
  writeFileSync(join(folder, "bad.txt"), "Aa01A01= a b\nnot so\n");
  await expect(openCilin(join(folder, "bad.txt"))).rejects.toThrow('bad.txt, line 2: not like "Aa01A01= 人 士 人物": "not so"');
  writeFileSync(join(folder, "none.txt"), "Aa01A01# a b\n");
  await expect(openCilin(join(folder, "none.txt"))).rejects.toThrow("no line lists synonyms");
  await expect(openCilin(join(folder, "missing.txt"))).rejects.toThrow("missing.txt: the synonyms cannot be read");
  await expect(openWordnet(folder)).rejects.toThrow("WordNet's file index.sense cannot be read");
});

const TEXT = "Please buy a quick gift for Anna at 10:30 and don't call {name} about the large house near the river";

test.each(EDITS)("%s: what is kept stays, in its order, and the text changes", (edit) => {
  const own = kept(TEXT);
  let changed = 0;
  for (let seed = 0; seed < 200; seed++) {
    const text = edited(edit, tokensOf(TEXT, keptSpans(TEXT, { listed: [], beside: [] })), 0.2, new Random(seed), thesaurus);
    if (text === null) continue;
    expect(text).not.toBe(TEXT);
    changed++;
    let at = 0;
    for (const each of own) {
      const found = text.indexOf(each, at);
      expect(found).toBeGreaterThanOrEqual(0);
      at = found + each.length;
    }
  }
  expect(changed).toBeGreaterThan(150);
});

test("n = max(1, alpha · words) words are changed", () => {
  const tokens = tokensOf(TEXT);
  const words = tokens.filter(({ isWord }) => isWord).length;
  for (const alpha of [0.01, 0.2]) {
    const n = Math.max(1, Math.floor(alpha * words));
    const replaced = edited("synonyms", tokens, alpha, new Random(3), thesaurus) ?? "";
    const inserted = edited("insert", tokens, alpha, new Random(3), { synonyms: (word) => (word === "house" ? ["home"] : []) }) ?? "";
    expect(inserted.split("home").length - 1).toBe(n);
    expect(tokensOf(replaced).filter(({ text }) => !TEXT.includes(text)).length).toBeLessThanOrEqual(3 * n);
    expect(replaced).not.toBe(TEXT);
  }
});

test("deletion takes each word with probability alpha, and never the last one", () => {
  const text = Array.from({ length: 100 }, (_, i) => `w${String.fromCharCode(97 + (i % 26))}x`).join(" ");
  let left = 0;
  for (let seed = 0; seed < 200; seed++)
    left += (edited("delete", tokensOf(text), 0.1, new Random(seed), thesaurus) ?? text).split(" ").length;
  const sigma = Math.sqrt(200 * 100 * 0.1 * 0.9);
  expect(Math.abs(left - 200 * 90)).toBeLessThan(5 * sigma);
  for (let seed = 0; seed < 50; seed++)
    expect(edited("delete", tokensOf("go home"), 1, new Random(seed), thesaurus)).toMatch(/^(go|home)$/);
});

test("swaps keep the words, and single Chinese characters stay beside each other", () => {
  const sorted = (text: string) =>
    tokensOf(text)
      .map((token) => token.text)
      .sort();
  const swapped = edited("swap", tokensOf("alpha beta gamma, delta"), 0.5, new Random(2), thesaurus) ?? "";
  expect(sorted(swapped)).toEqual(sorted("alpha beta gamma, delta"));
  expect(edited("swap", tokensOf("很快，很好"), 0.5, new Random(1), thesaurus)).toBeNull();
  expect(edited("delete", tokensOf("味道很棒"), 1, new Random(1), thesaurus)).toBe("很棒");
});

test("capitals and articles follow the new word", () => {
  const one = { synonyms: (word: string) => ({ gift: ["award"], old: ["ancient"], buy: ["purchase"] })[word.toLowerCase()] ?? [] };
  expect(edited("synonyms", tokensOf("Buy a gift"), 1, new Random(1), one)).toBe("Purchase an award");
  expect(edited("synonyms", tokensOf("A old European and an hour"), 1, new Random(1), one)).toBe("A ancient European and an hour");
});

test("negations and scripts", () => {
  for (const word of ["not", "Don't", "cannot", "不是", "没有", "未"]) expect(isNegation(word)).toBe(true);
  for (const word of ["note", "非常", "good", "别人"]) expect(isNegation(word)).toBe(false);
  expect([scriptOf("味道 ok 很好"), scriptOf("a good 味"), scriptOf("123")]).toEqual(["han", "latin", "latin"]);
});
