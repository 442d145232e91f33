/** Cuts a text that is being written into sentences, so that a screen reader is told each once, whole. Knows no page. */

const SENTENCE_END = /[.!?…]+["'”’)\]]*(?=\s)|[。！？]+["'”’）」』]*|\n+/g;

/** The sentences that have ended behind the first `told` characters, and how many characters are told then. */
export function finishedSentences(text: string, told: number): { readonly sentences: string; readonly told: number } {
  let end = told;
  for (const match of text.slice(told).matchAll(SENTENCE_END)) end = told + match.index + match[0].length;
  return { sentences: text.slice(told, end).trim(), told: end };
}
