/** What OpenAI's clients may send, field by field, and how it becomes what the server understands. Knows no HTTP. */
import { randomInt } from "node:crypto";
import { z } from "zod";
import type { ResponseFormat } from "../../../chat/format.ts";
import type { Prompt, ToolChoice } from "../../../chat/prompt.ts";
import { GREEDY, type Sampling } from "../../../engine/sampling.ts";
import type { Message } from "../../../tokenizer/template.ts";
import type { CompletionRequest } from "../../completion/request.ts";
import { ServerError } from "../../errors.ts";

/** Fields that clients send and that change nothing here; any other unknown field is an error. */
const IGNORED = [
  "user",
  "store",
  "metadata",
  "service_tier",
  "safety_identifier",
  "prompt_cache_key",
  "prompt_cache_retention",
  "verbosity",
  "prediction",
] as const;
const ignored = Object.fromEntries(IGNORED.map((name) => [name, z.unknown().optional()]));

/** Tokens with a bias, which each step lays out anew. */
const MOST_BIASES = 1024;
const MOST_MESSAGES = 10_000;
/** Texts that one request for embeddings may have, and answers that one for completions may want: prompts by n. */
export const MOST_INPUTS = 256;
const MOST_ANSWERS = 128;

const unit = z.number().min(-2).max(2);
const sampling = {
  temperature: z.number().min(0).max(2).nullish().describe("0 is greedy. Default: the model's own."),
  top_p: z.number().min(0).max(1).nullish().describe("0 is greedy."),
  top_k: z.number().int().min(0).nullish().describe("Only the k most likely tokens; 0 is no limit. Not of OpenAI's."),
  min_p: z.number().min(0).max(1).nullish().describe("Only tokens at least this share as likely as the likeliest. Not of OpenAI's."),
  repetition_penalty: z.number().min(0.01).max(100).nullish().describe("Divides the logits of tokens that occurred. Not of OpenAI's."),
  presence_penalty: unit.nullish(),
  frequency_penalty: unit.nullish(),
  logit_bias: z
    .record(z.string().regex(/^\d+$/, "token ids are whole numbers"), z.number().min(-100).max(100))
    .refine((bias) => Object.keys(bias).length <= MOST_BIASES, `at most ${MOST_BIASES} tokens`)
    .nullish(),
  seed: z
    .number()
    .int()
    .min(-(2 ** 53))
    .max(2 ** 53)
    .nullish(),
};
const common = {
  ...ignored,
  ...sampling,
  model: z.string().min(1),
  n: z.number().int().min(1).max(16).nullish(),
  stop: z.union([z.string(), z.array(z.string()).max(4)]).nullish(),
  stream: z.boolean().nullish(),
  stream_options: z.strictObject({ include_usage: z.boolean().nullish(), include_obfuscation: z.boolean().nullish() }).nullish(),
  routing: z.boolean().nullish().describe("Also tell which experts each token used. Not of OpenAI's."),
};

const textPart = z.object({ type: z.literal("text"), text: z.string() });
const content = z.union([z.string(), z.array(textPart)]);
const calls = z.array(
  z.object({ id: z.string(), type: z.literal("function"), function: z.object({ name: z.string(), arguments: z.string() }) }),
);
const message = z.discriminatedUnion("role", [
  z.object({ role: z.enum(["system"]), content, name: z.string().optional() }),
  z.object({ role: z.literal("developer"), content, name: z.string().optional() }),
  z.object({ role: z.literal("user"), content, name: z.string().optional() }),
  z.object({
    role: z.literal("assistant"),
    content: content.nullish(),
    reasoning_content: z.string().nullish(),
    refusal: z.string().nullish(),
    name: z.string().optional(),
    tool_calls: calls.nullish(),
  }),
  z.object({ role: z.literal("tool"), content, tool_call_id: z.string() }),
]);

const schemaObject = z.record(z.string(), z.unknown());
const tool = z.object({
  type: z.literal("function"),
  function: z.object({
    name: z.string().regex(/^[\w-]{1,64}$/, "letters, digits, _ and -, at most 64"),
    description: z.string().optional(),
    parameters: schemaObject.optional(),
    strict: z.boolean().nullish(),
  }),
});
const responseFormat = z.discriminatedUnion("type", [
  z.object({ type: z.literal("text") }),
  z.object({ type: z.literal("json_object") }),
  z.object({
    type: z.literal("json_schema"),
    json_schema: z.object({
      name: z.string(),
      description: z.string().optional(),
      schema: schemaObject,
      strict: z.boolean().nullish(),
    }),
  }),
]);

