/**
 * Messages of mixtape.proto as requests. They are converted to the bodies of the HTTP routes first, so that one schema validates
 * both and a field has one meaning. Knows no call.
 */
import type { z } from "zod";
import { type ResponseFormat, readFormat } from "../../chat/format.ts";
import type { Prompt } from "../../chat/prompt.ts";
import type { ClassifyTerms } from "../analysis.ts";
import type { NamedModel } from "../catalog.ts";
import { check } from "../check.ts";
import type { CompletionRequest } from "../completion/request.ts";
import { ServerError } from "../errors.ts";
import { parseBody } from "../http/body.ts";
import { chatPrompt, chatRequest, completionRequest, messagesOf, promptsOf } from "../http/openai/request.ts";
import {
  ChatBody,
  ClassifyBody,
  CompletionBody,
  DetokenizeBody,
  EmbeddingBody,
  NamedBody,
  RoutingBody,
  TokenizeBody,
} from "../http/openai/schema.ts";

/** As the loader decodes it: unset fields that are `optional`, in a oneof, or messages are null or absent. */
export interface Options {
  readonly sampling?: (Readonly<Record<string, unknown>> & { readonly logit_bias?: object; readonly seed?: string }) | null;
  readonly max_tokens?: number;
  readonly stop: readonly string[];
  readonly logprobs?: number;
  readonly routing: boolean;
  readonly response_format?: { readonly json_object?: object | null; readonly json_schema?: string } | null;
}

export interface Named {
  readonly model: string;
}

interface TextOrTokens {
  readonly text?: string;
  readonly tokens?: { readonly ids: readonly number[] } | null;
}

export interface GenerateRequest extends TextOrTokens, Named {
  readonly options?: Options | null;
}

export interface Message {
  /** A number if the .proto does not define it. */
  readonly role: string | number;
  readonly content: string;
  readonly tool_calls: readonly { readonly id: string; readonly name: string; readonly arguments: string }[];
  readonly tool_call_id: string;
  readonly reasoning: string;
}

export interface ChatRequest extends Named {
  readonly messages: readonly Message[];
  readonly tools: readonly { readonly name: string; readonly description: string; readonly parameters: string; readonly strict: boolean }[];
  readonly tool_choice?: { readonly mode?: string | number; readonly tool?: string } | null;
  readonly parallel_tool_calls?: boolean;
  readonly options?: Options | null;
  readonly template_variables: string;
}

export interface EmbedRequest extends Named {
  readonly inputs: readonly TextOrTokens[];
}

export interface ClassifyRequest extends EmbedRequest {
  readonly truncate_prompt_tokens?: number;
  readonly raw: boolean;
}

export interface RouteRequest extends TextOrTokens, Named {
  readonly conversation?: { readonly messages: readonly Message[] } | null;
}

export interface TokenizeRequest extends Named {
  readonly text: string;
  readonly add_special_tokens?: boolean;
}

export interface DetokenizeRequest extends Named {
  readonly tokens: readonly number[];
  readonly skip_special_tokens: boolean;
}

/** Requests as they are read: checked, with JSON in their fields parsed. */
export interface Generate extends Named {
  readonly body: CompletionBody;
  readonly prompt: Prompt;
  readonly format: ResponseFormat;
}
export interface Chat extends Named {
  readonly body: ChatBody;
}
export interface Embed extends Named {
  readonly prompts: readonly Prompt[];
}
export interface Classify extends Embed {
  readonly terms: ClassifyTerms;
}
export interface Route extends Named {
  readonly prompt: Prompt;
}

/** The readers throw ServerError `invalid_request`, whose `param` is the name in the HTTP body, for `fieldOf`. */
export function readGenerate({ model, options, ...given }: GenerateRequest, maxJsonDepth: number): Generate {
  const prompt = promptIn(given, "prompt");
  return {
    model,
    prompt,
    body: checked(CompletionBody, { model, prompt: given.text ?? "", ...fieldsOf(options) }),
    format: readFormat(formatOf(options, maxJsonDepth)),
  };
}

