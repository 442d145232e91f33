// The common definition of a tokenizer, independent of the file it came from. Knows nothing of file formats, chat or batches.
import type { AddedToken } from "./added.ts";
import type { DecoderConfig } from "./decoder.ts";

/** Encodes one section of text and appends its ids to `out`. */
export type Cut = (text: string, out: number[]) => void;

/** What tokenizer.json and tokenizer.model both describe: a tokenizer apart from the search for added tokens. */
export interface Definition {
  /** Ids of the model's own tokens, which may include added tokens. */
  readonly vocab: ReadonlyMap<string, number>;
  readonly added: readonly AddedToken[];
  /** Normalises raw text; added tokens with `normalized` are matched in the result. */
  readonly normalize: (text: string) => string;
  /** Encodes normalised text and appends its ids to `out`. `first`: the text is the beginning of the input. */
  readonly cut: (text: string, first: boolean, out: number[]) => void;
  /** Tokens placed before a sequence when special tokens are requested; `suffix` is placed after it. */
  readonly prefix: readonly string[];
  readonly suffix: readonly string[];
  readonly decoder: DecoderConfig | null;
  /** Special tokens that the file names, by role (`bos_token`); tokenizer_config.json takes precedence. */
  readonly roles: Readonly<Record<string, string>>;
}

export function identity(text: string): string {
  return text;
}