export const ChatBody = z.strictObject({
  ...common,
  messages: z.array(message).min(1).max(MOST_MESSAGES),
  max_tokens: z.number().int().min(1).nullish(),
  max_completion_tokens: z.number().int().min(1).nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.number().int().min(0).max(20).nullish(),
  response_format: responseFormat.nullish(),
  tools: z.array(tool).max(128).nullish(),
  tool_choice: z
    .union([z.enum(["none", "auto", "required"]), z.object({ type: z.literal("function"), function: z.object({ name: z.string() }) })])
    .nullish(),
  parallel_tool_calls: z.boolean().nullish(),
  chat_template_kwargs: z.record(z.string(), z.unknown()).nullish().describe("Variables of the chat template. Not of OpenAI's."),
  reasoning_effort: z.enum(["none", "minimal", "low", "medium", "high", "xhigh"]).nullish().describe("Accepted; the model decides."),
  modalities: z.array(z.literal("text")).nullish(),
});
export type ChatBody = z.infer<typeof ChatBody>;

export const CompletionBody = z.strictObject({
  ...common,
  prompt: z.union([
    z.string(),
    z.array(z.number().int().min(0)).min(1),
    z.array(z.string()).min(1).max(MOST_ANSWERS),
    z
      .array(z.array(z.number().int().min(0)).min(1))
      .min(1)
      .max(MOST_ANSWERS),
  ]),
  max_tokens: z.number().int().min(1).nullish().describe("Default 16, as OpenAI's."),
  logprobs: z.number().int().min(0).max(20).nullish(),
  echo: z.boolean().nullish(),
  best_of: z.literal(1, "only 1: ask for n answers and choose among them").nullish(),
  suffix: z.null("text before a suffix can't be filled in: leave it out").optional(),
});
export type CompletionBody = z.infer<typeof CompletionBody>;

export const EmbeddingBody = z.strictObject({
  ...ignored,
  model: z.string().min(1),
  input: z.union([
    z.string(),
    z.array(z.number().int().min(0)).min(1),
    z.array(z.string()).min(1).max(MOST_INPUTS),
    z
      .array(z.array(z.number().int().min(0)).min(1))
      .min(1)
      .max(MOST_INPUTS),
  ]),
  encoding_format: z.enum(["float", "base64"]).nullish(),
  dimensions: z.number().int().min(1).nullish(),
});
export type EmbeddingBody = z.infer<typeof EmbeddingBody>;

export const TokenizeBody = z.strictObject({
  model: z.string().min(1),
  text: z.string(),
  add_special_tokens: z.boolean().nullish(),
});
export const DetokenizeBody = z.strictObject({
  model: z.string().min(1),
  tokens: z.array(z.number().int().min(0)),
  skip_special_tokens: z.boolean().nullish(),
});
export const RoutingBody = z.strictObject({
  model: z.string().min(1),
  text: z.string().min(1).optional(),
  messages: z.array(message).min(1).max(MOST_MESSAGES).optional(),
});

/** What decides how a template is used, and which: no variables of it. */
const TEMPLATE_OPTIONS = [
  "chat_template",
  "tools",
  "documents",
  "tokenize",
  "add_generation_prompt",
  "continue_final_message",
  "return_dict",
];

