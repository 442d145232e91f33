/**
 * What OpenAI's clients may send, field by field, and mixtape's own routes beside them. Every list, record and free-form object
 * has a bound on its count. Knows no HTTP and no model.
 */
import { z } from "zod";
import { noted } from "../../check.ts";
import { MOST_VALUES } from "../body.ts";

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
const ignored = Object.fromEntries(IGNORED.map((name) => [name, noted(z.unknown().optional(), { ignored: true })]));

/** The longest name of a model, which errors repeat, and the longest stop text, in characters. */
const LONGEST_MODEL = 1024;
const LONGEST_STOP = 1024;
/** The most tokens with a bias: each step applies all of them. */
const MOST_BIASES = 1024;
const MOST_MESSAGES = 10_000;
/** The most parts, or tool calls, of one message. */
const MOST_PARTS = 10_000;
const MOST_CALLS = 1024;
/** The most values in the variables of a chat template, at any depth. */
const MOST_VARIABLES = 1024;
/** The most values in a JSON schema; the grammar has its own limits for what is enforced. */
const MOST_SCHEMA_VALUES = 20_000;
/** The most texts of one embeddings request. */
export const MOST_INPUTS = 256;
/** The most answers of one completions request: prompts times n. */
export const MOST_ANSWERS = 128;

/** Other interfaces' names for fields here, and what to send in their place. */
const ELSEWHERE: Readonly<Record<string, string>> = {
  max_new_tokens: "send 'max_tokens'",
  max_output_tokens: "send 'max_tokens'",
  max_tokens_to_sample: "send 'max_tokens'",
  max_length: "send 'max_tokens', which counts the answer alone",
  num_return_sequences: "send 'n'",
  stop_sequences: "send 'stop'",
  stop_strings: "send 'stop'",
  do_sample: "send 'temperature': 0 is greedy",
  functions: 'send \'tools\', whose elements are like {"type": "function", "function": {…}}',
  function_call: "send 'tool_choice'",
  guided_json: "send 'response_format'",
  json_schema: "send 'response_format'",
  system: "send a message with the role 'system'",
  instructions: "send a message with the role 'system'",
  input: "conversations go to 'messages', texts to 'prompt' of /v1/completions",
};

const model = noted(z.string().min(1).max(LONGEST_MODEL), { wanted: "the name of a model, as GET /v1/models lists them" });
const unit = z.number().min(-2).max(2);
const answerTokens = z.number().int().min(1);
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
  logit_bias: noted(z.record(z.string().regex(/^\d+$/, "token ids are whole numbers"), z.number().min(-100).max(100)), {
    entries: MOST_BIASES,
    wanted: 'an object of token ids and numbers from -100 to 100, like {"42": -100}',
  }).nullish(),
  seed: z
    .number()
    .int()
    .min(-(2 ** 53))
    .max(2 ** 53)
    .nullish(),
};
const stop = z.string().max(LONGEST_STOP);
const common = {
  ...ignored,
  ...sampling,
  model,
  n: z.number().int().min(1).max(16).nullish(),
  stop: z.union([stop, z.array(stop).max(4)]).nullish(),
  stream: z.boolean().nullish(),
  stream_options: z.strictObject({ include_usage: z.boolean().nullish(), include_obfuscation: z.boolean().nullish() }).nullish(),
  routing: z.boolean().nullish().describe("Also report which experts each token used. An extension of OpenAI's API."),
};

