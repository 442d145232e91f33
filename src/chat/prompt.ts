/** From what is asked to the ids that the engine goes on from: renders and encodes. Knows no engine and no protocol. */

import type { Prompt } from "../server/completion/request.ts";
import { ServerError } from "../server/errors.ts";
import { TokenizerError } from "../tokenizer/error.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { dialectOf, TAGS } from "./dialect.ts";
import { describe, withArguments, withoutTools } from "./tools.ts";

/** What the engine is to go on with, and how its answer begins. */
export interface EncodedPrompt {
  readonly tokens: readonly number[];
  /** It ends inside the model's reasoning. */
  readonly insideReasoning: boolean;
}

/** The ids of a prompt. Throws ServerError `invalid_request` for what the tokenizer or the chat template refuses. */
export function promptOf(tokenizer: Tokenizer, prompt: Prompt): EncodedPrompt {
  switch (prompt.kind) {
    case "tokens":
      return { tokens: prompt.tokens, insideReasoning: false };
    case "text": {
      const options = { add_special_tokens: prompt.specialTokens ?? true };
      return { tokens: refusing("prompt", () => tokenizer.encode(prompt.text, options)), insideReasoning: false };
    }
    case "chat": {
      const dialect = dialectOf(tokenizer);
      const tools = prompt.toolChoice === "none" ? [] : prompt.tools;
      const messages = dialect.takesTools ? withArguments(prompt.messages) : withoutTools(prompt.messages, tools);
      const tokens = refusing("messages", () =>
        tokenizer.apply_chat_template(messages, {
          ...prompt.templateVariables,
          ...(dialect.takesTools && tools.length > 0 ? { tools: describe(tools) } : {}),
          add_generation_prompt: true,
          // Variables are the template's alone: they change neither it nor what is made of its text. What a user writes is text,
          // never a special token.
          chat_template: undefined,
          tokenize: true,
          return_dict: false,
          split_special_tokens: true,
        }),
      );
      const opened = new RegExp(`${TAGS.think[0]}\\s*$`).test(tokenizer.decode(tokens.slice(-16)));
      return { tokens, insideReasoning: dialect.thinks && opened };
    }
    default:
      return prompt satisfies never;
  }
}

/** Says of a text that can't be encoded which field it came in. */
function refusing(param: string, encode: () => number[]): number[] {
  try {
    return encode();
  } catch (cause) {
    if (cause instanceof TokenizerError) throw new ServerError("invalid_request", cause.message, { cause, param });
    throw cause;
  }
}
