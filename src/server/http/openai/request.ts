/** From the bodies of OpenAI's clients to requests for answers. Throws ServerError for fields that contradict each other. Knows no HTTP. */
import { randomInt } from "node:crypto";
import type { z } from "zod";
import { type GenerationDefaults, resolveSampling } from "../../../api/defaults.ts";
import { readConversation } from "../../../chat/conversation.ts";
import type { Prompt } from "../../../chat/prompt.ts";
import { type Sampling, seedOf } from "../../../engine/sampling.ts";
import type { Message } from "../../../tokenizer/template.ts";
import type { CompletionRequest } from "../../completion/request.ts";
import { ServerError } from "../../errors.ts";
import { type ChatBody, type CompletionBody, type EmbeddingBody, MOST_ANSWERS, type message, type sampling } from "./schema.ts";

/** Options of the template call itself, which clients may not set as template variables. */
const TEMPLATE_OPTIONS = [
  "chat_template",
  "tools",
  "documents",
  "tokenize",
  "add_generation_prompt",
  "continue_final_message",
  "return_dict",
];

/** The request for one answer. Throws ServerError `invalid_request`, PromptError or GrammarError for fields that contradict each other. */
export function chatRequest(
  body: ChatBody,
  defaults: GenerationDefaults,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest {
  if (body.top_logprobs && !body.logprobs)
    throw new ServerError("invalid_request", "top_logprobs needs logprobs: true as well", { param: "top_logprobs" });
  const reserved = TEMPLATE_OPTIONS.find((name) => name in (body.chat_template_kwargs ?? {}));
  if (reserved)
    throw new ServerError("invalid_request", `'${reserved}' cannot be set by clients`, { param: `chat_template_kwargs.${reserved}` });
  const { prompt, format } = readConversation({
    ...body,
    messages: messagesOf(body.messages),
    templateVariables: body.chat_template_kwargs ?? {},
  });
  return {
    prompt,
    sampling: samplingOf(body, defaults),
    maxTokens: body.max_completion_tokens ?? body.max_tokens ?? defaults.max_new_tokens ?? null,
    stop: stopsOf(body.stop ?? defaults.stop_strings),
    format,
    logprobs: body.logprobs ? (body.top_logprobs ?? 0) : null,
    routing: body.routing ?? false,
    ...who,
  };
}

export function completionRequest(
  body: CompletionBody,
  prompt: Prompt,
  defaults: GenerationDefaults,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest {
  if (body.echo && body.logprobs != null)
    throw new ServerError("invalid_request", "echo: log-probabilities cover new tokens only; leave out echo or logprobs", {
      param: "echo",
    });
  return {
    prompt,
    sampling: samplingOf(body, defaults),
    maxTokens: body.max_tokens ?? 16,
    stop: stopsOf(body.stop ?? defaults.stop_strings),
    format: { kind: "text" },
    logprobs: body.logprobs ?? null,
    routing: body.routing ?? false,
    ...who,
  };
}

/** One request per answer: `n` for each prompt. Throws ServerError `invalid_request`. */
export function completionRequests(
  body: CompletionBody,
  defaults: GenerationDefaults,
  who: Pick<CompletionRequest, "owner" | "signal">,
): CompletionRequest[] {
  const prompts = promptsOf(body.prompt);
  const answers = prompts.length * (body.n ?? 1);
  if (answers > MOST_ANSWERS)
    throw new ServerError("invalid_request", `the request asks for ${answers} answers; at most ${MOST_ANSWERS} are allowed`, {
      param: "prompt",
    });
  return prompts.flatMap((prompt) => several(completionRequest(body, prompt, defaults, who), body.n ?? 1));
}

/** The same request `n` times, with seeds that count up. */
export function several(request: CompletionRequest, n: number): CompletionRequest[] {
  return Array.from({ length: n }, (_, i) => ({
    ...request,
    sampling: { ...request.sampling, seed: seedOf(request.sampling.seed, i) },
  }));
}

/** The prompts of a completion, each answered on its own. */
export function promptsOf(prompt: CompletionBody["prompt"] | EmbeddingBody["input"]): Prompt[] {
  if (typeof prompt === "string") return [{ kind: "text", text: prompt }];
  if (typeof prompt[0] === "number") return [{ kind: "tokens", tokens: prompt as number[] }];
  return (prompt as (string | number[])[]).map((p) => (typeof p === "string" ? { kind: "text", text: p } : { kind: "tokens", tokens: p }));
}

/** A conversation without tools. */
export function chatPrompt(messages: readonly Message[]): Prompt {
  return { kind: "chat", messages, tools: [], toolChoice: "none", oneToolCall: false, templateVariables: {} };
}

/** Messages as templates know them: OpenAI's `developer` is `system`. */
export function messagesOf(messages: z.infer<typeof message>[]): Message[] {
  return messages.map((m) => ({ ...m, role: m.role === "developer" ? "system" : m.role }) as Message);
}

function samplingOf(body: Pick<ChatBody, keyof typeof sampling>, defaults: GenerationDefaults): Sampling {
  // A model whose generation_config does not sample is greedy unless the request gives a temperature.
  const samples = body.temperature != null ? body.temperature > 0 : defaults.do_sample === true || body.top_p != null;
  const seed = body.seed ?? randomInt(2 ** 47);
  const bias = Object.entries(body.logit_bias ?? {}).map(([id, value]) => [Number(id), value] as const);
  // Negative seeds count back from 2^53.
  return resolveSampling({ ...body, logit_bias: new Map(bias), seed: seed < 0 ? seed + 2 ** 53 : seed }, defaults, samples);
}

function stopsOf(stop: string | readonly string[] | undefined): string[] {
  return [stop ?? []].flat().filter((s) => s !== "");
}
