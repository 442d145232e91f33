// Added tokens (`<s>`, `<think>`): finds them in a text before anything else looks at it, as the Rust library `tokenizers` does.
// Knows nothing of the vocabulary below them.
import { Matcher } from "./matcher.ts";

/** A token that is matched as written, outside the model. `special` ones may be skipped when decoding. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
  /** Matched in the normalised text instead of the raw one. */
  readonly normalized: boolean;
  /** Matched only where no letter, digit or underscore touches it. */
  readonly singleWord: boolean;
  /** Takes the white space before it. */
  readonly lstrip: boolean;
  /** Takes the white space after it. */
  readonly rstrip: boolean;
}

/** A stretch of text: either an added token or plain text. */
export type Section = { readonly id: number } | { readonly text: string };

const wordAtEnd = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u;
const wordAtStart = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;

export class AddedTokens {
  private readonly matcher: Matcher;
  private readonly byContent: ReadonlyMap<string, AddedToken>;

  /** `written` is how each token looks in the texts that will be searched: its content, or its normalised content. */
  constructor(tokens: Iterable<AddedToken>, written: (content: string) => string = (content) => content) {
    this.byContent = new Map(Array.from(tokens, (token) => [written(token.content), token]));
    this.matcher = new Matcher(this.byContent.keys());
  }

  /** Cuts `text` at its added tokens. With `splitSpecial`, special tokens in it count as plain text. */
  split(text: string, splitSpecial: boolean): Section[] {
    if (this.matcher.empty) return text === "" ? [] : [{ text }];
    const sections: Section[] = [];
    let done = 0; // everything before is in `sections`
    let at = 0;
    while (at < text.length) {
      const found = this.matcher.longest(text, at);
      if (found < 0) {
        at++;
        continue;
      }
      const token = this.byContent.get(text.slice(at, found));
      if (token === undefined) throw new Error("internal: matched text is no added token");
      let start = at;
      let stop = found;
      at = found; // a rejected match is passed over whole, as the original does
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