const TEXT_PART = '{"type": "text", "text": "…"}';
const textPart = noted(
  z.object({
    type: noted(z.literal("text"), { wanted: "'text': models here read text, no images, audio or files" }),
    text: z.string(),
  }),
  { wanted: `a part ${TEXT_PART}` },
);
const content = noted(z.union([z.string(), z.array(textPart).max(MOST_PARTS)]), { wanted: `a text, or a list of parts ${TEXT_PART}` });
const name = z.string().nullish();
const call = z.object({
  id: z.string(),
  type: z.literal("function"),
  function: z.object({ name: z.string(), arguments: noted(z.string(), { wanted: "a text: the arguments as JSON" }) }),
});
export const message = noted(
  z.discriminatedUnion("role", [
    z.object({ role: z.literal("system"), content, name }),
    z.object({ role: z.literal("developer"), content, name }),
    z.object({ role: z.literal("user"), content, name }),
    z.object({
      role: z.literal("assistant"),
      content: content.nullish(),
      reasoning_content: z.string().nullish(),
      refusal: z.string().nullish(),
      name,
      tool_calls: z.array(call).max(MOST_CALLS).nullish(),
    }),
    z.object({
      role: z.literal("tool"),
      content,
      tool_call_id: noted(z.string(), { wanted: "a text: the id of the call, in the assistant's tool_calls, that this message answers" }),
    }),
  ]),
  { wanted: 'a message like {"role": "user", "content": "…"}' },
);
const messages = noted(z.array(message).min(1).max(MOST_MESSAGES), { wanted: 'a list of messages like {"role": "user", "content": "…"}' });

const schemaObject = noted(z.record(z.string(), z.unknown()), {
  entries: MOST_SCHEMA_VALUES,
  values: MOST_SCHEMA_VALUES,
  wanted: "a JSON schema: an object",
});
const FUNCTION = '{"type": "function", "function": {"name": "…", "parameters": {…}}}';
const tool = noted(
  z.object({
    type: z.literal("function"),
    function: z.object({
      name: noted(z.string().regex(/^[\w-]{1,64}$/, "it must be 1 to 64 letters, digits, _ and -"), {
        wanted: "a text: 1 to 64 letters, digits, _ and -",
      }),
      description: z.string().optional(),
      parameters: schemaObject.optional(),
      strict: z.boolean().nullish(),
    }),
  }),
  { wanted: `a tool like ${FUNCTION}` },
);
const responseFormat = noted(
  z.discriminatedUnion("type", [
    z.strictObject({ type: z.literal("text") }),
    z.strictObject({
      type: z.literal("json_object"),
      schema: schemaObject.optional().describe("The object satisfies it. An extension of OpenAI's API."),
    }),
    z.strictObject({
      type: z.literal("json_schema"),
      json_schema: noted(
        z.strictObject({
          name: z.string(),
          description: z.string().optional(),
          schema: schemaObject,
          strict: z.boolean().nullish(),
        }),
        { wanted: 'an object like {"name": "…", "schema": {…}}' },
      ),
    }),
  ]),
  { wanted: 'an object like {"type": "json_schema", "json_schema": {"name": "…", "schema": {…}}}' },
);
const namedTool = z.object({ type: z.literal("function"), function: z.object({ name: z.string() }) });

export const ChatBody = noted(
  z.strictObject({
    ...common,
    messages,
    max_tokens: answerTokens.nullish(),
    max_completion_tokens: answerTokens.nullish(),
    logprobs: z.boolean().nullish(),
    top_logprobs: z.number().int().min(0).max(20).nullish(),
    response_format: responseFormat.nullish(),
    tools: z.array(tool).max(128).nullish(),
    tool_choice: noted(z.union([z.enum(["none", "auto", "required"]), namedTool]), {
      wanted: `'none', 'auto', 'required' or an object like {"type": "function", "function": {"name": "…"}}`,
    }).nullish(),
    parallel_tool_calls: z.boolean().nullish(),
    chat_template_kwargs: noted(z.record(z.string(), z.unknown()), { entries: MOST_VARIABLES, values: MOST_VARIABLES })
      .nullish()
      .describe("Variables for the chat template. An extension of OpenAI's API."),
    reasoning_effort: z
      .enum(["none", "minimal", "low", "medium", "high", "xhigh"])
      .nullish()
      .describe("Accepted and ignored: the model decides."),
    modalities: z
      .array(noted(z.literal("text"), { wanted: "'text': models here write text only" }))
      .max(4)
      .nullish(),
  }),
  { elsewhere: { ...ELSEWHERE, prompt: "send 'messages', or the prompt to /v1/completions" } },
);
export type ChatBody = z.infer<typeof ChatBody>;

