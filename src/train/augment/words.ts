/** Splits a text into words and what stands between them, in any script. Knows no dictionary. */

export interface Token {
  readonly text: string;
  /** A word; else white space or punctuation. */
  readonly isWord: boolean;
  /** It must stay as it is, where it is. */
  readonly kept: boolean;
}

export type Script = "han" | "latin";

const HAN = /\p{Script=Han}/u;
/**
 * Words by the rules and dictionaries of Unicode's ICU, which Node has built in: for Chinese it finds more words of the synonym dictionary than jieba does
 * in prose and reviews, and it needs no package. Its dictionary is the same for all languages.
 */
const segmenter = new Intl.Segmenter("zh", { granularity: "word" });

/** The tokens of a text; joined, they are the text. @param kept spans that must stay, in order, from `from` up to but not including `to` */
export function tokensOf(text: string, kept: readonly Span[] = []): Token[] {
  const tokens: Token[] = [];
  let at = 0;
  for (const { from, to } of kept) {
    cut(text.slice(at, from), tokens);
    tokens.push({ text: text.slice(from, to), isWord: true, kept: true });
    at = to;
  }
  cut(text.slice(at), tokens);
  return tokens;
}

/** Part of a text, in UTF-16 units. */
export interface Span {
  readonly from: number;
  readonly to: number;
}

/** UTF-16 units that are segmented at a time: the segmenter takes time proportional to the square of its text's length. */
const PIECE = 1000;

/** Appends the tokens of a text, which is taken in pieces that end behind white space or punctuation where there is any. */
function cut(text: string, tokens: Token[]): void {
  for (let from = 0; from < text.length; ) {
    let to = Math.min(text.length, from + PIECE);
    if (to < text.length) {
      const ends = text.slice(from, to).search(/[\s\p{P}][^\s\p{P}]*$/u);
      if (ends > 0) to = from + ends + 1;
      // Not within a character of two units.
      if (/[\ud800-\udbff]/.test(text[to - 1]) && to - from > 1) to--;
    }
    for (const { segment, isWordLike } of segmenter.segment(text.slice(from, to)))
      tokens.push({ text: segment, isWord: isWordLike === true, kept: false });
    from = to;
  }
}

/** Whether a word is written in Chinese characters. */
export function isHan(word: string): boolean {
  return HAN.test(word);
}

/** The script that most letters of a text are in: Chinese characters count double, since they say more. */
export function scriptOf(text: string): Script {
  const han = text.match(/\p{Script=Han}/gu)?.length ?? 0;
  const letters = text.match(/\p{Alphabetic}/gu)?.length ?? 0;
  return 3 * han > letters ? "han" : "latin";
}

/** English words that carry grammar rather than meaning: they get no synonyms. */
const FUNCTION_WORDS: ReadonlySet<string> = new Set(
  (
    "a an the this that these those i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself " +
    "it its itself they them their theirs themselves who whom whose which what when where why how am is are was were be been being have has had having do " +
    "does did doing done will would shall should can could may might must ought of at by for with about against between into through during before after " +
    "above below to from up down in out on off over under again further then once here there all any both each few more most other some such only own same " +
    "so than too very just now and but if or because as until while also yet though although unless since let get got please yes okay ok im ive id ill youre"
  ).split(" "),
);
/** Words that turn a meaning round: without them, a label would no longer hold. */
const NEGATIONS: ReadonlySet<string> = new Set(
  (
    "no not nor none never neither nobody nothing nowhere without cannot hardly barely scarcely cant dont doesnt didnt isnt arent wasnt werent wont wouldnt " +
    "shouldnt couldnt hasnt havent hadnt 无 未 别 勿 莫 非 無 別 沒 沒有 从不 从未 從不 從未 毫不 并非 並非 绝非 难以 無法 无法"
  ).split(" "),
);

export function isFunctionWord(word: string): boolean {
  return FUNCTION_WORDS.has(word.toLowerCase().replace(/['’]/g, ""));
}

export function isNegation(word: string): boolean {
  const plain = word.toLowerCase().replaceAll("’", "'");
  return plain.endsWith("n't") || NEGATIONS.has(plain.replaceAll("'", "")) || /^[不没沒]/.test(word);
}
