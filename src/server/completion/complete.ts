/**
 * From a request to the events of its answer: renders and encodes the prompt, constrains the answer where its form was asked
 * for, and submits it to the engine. HTTP and gRPC both stand on it. Knows no protocol.
 */
import { endTokenIds } from "../../api/generation.ts";
import { dialectOf } from "../../chat/dialect.ts";
import type { EncodedPrompt } from "../../chat/prompt.ts";
import { BLOCK_TOKENS } from "../../engine/blocks.ts";
import type { Constraint, GeneratedToken, Request } from "../../engine/sequence.ts";
import { ServerError } from "../errors.ts";
import { Answer } from "./assembler.ts";
import type { CompletionEvent, CompletionRequest, ServedModel, Usage } from "./request.ts";

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
  const prompt = await encoded(model, request);
  if (prompt === null) return;
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

/** Null where the client left before. */
async function encoded({ encoder }: ServedModel, { prompt, signal }: CompletionRequest): Promise<EncodedPrompt | null> {
  try {
    return await encoder.encode(prompt, signal);
  } catch (error) {
    if (signal.aborted) return null;
    throw error;
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

/** Tokens of prompt and answer together at most. */
export function contextLength({ config, engine }: Pick<ServedModel, "config" | "engine">): number {
  return Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS);
}

/** Tokens that the answer may have. Throws ServerError where the prompt leaves none. */
function roomFor(model: ServedModel, promptTokens: number, { maxTokens, maxPromptTokens, prompt }: CompletionRequest): number {
  const longest = contextLength(model);
  const param = prompt.kind === "chat" ? "messages" : "prompt";
  if (promptTokens === 0) throw new ServerError("invalid_request", "the prompt is empty: at least one token is needed", { param });
  if (maxPromptTokens !== undefined && promptTokens > maxPromptTokens)
    throw new ServerError("context_length_exceeded", `the prompt has ${promptTokens} tokens; this server takes ${maxPromptTokens}`, {
      param,
    });
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
