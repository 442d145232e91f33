// Added tokens (`<s>`, `<think>`): finds them in a text before any other processing, as the Rust library `tokenizers` does.
// Knows nothing of the model's own vocabulary.
import { Matcher } from "./matcher.ts";

/** A token that is matched verbatim, outside the model. Decoding can skip `special` ones. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
  /** Match in the normalised text instead of the raw text. */
  readonly normalized: boolean;
  /** Match only as a whole word: not next to a letter, digit or underscore. */
  readonly singleWord: boolean;
  /** Absorb the white space before the token. */
  readonly lstrip: boolean;
  /** Absorb the white space after the token. */
  readonly rstrip: boolean;
}

/** A section of a text: either an added token or plain text. */
export type Section = { readonly id: number } | { readonly text: string };

const wordAtEnd = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u;
const wordAtStart = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;

export class AddedTokens {
  private readonly matcher: Matcher;
  private readonly byContent: ReadonlyMap<string, AddedToken>;

  /** `written` maps a token's content to its form in the searched texts: unchanged, or normalised. */
  constructor(tokens: Iterable<AddedToken>, written: (content: string) => string = (content) => content) {
    this.byContent = new Map(Array.from(tokens, (token) => [written(token.content), token]));
    this.matcher = new Matcher(this.byContent.keys());
  }

  /** Splits `text` at its added tokens. With `splitSpecial`, special tokens are treated as plain text. */
  split(text: string, splitSpecial: boolean): Section[] {
    if (this.matcher.empty) return text === "" ? [] : [{ text }];
    const sections: Section[] = [];
    let done = 0; // everything before this index is in `sections`
    let at = 0;
    while (at < text.length) {
      const found = this.matcher.longest(text, at);
      if (found < 0) {
        at++;
        continue;
      }
      const token = this.byContent.get(text.slice(at, found));
      if (token === undefined) throw new Error("internal: the matched text is not an added token");
      let start = at;
      let stop = found;
      at = found; // a rejected match is skipped as a whole, as in the Rust library
      if (splitSpecial && token.special) continue;
      if (token.singleWord && (wordAtEnd.test(lastCharacter(text, start)) || wordAtStart.test(text.slice(stop, stop + 2)))) continue;
      if (token.lstrip) while (start > done && /\s/.test(text.charAt(start - 1))) start--;
      if (token.rstrip) while (stop < text.length && /\s/.test(text.charAt(stop))) stop++;
      if (done < start) sections.push({ text: text.slice(done, start) });
      sections.push({ id: token.id });
      done = at = stop;
    }
    if (done < text.length) sections.push({ text: text.slice(done) });
    return sections;
  }
}

function lastCharacter(text: string, end: number): string {
  const low = text.charCodeAt(end - 1);
  return text.slice(Math.max(0, end - (low >= 0xdc00 && low <= 0xdfff ? 2 : 1)), end);
}
