/** `pipeline("text-generation")`: text or messages in, text or messages out. */
import type { Message } from "../tokenizer/template.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { GenerationOptions } from "./generation.ts";
import { AutoModelForCausalLM, type CausalLM, type PretrainedOptions } from "./model.ts";
import { AutoTokenizer } from "./tokenizer.ts";

export interface TextGenerationOptions extends GenerationOptions {
  /** Give the prompt back in front of the answer. Default true for text; of messages the conversation always comes back whole. */
  readonly return_full_text?: boolean;
}

type Prompt = string | readonly Message[];
/** `generated_text` is text for a text, and the conversation with the answer appended for messages. */
export type TextGenerationOutput<P extends Prompt = Prompt> = { generated_text: P extends string ? string : Message[] }[];

export interface TextGenerationPipeline {
  <P extends Prompt>(prompt: P, options?: TextGenerationOptions): Promise<TextGenerationOutput<P>>;
  readonly model: CausalLM;
  readonly tokenizer: Tokenizer;
  dispose(): Promise<void>;
}

/** A ready-made use of a model. Throws RangeError on a task other than "text-generation". @param idOrFolder default: the small model that comes along */
export async function pipeline(
  task: "text-generation",
  idOrFolder = "default",
  options: PretrainedOptions = {},
): Promise<TextGenerationPipeline> {
  if (task !== "text-generation") throw new RangeError(`the task '${task}' is not known; known is text-generation`);
  const tokenizer = await AutoTokenizer.from_pretrained(idOrFolder, options);
  const model = await AutoModelForCausalLM.from_pretrained(idOrFolder, options);
  const call = async (prompt: Prompt, { return_full_text = true, ...generation }: TextGenerationOptions = {}) => {
    const isText = typeof prompt === "string";
    const input = isText ? tokenizer.encode(prompt) : tokenizer.apply_chat_template(prompt, { add_generation_prompt: true });
    const sequences = await model.generate({ tokenizer, ...generation, input_ids: [input] });
    return sequences.map((ids) => {
      const answer = tokenizer.decode(ids.slice(input.length), { skip_special_tokens: true });
      if (isText) return { generated_text: return_full_text ? prompt + answer : answer };
      return { generated_text: [...prompt, { role: "assistant", content: answer }] };
    });
  };
  return Object.assign(call as TextGenerationPipeline, { model, tokenizer, dispose: () => model.dispose() });
}
