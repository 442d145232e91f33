// Encodes a text that continues another one, apart from it. Some tokenizers put a space in front of every text they encode; a
// continuation must not get one.
import { Detokenizer } from "./detokenizer.ts";
import { TokenizerError } from "./error.ts";
import type { Vocabulary } from "./vocabulary.ts";

/** Texts to encode in front, and cut off again. The first that the text does not merge with is taken. */
const ANCHORS = ["\n", ".", "a"];
const prefixing = new WeakMap<Vocabulary, boolean>();

/** The ids of a text such that, behind any other text's ids, they decode to exactly that text. */
export function continuation(vocabulary: Vocabulary, text: string, splitSpecial: boolean, hidden: string | null): number[] {
  const alone = vocabulary.encode(text, splitSpecial, hidden);
  if (text === "" || !prefixesSpace(vocabulary)) return alone;
  for (const anchor of ANCHORS) {
    const head = vocabulary.encode(anchor, splitSpecial);
    const both = vocabulary.encode(anchor + text, splitSpecial, hidden);
    if (head.every((id, i) => both[i] === id)) return both.slice(head.length);
  }
  throw new TokenizerError(`cannot encode ${JSON.stringify(text.slice(0, 40))} apart from what precedes it: the tokenizer joins them`);
}

function prefixesSpace(vocabulary: Vocabulary): boolean {
  const known = prefixing.get(vocabulary);
  if (known !== undefined) return known;
  const ids = vocabulary.encode("a", false);
  const reader = new Detokenizer({ vocabulary, clean_up_tokenization_spaces: false }, { skip_special_tokens: false });
  const found = reader.push([...ids, ...ids]) + reader.finish() !== "aa";
  prefixing.set(vocabulary, found);
  return found;
}
