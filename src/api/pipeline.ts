/** `pipeline`, and its task "text-generation": text or messages in, text or messages out. Reasoning and tool calls are split from the answer. */
import { type ConversationOptions, readConversation } from "../chat/conversation.ts";
import { MessageBuilder } from "../chat/message.ts";
import { encodePrompt } from "../chat/prompt.ts";
import { ReplyReader } from "../chat/reply.ts";
import type { GeneratedToken } from "../engine/sequence.ts";
import type { Message } from "../tokenizer/template.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { answerRows } from "./answers.ts";
import type { TextClassificationPipeline } from "./classification.ts";
import type { ClassifierOptions } from "./classifier.ts";
import { constrainBy } from "./constraint.ts";
import { type GenerationOptions, readRows, resolveGeneration } from "./generation.ts";
import { AutoModelForCausalLM, type CausalLM, type PretrainedOptions } from "./model.ts";
import { AutoTokenizer } from "./tokenizer.ts";

/** `tools`, `tool_choice` and `parallel_tool_calls` are OpenAI's, for prompts that are messages. */
export interface TextGenerationOptions
  extends GenerationOptions,
    Pick<ConversationOptions, "tools" | "tool_choice" | "parallel_tool_calls"> {
  /** Return the prompt in front of the answer. Default true for text; for messages the conversation is always returned whole. */
  readonly return_full_text?: boolean;
}

type Prompt = string | readonly Message[];
/**
 * `generated_text` is text for a text. For messages it is the conversation with the answer appended: a message with `content`
 * (null when there are only calls) and, where the model gave any, `reasoning_content` and `tool_calls`.
 */
export type TextGenerationOutput<P extends Prompt = Prompt> = { generated_text: P extends string ? string : Message[] }[];

export interface TextGenerationPipeline {
  /** Rejects with RangeError for options that do not fit together, a prompt that the chat template refuses, or a format that can't be enforced. */
  <P extends Prompt>(prompt: P, options?: TextGenerationOptions): Promise<TextGenerationOutput<P>>;
  readonly model: CausalLM;
  readonly tokenizer: Tokenizer;
  dispose(): Promise<void>;
}

/**
 * A ready-made use of a model: "text-generation", or "text-classification" for classifiers. Rejects with RangeError on another task.
 * @param idOrFolder default: the bundled model, which generates text
 */
export async function pipeline(task: "text-generation", idOrFolder?: string, options?: PretrainedOptions): Promise<TextGenerationPipeline>;
export async function pipeline(
  task: "text-classification",
  idOrFolder: string,
  options?: ClassifierOptions,
): Promise<TextClassificationPipeline>;
export async function pipeline(
  task: "text-generation" | "text-classification",
  idOrFolder = "default",
  options: ClassifierOptions = {},
): Promise<TextGenerationPipeline | TextClassificationPipeline> {
  if (task === "text-classification") return (await import("./classification.ts")).textClassification(idOrFolder, options);
  if (task !== "text-generation") throw new RangeError(`unknown task '${task}'; supported are text-generation and text-classification`);
  const tokenizer = await AutoTokenizer.from_pretrained(idOrFolder, options);
  const model = await AutoModelForCausalLM.from_pretrained(idOrFolder, options);
  const call = async (prompt: Prompt, options: TextGenerationOptions = {}) => {
    if (typeof prompt === "string") return continueText(model, tokenizer, prompt, options);
    const messages = await answerMessages(model, tokenizer, prompt, options);
    return messages.map((message) => ({ generated_text: [...prompt, message] }));
  };
  return Object.assign(call as TextGenerationPipeline, { model, tokenizer, dispose: () => model.dispose() });
}

async function continueText(
  model: CausalLM,
  tokenizer: Tokenizer,
  prompt: string,
  { return_full_text = true, tools, tool_choice, parallel_tool_calls: _, ...generation }: TextGenerationOptions,
) {
  if (tools?.length || tool_choice) throw new RangeError("tools need messages: give a conversation instead of a text");
  const input = tokenizer.encode(prompt);
  const sequences = await model.generate({ tokenizer, ...generation, input_ids: [input] });
  return sequences.map((ids) => {
    const answer = tokenizer.decode(ids.slice(input.length), { skip_special_tokens: true });
    return { generated_text: return_full_text ? prompt + answer : answer };
  });
}

/** The answers to a conversation, one message each. */
async function answerMessages(
  model: CausalLM,
  tokenizer: Tokenizer,
  messages: readonly Message[],
  { return_full_text: _, tools, tool_choice, parallel_tool_calls, ...generation }: TextGenerationOptions,
): Promise<Message[]> {
  const { response_format } = generation;
  const { prompt } = readConversation({ messages, tools, tool_choice, parallel_tool_calls, response_format });
  const { tokens, insideReasoning } = encodePrompt(tokenizer, prompt);
  const options = { tokenizer, ...generation };
  const settings = resolveGeneration(options, model.defaults, model.config);
  const reader = () => new ReplyReader(tokenizer, { prompt, insideReasoning, stop: settings.stopStrings });
  const answers = await answerRows(model.engine, model.config.vocabSize, readRows({ input_ids: [tokens] }), {
    settings,
    options,
    ...model.adapterOf(options.adapter),
    constrain: constrainBy(settings, prompt, model.config, tokenizer),
    // Generation can stop after a stop string, or after the only call allowed.
    watch: prompt.oneToolCall || settings.stopStrings.length > 0 ? () => endOf(reader()) : null,
  });
  return answers.map((answer) => messageOf(reader(), answer.tokens));
}

/** Tells after each token whether the reply has ended. */
function endOf(reply: ReplyReader): (token: GeneratedToken) => boolean {
  return ({ id, finish }) => {
    if (finish !== "stop") reply.take(id);
    return reply.ended !== null;
  };
}

function messageOf(reply: ReplyReader, tokens: readonly GeneratedToken[]): Message {
  const builder = new MessageBuilder();
  for (const { id, finish } of tokens) if (finish !== "stop") for (const event of reply.take(id)) builder.take(event);
  for (const event of reply.finish(tokens.at(-1)?.finish === "length")) builder.take(event);
  return { ...builder.message };
}
