/** Streamers receive tokens as they are generated: the interface, and one that decodes to text. Know no model. */
import type { Detokenizer } from "../tokenizer/detokenizer.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";

/** As in transformers: `put` receives the prompt's ids, then each new id; `end` is called once, even after an abort. */
export interface Streamer {
  put(ids: readonly number[]): void;
  end(): void;
}

export interface TextStreamerOptions {
  /** Omit the prompt. Default false. */
  readonly skip_prompt?: boolean;
  /** Omit special tokens. Default true. */
  readonly skip_special_tokens?: boolean;
  /** Receives each piece of text, in whole characters. Default: writes to standard output, with a final newline. */
  readonly callback_function?: (text: string) => void;
  /** Receives each id of the answer. */
  readonly token_callback_function?: (ids: readonly number[]) => void;
}

export class TextStreamer implements Streamer {
  readonly #options: TextStreamerOptions;
  readonly #detokenizer: Detokenizer;
  #atPrompt = true;

  constructor(tokenizer: Tokenizer, options: TextStreamerOptions = {}) {
    this.#options = options;
    this.#detokenizer = tokenizer.detokenizer({ skip_special_tokens: options.skip_special_tokens ?? true });
  }

  put(ids: readonly number[]): void {
    const prompt = this.#atPrompt;
    this.#atPrompt = false;
    if (prompt && this.#options.skip_prompt) return;
    this.#emit(this.#detokenizer.push(ids));
    if (!prompt) this.#options.token_callback_function?.(ids);
  }

  end(): void {
    this.#emit(this.#detokenizer.finish());
    if (!this.#options.callback_function) process.stdout.write("\n");
    this.#atPrompt = true;
  }

  #emit(text: string): void {
    if (!text) return;
    if (this.#options.callback_function) this.#options.callback_function(text);
    else process.stdout.write(text);
  }
}
