// Decodes ids as they arrive. Emits only complete characters that no later id can change; concatenated, the output equals `decode` of
// all ids. Knows nothing of models or streams.
import { chain, cleanUp, type Flow } from "./decoder.ts";
import { TokenizerError } from "./error.ts";
import { idNumber, idNumbers, type TokenIds } from "./ids.ts";
import type { Vocabulary } from "./vocabulary.ts";

export interface DetokenizerOptions {
  /** Leave special tokens out. Default: true. */
  readonly skip_special_tokens?: boolean;
  /** Remove the space before punctuation. Default: the tokenizer's configuration, else false. */
  readonly clean_up_tokenization_spaces?: boolean;
}

/** What a detokenizer needs of a tokenizer. */
export interface DetokenizerSource {
  readonly vocabulary: Vocabulary;
  readonly clean_up_tokenization_spaces: boolean;
}

/**
 * Streaming decoder for one sequence. The cost per id does not depend on how many came before.
 *
 * ```ts
 * const detokenizer = new Detokenizer(tokenizer);
 * for await (const id of ids) process.stdout.write(detokenizer.push(id));
 * process.stdout.write(detokenizer.finish());
 * ```
 */
export class Detokenizer {
  private readonly vocabulary: Vocabulary;
  private readonly skip: boolean;
  private readonly flow: Flow;
  private ready: string[] = [];
  private finished = false;

  constructor(tokenizer: DetokenizerSource, options: DetokenizerOptions = {}) {
    const { skip_special_tokens = true, clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces } = options;
    this.vocabulary = tokenizer.vocabulary;
    this.skip = skip_special_tokens;
    const { decoder } = this.vocabulary;
    const step = clean_up_tokenization_spaces ? chain([decoder, cleanUp]) : decoder;
    this.flow = step({ push: (text) => void this.ready.push(text), finish: () => {} });
  }

  /** Takes the next id or ids and returns the text that is now final, often "". Throws `TokenizerError` for an id outside the vocabulary. */
  push(ids: number | bigint | TokenIds): string {
    if (this.finished) throw new Error("detokenizer: push after finish");
    const numbers = typeof ids === "number" || typeof ids === "bigint" ? [idNumber(ids)] : idNumbers(ids);
    if (numbers === null) throw new TokenizerError("ids must be one sequence of token ids: a list, a typed array, or a tensor of one row");
    for (const id of numbers) {
      const token = this.vocabulary.token(id);
      if (!(this.skip && this.vocabulary.isSpecial(id))) this.flow.push(token);
    }
    return this.take();
  }

  /** Returns the text still held back; an incomplete character becomes U+FFFD. A later `push` throws, and a second `finish` returns "". */
  finish(): string {
    if (this.finished) return "";
    this.finished = true;
    this.flow.finish();
    return this.take();
  }

  private take(): string {
    const text = this.ready.join("");
    this.ready = [];
    return text;
  }
}