export function readChat(request: ChatRequest, maxJsonDepth: number): Chat {
  const { logprobs, ...fields } = fieldsOf(request.options);
  const body = checked(ChatBody, {
    model: request.model,
    messages: request.messages.map(messageBody),
    tools: request.tools.map(({ name, description, parameters, strict }, i) => ({
      type: "function",
      function: { name, description, parameters: jsonIn(parameters, `tools[${i}].function.parameters`, maxJsonDepth), strict },
    })),
    tool_choice: toolChoiceBody(request.tool_choice),
    parallel_tool_calls: request.parallel_tool_calls,
    chat_template_kwargs: jsonIn(request.template_variables, "chat_template_kwargs", maxJsonDepth),
    response_format: formatOf(request.options, maxJsonDepth),
    ...fields,
    ...(logprobs === undefined ? {} : { logprobs: true, top_logprobs: logprobs }),
  });
  return { model: request.model, body };
}

export function readEmbed({ model, inputs }: EmbedRequest): Embed {
  const prompts = inputs.map((input, i) => promptIn(input, `input[${i}]`));
  checked(EmbeddingBody, { model, input: inputs.map(({ text = "" }) => text) });
  return { model, prompts };
}

export function readClassify({ model, inputs, truncate_prompt_tokens, raw }: ClassifyRequest): Classify {
  const prompts = inputs.map((input, i) => promptIn(input, `input[${i}]`));
  const fields = truncate_prompt_tokens === undefined ? {} : { truncate_prompt_tokens };
  checked(ClassifyBody, { model, input: inputs.map(({ text = "" }) => text), ...fields });
  if (truncate_prompt_tokens === 0)
    throw new ServerError("invalid_request", "truncate_prompt_tokens is 0: at least one token is needed", {
      param: "truncate_prompt_tokens",
    });
  return { model, prompts, terms: { mostTokens: truncate_prompt_tokens ?? null, keep: "last", raw } };
}

export function readRoute({ model, conversation, ...prompt }: RouteRequest): Route {
  if (!conversation) {
    checked(RoutingBody, { model, text: prompt.text || undefined });
    return { model, prompt: promptIn(prompt, "prompt") };
  }
  const { messages = [] } = checked(RoutingBody, { model, messages: conversation.messages.map(messageBody) }, routeFieldOf);
  return { model, prompt: chatPrompt(messagesOf(messages)) };
}

export function readTokenize({ model, text, add_special_tokens = true }: TokenizeRequest) {
  return { ...checked(TokenizeBody, { model, text }), add_special_tokens };
}

export function readDetokenize({ model, tokens, skip_special_tokens }: DetokenizeRequest) {
  return { ...checked(DetokenizeBody, { model, tokens }), skip_special_tokens };
}

export function readNamed({ model }: Named): Named {
  return checked(NamedBody, { model });
}

/** Throws ServerError `invalid_request`, as `chatCompletionRequest` does. */
export function generateRequest(model: NamedModel, { body, prompt, format }: Generate, who: Who): CompletionRequest {
  const { defaults } = model;
  return { ...completionRequest(body, prompt, defaults, who), maxTokens: body.max_tokens ?? defaults.max_new_tokens ?? null, format };
}

export function chatCompletionRequest(model: NamedModel, { body }: Chat, who: Who): CompletionRequest {
  return chatRequest(body, model.defaults, who);
}

type Who = Pick<CompletionRequest, "owner" | "signal">;

