/** Takes tokens as they are generated: the interface, and one that turns them into text. */
import type { Detokenizer } from "../tokenizer/detokenizer.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";

/** As in transformers: `put` gets the prompt's ids first, then each new id; `end` is called once, also after an abort. */
export interface Streamer {
  put(ids: readonly number[]): void;
  end(): void;
}

export interface TextStreamerOptions {
  /** Leave the prompt out. Default false. */
  readonly skip_prompt?: boolean;
  /** Leave special tokens out. Default true. */
  readonly skip_special_tokens?: boolean;
  /** Gets each piece of text, whole characters only. Default: writes to standard output, and a newline at the end. */
  readonly callback_function?: (text: string) => void;
  /** Gets each id of the answer. */
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
