/** Finds what must stay as it is in a text: names, numbers, addresses, placeholders, code, and what the user lists. Knows no method. */
import { isNegation, type Span, tokensOf } from "./words.ts";

/**
 * Each a kind of thing that is kept whole. The first that matches at a place wins. None may begin in the middle of what it has passed over, and
 * lengths are bounded: a search takes time proportional to the text, whatever is in it.
 */
const PATTERNS: readonly string[] = [
  // Code, between fences and between backquotes.
  "```[\\s\\S]*?(?:```|$)",
  "`[^`\\n]+`",
  // Addresses.
  "(?:(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,20}://|www\\.)[^\\s<>\"'，。；、）】》]*[^\\s<>\"'，。；、）】》.,;:!?)\\]]",
  "(?<![\\w.+-])[\\w.+-]{1,64}@[\\w-]{1,63}(?:\\.[\\w-]{1,63})+",
  // Placeholders and markup: {{name}}, {name}, ${name}, <tag>, [SLOT], %s, %(name)s.
  "\\{\\{[^{}]{0,200}\\}\\}",
  "\\$?\\{[^{}\\n]{0,200}\\}",
  "</?[A-Za-z|][^<>\\n]{0,500}>",
  "\\[[A-Z][A-Z0-9_ -]{0,60}\\]",
  "%(?:\\(\\w{1,60}\\))?[sdif]\\b",
  // Mentions, tags, paths and file names.
  "[@#][\\w\\u4e00-\\u9fff]+",
  "(?:~|\\.{1,2})?(?:/[\\w.-]+){2,}/?",
  "(?<![\\w-])[\\w-]{1,64}\\.(?:txt|csv|tsv|json|jsonl|pdf|docx?|xlsx?|png|jpe?g|py|ts|js|cpp|md|html?)\\b",
  // Titles of works.
  "《[^《》\\n]{1,100}》",
  // Numbers with signs, separators, units and currencies; letters and digits together (A380, 3pm, COVID-19); numbers in words.
  "[-+]?[$€£¥￥]?\\d+(?:[.,:/-]\\d+)*(?:\\s?[%‰°€£¥]|[A-Za-z]+\\b)?",
  "\\b[A-Za-z]+-?\\d[\\w-]*",
  "\\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundreds?|thousands?|millions?|billions?|first|second|third|fourth|fifth)\\b",
  "[零〇一二三四五六七八九十百千万亿两]{2,}",
  "第[零〇一二三四五六七八九十百千万亿两]+",
];
const PATTERN = new RegExp(PATTERNS.map((each) => `(?:${each})`).join("|"), "giu");
/** Words in capitals, or with capitals inside: NASA, iPhone, McDonald. */
const MIXED = /^(?:\p{Lu}{2,}[\p{L}\d]*|\p{L}+\p{Lu}[\p{L}\d]*)$/u;
const CAPITAL = /^\p{Lu}/u;
const SENTENCE_END = /[.!?。！？\n:："“(（*-]\s*$/u;

export interface KeepOptions {
  /** Words and phrases to keep, in any case. */
  readonly listed: readonly string[];
  /** Texts of the row that are not changed: words that they share with the text are kept. */
  readonly beside: readonly string[];
}

/** The spans of a text that must stay as they are, in order and apart from each other. */
export function keptSpans(text: string, { listed, beside }: KeepOptions): Span[] {
  return merged(things(text, listed, false).concat(negations(text), shared(text, beside)));
}

/** What another wording of a text must have too: all that is kept but negations and what is shared with other texts. */
export function keptTexts(text: string, listed: readonly string[]): string[] {
  return merged(things(text, listed, true)).map(({ from, to }) => text.slice(from, to));
}

/** @param certain leave out what only may be a name */
function things(text: string, listed: readonly string[], certain: boolean): Span[] {
  const found = Array.from(text.matchAll(PATTERN), (match) => ({ from: match.index, to: match.index + match[0].length }));
  return found.concat(
    names(text, certain),
    listed.flatMap((phrase) => occurrences(text, phrase)),
  );
}

function occurrences(text: string, phrase: string): Span[] {
  const escaped = phrase.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  // A phrase that begins or ends with a letter is looked for as whole words; Chinese has no marks of words.
  const isLetter = (at: string) => /[\p{L}\p{N}]/u.test(at) && !/\p{Script=Han}/u.test(at);
  const before = isLetter(phrase[0]) ? "(?<![\\p{L}\\p{N}])" : "";
  const after = isLetter(phrase[phrase.length - 1]) ? "(?![\\p{L}\\p{N}])" : "";
  const pattern = new RegExp(before + escaped + after, "giu");
  return Array.from(text.matchAll(pattern), (match) => ({ from: match.index, to: match.index + match[0].length }));
}

interface Word extends Span {
  readonly text: string;
}

function wordsOf(text: string): Word[] {
  const words: Word[] = [];
  let at = 0;
  for (const token of tokensOf(text)) {
    if (token.isWord) words.push({ text: token.text, from: at, to: at + token.text.length });
    at += token.text.length;
  }
  return words;
}

/** Words with a capital; at the start of a sentence only where the same word has one elsewhere, or the next one has one (Anna Smith, but also Tell Anna). */
function names(text: string, certain: boolean): Span[] {
  const words = wordsOf(text).map((word) => ({
    ...word,
    starts: word.from === 0 || SENTENCE_END.test(text.slice(Math.max(0, word.from - 8), word.from)),
  }));
  const inside = new Set(words.filter(({ starts, text: word }) => !starts && isName(word)).map(({ text: word }) => word));
  return words.filter((word, i) => {
    if (!word.starts) return isName(word.text);
    const next = words[i + 1];
    const goesOn = !certain && next !== undefined && !next.starts && isCapital(word.text) && isName(next.text);
    return MIXED.test(word.text) || inside.has(word.text) || goesOn;
  });
}

/** Negations, each with the word behind it: elsewhere, it would turn another word round. */
function negations(text: string): Span[] {
  const words = wordsOf(text);
  return words.flatMap((word, i) => {
    if (!isNegation(word.text)) return [];
    const next = words[i + 1];
    const isBeside = next !== undefined && text.slice(word.to, next.from).trim() === "";
    return [{ from: word.from, to: isBeside ? next.to : word.to }];
  });
}

function isCapital(word: string): boolean {
  return CAPITAL.test(word) && word.length > 1;
}

/** A capital anywhere but at the start of a sentence, except in `I` and its short forms. */
function isName(word: string): boolean {
  return (isCapital(word) && !/^I['’]/.test(word)) || MIXED.test(word);
}

/** Words that another text of the row has too: an answer that repeats the question's words must still fit it. */
function shared(text: string, beside: readonly string[]): Span[] {
  if (beside.length === 0) return [];
  const theirs = new Set(beside.flatMap((each) => wordsOf(each).map(({ text: word }) => word.toLowerCase())));
  return wordsOf(text).filter(({ text: word }) => theirs.has(word.toLowerCase()));
}

function merged(spans: readonly Span[]): Span[] {
  const sorted = spans.filter(({ from, to }) => to > from).sort((a, b) => a.from - b.from || b.to - a.to);
  const apart: Span[] = [];
  for (const span of sorted) {
    const last = apart.at(-1);
    if (last && span.from < last.to) apart[apart.length - 1] = { from: last.from, to: Math.max(last.to, span.to) };
    else apart.push({ from: span.from, to: span.to });
  }
  return apart;
}
