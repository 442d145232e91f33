/**
 * The four edits of EDA (https://arxiv.org/abs/1901.11196): synonym replacement, random insertion, random swap and random deletion. As there, each changes
 * n = max(1, alpha · words) words, and deletion takes each word with probability alpha. What is kept stays where it is. Pure but for the random numbers.
 */
import type { Random } from "../random.ts";
import type { Thesaurus } from "./thesaurus.ts";
import { isFunctionWord, isHan, type Token } from "./words.ts";

export const EDITS = ["synonyms", "insert", "swap", "delete"] as const;
export type Edit = (typeof EDITS)[number];

/** The text after an edit, or null where nothing could be changed. */
export function edited(edit: Edit, tokens: readonly Token[], alpha: number, random: Random, thesaurus: Thesaurus): string | null {
  const free = [...tokens.keys()].filter((i) => tokens[i].isWord && !tokens[i].kept);
  const whole = free.filter((i) => !isFragment(tokens[i]));
  const words = tokens.reduce((sum, token) => sum + (token.isWord ? 1 : 0), 0);
  const n = Math.max(1, Math.floor(alpha * words));
  const texts = tokens.map(({ text }) => text);
  switch (edit) {
    case "synonyms":
      return replaced(texts, free, n, random, thesaurus);
    case "insert":
      return inserted(tokens, texts, free, n, random, thesaurus);
    case "swap":
      return swapped(texts, whole, n, random);
    case "delete":
      return deleted(tokens, texts, whole, alpha, random);
    default:
      return edit satisfies never;
  }
}

/** Replaces n different words by synonyms, wherever each occurs. */
function replaced(texts: string[], free: readonly number[], n: number, random: Random, thesaurus: Thesaurus): string | null {
  const candidates = [...new Set(free.map((i) => texts[i].toLowerCase()))].filter((word) => !isFunctionWord(word));
  let changed = 0;
  for (const word of random.shuffle(candidates)) {
    if (changed >= n) break;
    const synonyms = thesaurus.synonyms(word);
    if (synonyms.length === 0) continue;
    const synonym = random.pick(synonyms);
    for (const i of free)
      if (texts[i].toLowerCase() === word) {
        texts[i] = cased(synonym, texts[i]);
        if (free.includes(i - 2) && texts[i - 1] === " ") texts[i - 2] = article(texts[i - 2], word, synonym);
      }
    changed++;
  }
  return changed === 0 ? null : texts.join("");
}

/** Inserts n synonyms of random words in front of random words. */
function inserted(
  tokens: readonly Token[],
  texts: string[],
  free: readonly number[],
  n: number,
  random: Random,
  thesaurus: Thesaurus,
): string | null {
  const sources = free.filter((i) => !isFunctionWord(texts[i]) && thesaurus.synonyms(texts[i]).length > 0).map((i) => texts[i]);
  const places = [...tokens.keys()].filter((i) => i > 0 && tokens[i].isWord && !(isFragment(tokens[i]) && isFragment(tokens[i - 1])));
  if (sources.length === 0 || places.length === 0) return null;
  for (let k = 0; k < n; k++) {
    const synonym = random.pick(thesaurus.synonyms(random.pick(sources)));
    const i = random.pick(places);
    texts[i] = isHan(synonym) ? synonym + texts[i] : `${synonym} ${texts[i]}`;
  }
  return texts.join("");
}

/** Swaps two words, n times. */
function swapped(texts: string[], free: readonly number[], n: number, random: Random): string | null {
  if (new Set(free.map((i) => texts[i])).size < 2) return null;
  const before = texts.join("");
  for (let k = 0; k < n; k++) {
    const [a, b] = [random.pick(free), random.pick(free)];
    [texts[a], texts[b]] = [texts[b], texts[a]];
  }
  const after = texts.join("");
  return after === before ? null : after;
}

/** Deletes each word with probability alpha, with the space in front of it; at least one stays. */
function deleted(tokens: readonly Token[], texts: string[], free: readonly number[], alpha: number, random: Random): string | null {
  const gone = free.filter(() => random.real() < alpha);
  const words = tokens.reduce((sum, token) => sum + (token.isWord ? 1 : 0), 0);
  if (gone.length >= words) gone.splice(random.below(gone.length), 1);
  if (gone.length === 0) return null;
  for (const i of gone) {
    texts[i] = "";
    // The space before it, or behind it at the start of a line.
    const space = [i - 1, i + 1].find((at) => at >= 0 && at < texts.length && /^[ \t]+$/.test(texts[at]));
    if (space !== undefined) texts[space] = "";
  }
  return texts.join("");
}

/** A Chinese character alone: often part of a word that the segmenter does not know, which must not be torn apart. */
function isFragment({ text }: Token): boolean {
  return text.length === 1 && isHan(text);
}

/** A word with the capital of the one that it replaces. */
function cased(word: string, like: string): string {
  return /^\p{Lu}/u.test(like) ? word[0].toUpperCase() + word.slice(1) : word;
}

/** `a` or `an`, where the word behind it now begins otherwise; any other word stays. */
function article(word: string, before: string, now: string): string {
  const vowel = (text: string) => /^[aeiou]/i.test(text);
  if (!/^an?$/i.test(word) || vowel(before) === vowel(now)) return word;
  return word[0] + (vowel(now) ? "n" : "");
}
