/**
 * From a request to the events of its answer: encodes the prompt, constrains the answer to its format, and submits it to the
 * engine. HTTP and gRPC both build on it. Knows no protocol.
 */
import { endTokenIds } from "../../api/defaults.ts";
import { anyOf } from "../../api/signal.ts";
import { TAGS } from "../../chat/dialect.ts";
import { shapeOf } from "../../chat/format.ts";
import type { EncodedPrompt } from "../../chat/prompt.ts";
import { BLOCK_TOKENS } from "../../engine/blocks.ts";
import type { Constraint, GeneratedToken, Request } from "../../engine/sequence.ts";
import type { NamedModel } from "../catalog.ts";
import { ServerError } from "../errors.ts";
import { Assembler } from "./assembler.ts";
import type { CompletionEvent, CompletionRequest, Progress } from "./request.ts";

/**
 * Answers a request. Nothing runs before the first event is requested; leaving the loop ends the request in the engine. Once
 * the signal is aborted there are no more events, not even `end`. Throws ServerError `context_length_exceeded` or
 * `invalid_request` with the field, PromptError, or GrammarError.
 *
 * Tokens are read as they are computed, not at the pace of the client: an answer that ends at a stop text ends in the engine then,
 * and what was computed is counted when the client reads nothing.
 * @param progress told what is computed, even when the answer does not reach its end
 */
export async function* complete(
  model: NamedModel,
  request: CompletionRequest,
  progress: Progress,
): AsyncGenerator<CompletionEvent, void, undefined> {
  const { config, defaults } = model;
  const prompt = await encoded(model, request);
  if (prompt === null) return;
  const maxNewTokens = roomFor(model, prompt.tokens.length, request);
  const answer = new Assembler(model, request, prompt, progress);
  const constraint = await constraintOf(model, request, prompt.insideReasoning);
  const leave = new AbortController();
  const stream = submit(model, {
    tokens: prompt.tokens,
    sampling: request.sampling,
    maxNewTokens,
    stopIds: endTokenIds(defaults, config),
    topLogprobs: request.logprobs ?? 0,
    wantRouting: request.routing && config.moe !== null,
    owner: request.owner,
    onPrompt: progress.read,
    ...(model.adapter === undefined ? {} : { adapter: model.adapter }),
    ...(constraint ? { constraint } : {}),
    signal: anyOf(request.signal, leave.signal),
  });
  const left = () => request.signal.aborted || leave.signal.aborted;
  const events: CompletionEvent[] = [];
  let state: { readonly over: boolean; readonly failure?: unknown } = { over: false };
  let wake = () => {};
  const read = async (): Promise<void> => {
    try {
      for await (const token of stream) {
        if (left()) return;
        events.push(...answer.take(token));
        wake();
        if (answer.over) break;
      }
      if (!left()) events.push(...answer.finish());
      state = { over: true };
    } catch (failure) {
      state = { over: true, failure };
    }
  };
  void read().finally(() => {
    state = { ...state, over: true };
    wake();
  });
  try {
    for (;;) {
      for (const event of events.splice(0)) {
        if (request.signal.aborted) return;
        yield event;
      }
      if (request.signal.aborted) return;
      if (events.length > 0) continue;
      if (state.failure !== undefined) throw state.failure;
      if (state.over) return;
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    }
  } finally {
    leave.abort();
  }
}

/** Null when the client left first. */
async function encoded(model: NamedModel, { prompt, signal, owner, maxPromptTokens }: CompletionRequest): Promise<EncodedPrompt | null> {
  const mostTokens = Math.min(contextLength(model), maxPromptTokens ?? Number.POSITIVE_INFINITY);
  try {
    return await model.encoder.encode(prompt, signal, { owner, mostTokens });
  } catch (error) {
    if (signal.aborted) return null;
    throw error;
  }
}

/** The engine's errors begin with the name of the option that they are about. */
function submit({ engine }: NamedModel, request: Request): AsyncGenerator<GeneratedToken, void, undefined> {
  try {
    return engine.submit(request);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    const param =
      /^[a-z]+(?:_[a-z]+)+(?=[: ])|^temperature|^seed/.exec(cause.message)?.[0] ?? (/^token id/.test(cause.message) ? "prompt" : undefined);
    throw new ServerError("invalid_request", cause.message, { cause, param });
  }
}

/** The most tokens that prompt and answer may have together. */
export function contextLength({ config, engine }: Pick<NamedModel, "config" | "engine">): number {
  return Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS);
}

/** The most tokens that the answer may have. Throws ServerError when the prompt leaves no room. */
function roomFor(model: NamedModel, promptTokens: number, { maxTokens, maxPromptTokens, prompt }: CompletionRequest): number {
  const longest = contextLength(model);
  const param = prompt.kind === "chat" ? "messages" : "prompt";
  if (promptTokens === 0) throw new ServerError("invalid_request", "the prompt is empty: at least one token is needed", { param });
  if (maxPromptTokens !== undefined && promptTokens > maxPromptTokens)
    throw new ServerError(
      "context_length_exceeded",
      `the prompt has ${promptTokens} tokens; this server accepts at most ${maxPromptTokens}`,
      {
        param,
      },
    );
  if (promptTokens >= longest)
    throw new ServerError(
      "context_length_exceeded",
      `the prompt has ${promptTokens} tokens; the model has room for ${longest}, including its answer`,
      { param },
    );
  return Math.min(maxTokens ?? Number.POSITIVE_INFINITY, longest - promptTokens);
}

/** The grammar that the answer must follow: of its format, of required calls, or of strict tools; null: none. */
async function constraintOf({ grammars }: NamedModel, request: CompletionRequest, insideReasoning: boolean): Promise<Constraint | null> {
  const wanted = shapeOf(request.format, request.prompt);
  return wanted && grammars.constraint(wanted.shape, { param: wanted.param, after: insideReasoning ? TAGS.think[1] : null });
}
