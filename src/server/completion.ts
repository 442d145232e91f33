/**
 * From a request to the events of its answer: renders and encodes the prompt, constrains the answer where its form was asked
 * for, and submits it to the engine. HTTP and gRPC both stand on it. Knows no protocol.
 */
import { endTokenIds } from "../api/generation.ts";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import type { Constraint, GeneratedToken, Request } from "../engine/sequence.ts";
import { TokenizerError } from "../tokenizer/error.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { Answer } from "./answer.ts";
import { dialectOf, TAGS } from "./dialect.ts";
import { ServerError } from "./errors.ts";
import type { CompletionEvent, CompletionRequest, Prompt, ServedModel, Usage } from "./served.ts";
import { describe, withArguments, withoutTools } from "./tools.ts";

/** What the engine is to go on with, and how its answer begins. */
export interface EncodedPrompt {
  readonly tokens: readonly number[];
  /** It ends inside the model's reasoning. */
  readonly insideReasoning: boolean;
}

/**
 * Answers a request. Nothing runs before the first event is asked for; leaving the loop ends the request in the engine. Once
 * the signal is aborted there are no more events, the last one included. Throws ServerError: `context_length_exceeded`, or
 * `invalid_request` with the field.
 * @param onUsage told once what was computed, also where the answer did not come to its end
 */
export async function* complete(
  model: ServedModel,
  request: CompletionRequest,
  onUsage: (usage: Usage) => void,
): AsyncGenerator<CompletionEvent, void, undefined> {
  const { tokenizer, config, generationConfig } = model;
  const prompt = promptOf(tokenizer, request.prompt);
  const maxNewTokens = roomFor(model, prompt.tokens.length, request);
  const answer = new Answer(model, request, dialectOf(tokenizer), prompt);
  const constraint = await constraintOf(model, request, prompt.insideReasoning);
  const leave = new AbortController();
  const stream = submit(model, {
    tokens: prompt.tokens,
    sampling: request.sampling,
    maxNewTokens,
    stopIds: endTokenIds(generationConfig, config),
    topLogprobs: request.logprobs ?? 0,
    wantRouting: request.routing && config.moe !== null,
    owner: request.owner,
    ...(constraint ? { constraint } : {}),
    signal: anyOf(request.signal, leave.signal),
  });
  try {
    for await (const token of stream) {
      if (request.signal.aborted) return;
      yield* answer.take(token);
      if (answer.over) break;
    }
    if (!request.signal.aborted) yield* answer.finish();
  } catch (error) {
    if (!request.signal.aborted) throw error;
  } finally {
    leave.abort();
    onUsage(answer.usage);
  }
}

/** The ids of a prompt. Throws ServerError `invalid_request` for what the tokenizer or the chat template refuses. */
export function promptOf(tokenizer: Tokenizer, prompt: Prompt): EncodedPrompt {
  switch (prompt.kind) {
    case "tokens":
      return { tokens: prompt.tokens, insideReasoning: false };
    case "text":
      return { tokens: refusing("prompt", () => tokenizer.encode(prompt.text)), insideReasoning: false };
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

/** The engine's checks begin with the name of what they are about. */
function submit({ engine }: ServedModel, request: Request): AsyncGenerator<GeneratedToken, void, undefined> {
  try {
    return engine.submit(request);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    const param =
      /^[a-z]+(?:_[a-z]+)+(?=[: ])|^temperature|^seed/.exec(cause.message)?.[0] ?? (/^token id/.test(cause.message) ? "prompt" : undefined);
    throw new ServerError("invalid_request", cause.message, { cause, param });
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

/** Tokens of prompt and answer together at most. */
export function contextLength({ config, engine }: Pick<ServedModel, "config" | "engine">): number {
  return Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS);
}

/** Tokens that the answer may have. Throws ServerError where the prompt leaves none. */
function roomFor(model: ServedModel, promptTokens: number, { maxTokens, prompt }: CompletionRequest): number {
  const longest = contextLength(model);
  const param = prompt.kind === "chat" ? "messages" : "prompt";
  if (promptTokens === 0) throw new ServerError("invalid_request", "the prompt is empty: at least one token is needed", { param });
  if (promptTokens >= longest)
    throw new ServerError(
      "context_length_exceeded",
      `the prompt has ${promptTokens} tokens; the model has room for ${longest}, its answer included`,
      { param },
    );
  return Math.min(maxTokens ?? Number.POSITIVE_INFINITY, longest - promptTokens);
}

/** What narrows the answer: its format, calls that are required, or the arguments of strict tools. */
async function constraintOf(model: ServedModel, request: CompletionRequest, insideReasoning: boolean): Promise<Constraint | null> {
  const { format, prompt } = request;
  const { grammars } = model;
  switch (format.kind) {
    case "json":
      return grammars.constraint({ kind: "json" }, "response_format", insideReasoning);
    case "schema":
      return grammars.constraint({ kind: "schema", schema: format.schema }, "response_format.json_schema.schema", insideReasoning);
    case "text":
      break;
    default:
      return format satisfies never;
  }
  if (prompt.kind !== "chat" || prompt.tools.length === 0 || prompt.toolChoice === "none") return null;
  const { tools, toolChoice, oneToolCall } = prompt;
  if (toolChoice === "auto") {
    if (!tools.some((tool) => tool.strict)) return null;
    return grammars.constraint({ kind: "calls", tools, several: !oneToolCall, free: true }, "tools", insideReasoning);
  }
  const named = typeof toolChoice === "object" ? tools.filter((tool) => tool.name === toolChoice.name) : tools;
  const several = toolChoice === "required" && !oneToolCall;
  return grammars.constraint({ kind: "calls", tools: named, several, free: false }, "tools", insideReasoning);
}

/** Aborted when one of them is. Asked between steps: a listener would stay with a signal that many share. */
function anyOf(...signals: readonly AbortSignal[]): Pick<AbortSignal, "aborted" | "reason"> {
  return {
    get aborted() {
      return signals.some((s) => s.aborted);
    },
    get reason() {
      return signals.find((s) => s.aborted)?.reason;
    },
  };
}