/** Fields of the HTTP bodies that have another name here. */
const RENAMED: readonly (readonly [RegExp, string])[] = [
  [/^(temperature|top_p|top_k|min_p|(repetition|presence|frequency)_penalty|seed|logit_bias)\b/, "options.sampling.$1"],
  [/^(max_tokens|stop|logprobs|routing)\b/, "options.$1"],
  [/^top_logprobs/, "options.logprobs"],
  [/^response_format\.json_schema\.schema/, "options.response_format.json_schema"],
  [/^response_format/, "options.response_format"],
  [/^chat_template_kwargs/, "template_variables"],
  [/^tool_choice\.function\.name/, "tool_choice.tool"],
  [/^(tools\[\d+\]|messages\[\d+\]\.tool_calls\[\d+\])\.function/, "$1"],
  [/^(messages\[\d+\])\.reasoning_content/, "$1.reasoning"],
  [/^input(?=\[|$)/, "inputs"],
];

/** The name in the messages of a field of the HTTP bodies. */
export function fieldOf(param: string): string {
  const found = RENAMED.find(([pattern]) => pattern.test(param));
  return found ? param.replace(...found) : param;
}

/** The same for a routing request, whose messages are in a conversation. */
export function routeFieldOf(param: string): string {
  return param.startsWith("messages") ? `conversation.${fieldOf(param)}` : param;
}

function promptIn({ text, tokens }: TextOrTokens, param: string): Prompt {
  if (tokens) return { kind: "tokens", tokens: tokens.ids };
  if (text === undefined) throw new ServerError("invalid_request", `${fieldOf(param)}: give either text or tokens`, { param });
  return promptsOf(text)[0];
}

/** The fields that `Options` shares with the bodies. */
function fieldsOf(options: Options | null | undefined) {
  const { sampling, stop, max_tokens, logprobs, routing } = options ?? {};
  const { logit_bias, seed, ...controls } = sampling ?? {};
  // For each optional field that is set, the loader adds a field named `_` and its name.
  const set = Object.fromEntries(Object.entries(controls).filter(([name]) => !name.startsWith("_")));
  return {
    ...set,
    logit_bias,
    seed: seed === undefined ? undefined : Number(seed),
    stop: stop?.length ? stop : undefined,
    max_tokens,
    logprobs,
    routing,
  };
}

function formatOf(options: Options | null | undefined, maxDepth: number) {
  const { json_schema, json_object } = options?.response_format ?? {};
  if (json_schema !== undefined) {
    const schema = jsonObject(json_schema, "response_format.json_schema.schema", maxDepth);
    return { type: "json_schema" as const, json_schema: { name: "answer", schema } };
  }
  return json_object ? { type: "json_object" as const } : undefined;
}

function messageBody({ role, content, tool_calls, tool_call_id, reasoning }: Message): object {
  const calls = tool_calls.map(({ id, name, arguments: args }) => ({ id, type: "function", function: { name, arguments: args } }));
  return {
    role: typeof role === "string" ? role.replace(/^ROLE_/, "").toLowerCase() : role,
    content,
    ...(calls.length ? { tool_calls: calls } : {}),
    ...(role === "ROLE_TOOL" ? { tool_call_id } : {}),
    ...(reasoning === "" ? {} : { reasoning_content: reasoning }),
  };
}

function toolChoiceBody(choice: ChatRequest["tool_choice"]): unknown {
  if (choice?.tool !== undefined) return { type: "function", function: { name: choice.tool } };
  return typeof choice?.mode === "string" ? choice.mode.replace(/^MODE_/, "").toLowerCase() : choice?.mode;
}

/** The JSON object in a field; undefined if the field is empty. */
function jsonIn(text: string, param: string, maxDepth: number): Record<string, unknown> | undefined {
  return text === "" ? undefined : jsonObject(text, param, maxDepth);
}

function jsonObject(text: string, param: string, maxDepth: number): Record<string, unknown> {
  let value: unknown;
  try {
    value = parseBody(Buffer.from(text), maxDepth, fieldOf(param));
  } catch (error) {
    throw error instanceof ServerError ? new ServerError(error.code, error.message, { param, cause: error }) : error;
  }
  if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  throw new ServerError("invalid_request", `${fieldOf(param)} is JSON but not an object`, { param });
}

function checked<T extends z.ZodType>(schema: T, value: unknown, nameOf = fieldOf): z.output<T> {
  return check(schema, value, { whole: "the message", nameOf });
}
