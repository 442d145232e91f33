// What a tokenizer is, whichever file described it. Knows no file format, no chat and no batches.
import type { AddedToken } from "./added.ts";
import type { DecoderConfig } from "./decoder.ts";

/** Cuts one stretch of text into ids and appends them to `out`. */
export type Cut = (text: string, out: number[]) => void;

/** A tokenizer without its added tokens' search, as tokenizer.json and tokenizer.model both describe it. */
export interface Definition {
  /** Ids of the model's own tokens. Added tokens may be among them. */
  readonly vocab: ReadonlyMap<string, number>;
  readonly added: readonly AddedToken[];
  /** From raw text to the text that normalised added tokens are searched in. */
  readonly normalize: (text: string) => string;
  /** From normalised text to ids. `first`: the stretch is the beginning of the input. */
  readonly cut: (text: string, first: boolean, out: number[]) => void;
  /** Tokens to put around a single sequence when special tokens are asked for. */
  readonly prefix: readonly string[];
  readonly suffix: readonly string[];
  readonly decoder: DecoderConfig | null;
  /** Special tokens that the file itself names, by role (`bos_token`); tokenizer_config.json has precedence. */
  readonly roles: Readonly<Record<string, string>>;
}

export function identity(text: string): string {
  return text;
}
