/** Streams one answer and measures its speed. Knows neither conversations nor where the text goes. */

import type { GenerationOptions } from "../api/generation.ts";
import type { CausalLM } from "../api/model.ts";
import { StopStrings } from "../tokenizer/stops.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { counted } from "./terminal.ts";

export interface Answer {
  /** Excludes the stop string that ended it. Empty without a tokenizer. */
  readonly text: string;
  readonly ids: readonly number[];
  /** One per token; empty when interrupted. */
  readonly logprobs: readonly number[];
  readonly finish: "stop" | "length" | "interrupted";
  readonly promptTokens: number;
  /** Time from the call to the first token; NaN if there was none. */
  readonly firstMs: number;
  /** Time from the call to the last token. */
  readonly seconds: number;
}

export interface AnswerTarget {
  /** Receives the text, in whole characters. */
  readonly onText?: (text: string) => void;
  readonly onId?: (id: number) => void;
  /** Aborting it ends the answer; the part so far is returned. */
  readonly signal?: AbortSignal;
}

/** Generates from `prompt` and streams the answer. */
export async function answer(
  model: CausalLM,
  tokenizer: Tokenizer | null,
  prompt: readonly number[],
  options: GenerationOptions,
  { onText, onId, signal }: AnswerTarget = {},
): Promise<Answer> {
  const start = performance.now();
  const detokenizer = tokenizer?.detokenizer({ skip_special_tokens: true });
  const held = new StopStrings([options.stop_strings ?? []].flat());
  const ids: number[] = [];
  let [text, firstMs, lastMs, atPrompt] = ["", Number.NaN, 0, true];
  const emit = (piece: string) => {
    text += piece;
    if (piece) onText?.(piece);
  };
  const streamer = {
    put(next: readonly number[]) {
      if (atPrompt) {
        atPrompt = false;
        return;
      }
      lastMs = performance.now() - start;
      if (ids.length === 0) firstMs = lastMs;
      for (const id of next) {
        ids.push(id);
        onId?.(id);
      }
      if (detokenizer) emit(held.push(detokenizer.push(next)).text);
    },
    end() {
      if (detokenizer) emit(held.push(detokenizer.finish()).text + held.finish());
    },
  };
  const result = (finish: Answer["finish"], logprobs: readonly number[]): Answer => {
    return { text, ids, logprobs, finish, promptTokens: prompt.length, firstMs, seconds: lastMs / 1000 };
  };
  try {
    const { logprobs, finish_reasons } = await model.generate({
      ...options,
      ...(tokenizer ? { tokenizer } : {}),
      input_ids: [[...prompt]],
      num_return_sequences: 1,
      return_dict_in_generate: true,
      streamer,
      ...(signal ? { signal } : {}),
    });
    return result(finish_reasons[0], logprobs[0]);
  } catch (error) {
    if (!signal?.aborted) throw error;
    return result("interrupted", []);
  }
}

/** `12 tokens, 310 tokens/s, first after 24 ms`. */
export function describeSpeed({ ids, seconds, firstMs }: Answer): string {
  const speed = tokensPerSecond({ ids, seconds, firstMs });
  const first = Number.isNaN(firstMs) ? "" : `, first after ${firstMs.toFixed(0)} ms`;
  return `${counted(ids.length, "token")}${speed === null ? "" : `, ${speed.toFixed(0)} tokens/s`}${first}`;
}

/** Speed of the tokens after the first, whose time is the prompt's; null for answers of fewer than two tokens. */
export function tokensPerSecond({ ids, seconds, firstMs }: Pick<Answer, "ids" | "seconds" | "firstMs">): number | null {
  const rest = seconds - firstMs / 1000;
  return ids.length > 1 && rest > 0 ? (ids.length - 1) / rest : null;
}