const id = z.number().int().min(0);
const ids = z.array(id).min(1).max(MOST_VALUES);
/** Texts or lists of ids, one or at most `most`. */
const prompts = (most: number) =>
  noted(z.union([z.string(), ids, z.array(z.string()).min(1).max(most), z.array(ids).min(1).max(most)]), {
    wanted: "a text, a list of texts, a list of token ids, or a list of such lists",
  });

export const CompletionBody = noted(
  z.strictObject({
    ...common,
    prompt: prompts(MOST_ANSWERS),
    max_tokens: answerTokens.nullish().describe("Default 16, as OpenAI's."),
    logprobs: z.number().int().min(0).max(20).nullish(),
    echo: z.boolean().nullish(),
    best_of: noted(z.literal(1), { wanted: "1; only 1 is supported: request n answers and choose among them" }).nullish(),
    suffix: noted(z.null(), { wanted: "null: filling in text before a suffix is not supported, so leave it out" }).optional(),
  }),
  { elsewhere: { ...ELSEWHERE, messages: "send 'prompt', or the messages to /v1/chat/completions" } },
);
export type CompletionBody = z.infer<typeof CompletionBody>;

export const EmbeddingBody = z.strictObject({
  ...ignored,
  model,
  input: prompts(MOST_INPUTS),
  encoding_format: z.enum(["float", "base64"]).nullish(),
  dimensions: z.number().int().min(1).nullish(),
});
export type EmbeddingBody = z.infer<typeof EmbeddingBody>;

/** As vLLM has it. */
export const ClassifyBody = noted(
  z.strictObject({
    ...ignored,
    priority: noted(z.unknown().optional(), { ignored: true }),
    model,
    input: prompts(MOST_INPUTS),
    truncate_prompt_tokens: z
      .number()
      .int()
      .min(-1)
      .nullish()
      .describe(
        "Use only so many tokens of a text, by default its last; -1: as many as the model takes. Default: longer texts are errors.",
      ),
    truncation_side: z.enum(["left", "right"]).nullish().describe("Where a text is cut. Default left, which keeps its end."),
    add_special_tokens: z.boolean().nullish(),
    use_activation: z
      .boolean()
      .nullish()
      .describe("False: logits in place of probabilities. Default true: softmax, sigmoid for multi-label models, none for regression."),
    activation: z.boolean().nullish().describe("The earlier name of use_activation."),
    softmax: z.boolean().nullish().describe("The earliest name of use_activation."),
  }),
  {
    elsewhere: {
      messages: "send the text as 'input', in the form that the classifier was trained on",
      prompt: "send 'input'",
      text: "send 'input'",
    },
  },
);
export type ClassifyBody = z.infer<typeof ClassifyBody>;

export const TokenizeBody = z.strictObject({
  model,
  text: z.string(),
  add_special_tokens: z.boolean().nullish(),
});
export const DetokenizeBody = z.strictObject({
  model,
  tokens: noted(z.array(id).max(MOST_VALUES), { wanted: "a list of token ids" }),
  skip_special_tokens: z.boolean().nullish(),
});
export const RoutingBody = z.strictObject({
  model,
  text: z.string().min(1).optional(),
  messages: messages.optional(),
});

/** What names nothing but a model. */
export const NamedBody = z.strictObject({ model });

/** The body of each route that takes one. */
export const BODIES = {
  "/v1/chat/completions": ChatBody,
  "/v1/completions": CompletionBody,
  "/v1/embeddings": EmbeddingBody,
  "/v1/classify": ClassifyBody,
  "/classify": ClassifyBody,
  "/v1/routing": RoutingBody,
  "/tokenize": TokenizeBody,
  "/detokenize": DetokenizeBody,
} as const;