/** One answer's request; `seed` counts up over several answers. */
export function chatRequest(
  body: ChatBody,
  defaults: Readonly<Record<string, unknown>>,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest {
  const names = (body.tools ?? []).map((t) => t.function.name);
  if (new Set(names).size < names.length) throw new ServerError("invalid_request", "two tools have the same name", { param: "tools" });
  if (body.top_logprobs && !body.logprobs)
    throw new ServerError("invalid_request", "top_logprobs needs logprobs: true as well", { param: "top_logprobs" });
  const choice = toolChoice(body.tool_choice, names);
  const reserved = TEMPLATE_OPTIONS.find((name) => name in (body.chat_template_kwargs ?? {}));
  if (reserved)
    throw new ServerError("invalid_request", `'${reserved}' is not for clients to set`, { param: `chat_template_kwargs.${reserved}` });
  if (choice !== "none" && choice !== "auto" && body.response_format && body.response_format.type !== "text")
    throw new ServerError("invalid_request", "an answer cannot be a tool call and of a response_format at once", {
      param: "response_format",
    });
  return {
    prompt: {
      kind: "chat",
      messages: messagesOf(body.messages),
      tools: (body.tools ?? []).map(({ function: f }) => ({ ...f, strict: f.strict ?? false })),
      toolChoice: choice,
      oneToolCall: body.parallel_tool_calls === false,
      templateVariables: body.chat_template_kwargs ?? {},
    },
    sampling: samplingOf(body, defaults),
    maxTokens: body.max_completion_tokens ?? body.max_tokens ?? null,
    stop: stopsOf(body.stop),
    format: formatOf(body.response_format),
    logprobs: body.logprobs ? (body.top_logprobs ?? 0) : null,
    routing: body.routing ?? false,
    ...who,
  };
}

export function completionRequest(
  body: CompletionBody,
  prompt: Prompt,
  defaults: Readonly<Record<string, unknown>>,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest {
  if (body.echo && body.logprobs != null)
    throw new ServerError("invalid_request", "echo: log-probabilities are given for new tokens only; leave out echo or logprobs", {
      param: "echo",
    });
  return {
    prompt,
    sampling: samplingOf(body, defaults),
    maxTokens: body.max_tokens ?? 16,
    stop: stopsOf(body.stop),
    format: { kind: "text" },
    logprobs: body.logprobs ?? null,
    routing: body.routing ?? false,
    ...who,
  };
}

/** What a request for text completions asks for, one for each answer: `n` to each prompt. */
export function completionRequests(
  body: CompletionBody,
  defaults: Readonly<Record<string, unknown>>,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest[] {
  const prompts = promptsOf(body.prompt);
  const answers = prompts.length * (body.n ?? 1);
  if (answers > MOST_ANSWERS)
    throw new ServerError("invalid_request", `${answers} answers are asked for; one request may have ${MOST_ANSWERS}`, { param: "prompt" });
  return prompts.flatMap((prompt) => several(completionRequest(body, prompt, defaults, who), body.n ?? 1));
}

/** The same request so many times, with seeds that count up. */
export function several(request: CompletionRequest, n: number): CompletionRequest[] {
  return Array.from({ length: n }, (_, i) => ({
    ...request,
    sampling: { ...request.sampling, seed: (request.sampling.seed + i) % (2 ** 53 - 1) },
  }));
}

/** The prompts of a completion: each is answered on its own. */
export function promptsOf(prompt: CompletionBody["prompt"] | EmbeddingBody["input"]): Prompt[] {
  if (typeof prompt === "string") return [{ kind: "text", text: prompt }];
  if (typeof prompt[0] === "number") return [{ kind: "tokens", tokens: prompt as number[] }];
  return (prompt as (string | number[])[]).map((p) => (typeof p === "string" ? { kind: "text", text: p } : { kind: "tokens", tokens: p }));
}

/** A conversation without tools. */
export function chatPrompt(messages: readonly Message[]): Prompt {
  return { kind: "chat", messages, tools: [], toolChoice: "none", oneToolCall: false, templateVariables: {} };
}

export function messagesOf(messages: z.infer<typeof message>[]): Message[] {
  return messages.map((m) => ({ ...m, role: m.role === "developer" ? "system" : m.role }) as Message);
}

function samplingOf(body: Pick<ChatBody, keyof typeof sampling>, defaults: Readonly<Record<string, unknown>>): Sampling {
  const or = (value: number | null | undefined, key: string, fallback: number): number =>
    value ?? (typeof defaults[key] === "number" ? (defaults[key] as number) : fallback);
  // A model whose generation_config does not sample is greedy unless a temperature is given.
  const samples =
    body.temperature !== undefined && body.temperature !== null
      ? body.temperature > 0
      : defaults["do_sample"] === true || body.top_p != null;
  const controls = samples
    ? {
        temperature: or(body.temperature, "temperature", 1),
        topP: or(body.top_p, "top_p", 1) || Number.EPSILON, // at 0 the likeliest token alone
        topK: or(body.top_k, "top_k", 0),
        minP: or(body.min_p, "min_p", 0),
      }
    : {};
  const seed = body.seed ?? randomInt(2 ** 47);
  return {
    ...GREEDY,
    ...controls,
    repetitionPenalty: or(body.repetition_penalty, "repetition_penalty", 1),
    presencePenalty: or(body.presence_penalty, "presence_penalty", 0),
    frequencyPenalty: or(body.frequency_penalty, "frequency_penalty", 0),
    logitBias: new Map(Object.entries(body.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias])),
    seed: seed < 0 ? seed + 2 ** 53 : Math.min(seed, 2 ** 53 - 1),
  };
}

function stopsOf(stop: string | string[] | null | undefined): string[] {
  return [stop ?? []].flat().filter((s) => s !== "");
}

function formatOf(format: ChatBody["response_format"]): ResponseFormat {
  if (format?.type === "json_object") return { kind: "json" };
  if (format?.type === "json_schema") return { kind: "schema", schema: format.json_schema.schema };
  return { kind: "text" };
}

function toolChoice(choice: ChatBody["tool_choice"], names: readonly string[]): ToolChoice {
  if (choice === null || choice === undefined) return names.length > 0 ? "auto" : "none";
  if (choice !== "none" && choice !== "auto" && names.length === 0)
    throw new ServerError("invalid_request", "tool_choice asks for a call, and there are no tools", { param: "tool_choice" });
  if (typeof choice === "string") return choice;
  const { name } = choice.function;
  if (!names.includes(name))
    throw new ServerError("invalid_request", `tool_choice names '${name}'; the tools are ${names.join(", ")}`, { param: "tool_choice" });
  return { name };
}
