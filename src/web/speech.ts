/** Splits a growing text into sentences, so that screen readers hear each one once and complete. Knows nothing of the page. */

const SENTENCE_END = /[.!?…]+["'”’)\]]*(?=\s)|[。！？]+["'”’）」』]*|\n+/g;

/** The complete sentences after the first `told` characters, and the new value of `told`. */
export function finishedSentences(text: string, told: number): { readonly sentences: string; readonly told: number } {
  let end = told;
  for (const match of text.slice(told).matchAll(SENTENCE_END)) end = told + match.index + match[0].length;
  return { sentences: text.slice(told, end).trim(), told: end };
}
