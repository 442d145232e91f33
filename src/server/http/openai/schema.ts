/** What OpenAI's clients may send, field by field, and mixtape's own routes beside them. Knows no HTTP and no model. */
import { z } from "zod";

/** Fields that clients send and that are ignored; any other unknown field is an error. */
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

/** The most tokens with a bias: each step applies all of them. */
const MOST_BIASES = 1024;
const MOST_MESSAGES = 10_000;
/** The most texts of one embeddings request. */
export const MOST_INPUTS = 256;
/** The most answers of one completions request: prompts times n. */
export const MOST_ANSWERS = 128;

const unit = z.number().min(-2).max(2);
/** Sampling controls, of chats and completions alike. */
export const sampling = {
  temperature: z.number().min(0).max(2).nullish().describe("0 is greedy. Default: the model's own."),
  top_p: z.number().min(0).max(1).nullish().describe("0 is greedy."),
  top_k: z.number().int().min(0).nullish().describe("Sample from the k likeliest tokens; 0 is no limit. An extension of OpenAI's API."),
  min_p: z
    .number()
    .min(0)
    .max(1)
    .nullish()
    .describe("Sample from tokens at least this fraction as likely as the likeliest. An extension of OpenAI's API."),
  repetition_penalty: z
    .number()
    .min(0.01)
    .max(100)
    .nullish()
    .describe("Divides the logits of tokens that have occurred. An extension of OpenAI's API."),
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
  routing: z.boolean().nullish().describe("Also report which experts each token used. An extension of OpenAI's API."),
};

const textPart = z.object({ type: z.literal("text"), text: z.string() });
const content = z.union([z.string(), z.array(textPart)]);
const calls = z.array(
  z.object({ id: z.string(), type: z.literal("function"), function: z.object({ name: z.string(), arguments: z.string() }) }),
);
export const message = z.discriminatedUnion("role", [
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
  chat_template_kwargs: z
    .record(z.string(), z.unknown())
    .nullish()
    .describe("Variables for the chat template. An extension of OpenAI's API."),
  reasoning_effort: z
    .enum(["none", "minimal", "low", "medium", "high", "xhigh"])
    .nullish()
    .describe("Accepted and ignored: the model decides."),
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
  best_of: z.literal(1, "only 1 is supported: request n answers and choose among them").nullish(),
  suffix: z.null("filling in text before a suffix is not supported: leave it out").optional(),
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
