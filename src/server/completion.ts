/**
 * One answer: from a request to a stream of events. Renders and encodes the prompt, lets the engine generate, and turns ids
 * into whole characters, reasoning, tool calls and what else was asked for. Knows no protocol.
 */
import { endTokenIds } from "../api/generation.ts";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import type { Constraint, GeneratedToken } from "../engine/sequence.ts";
import { isMoeLayer } from "../model/config.ts";
import { StopStrings } from "../tokenizer/stops.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { ServerError } from "./errors.ts";
import type { Shape } from "./grammar.ts";
import type { CompletionEvent, CompletionRequest, FinishReason, Prompt, ServedModel, TokenLogprob, Usage } from "./served.ts";
import { TagSplitter } from "./tags.ts";
import { describe, withoutTools } from "./tools.ts";

/** What of a model's chat template decides how its text is read. */
interface Dialect {
  /** Writes its reasoning in `<think>`. */
  readonly thinks: boolean;
  /** Takes tools as a variable. */
  readonly takesTools: boolean;
}

/**
 * Generates one answer. Throws ServerError for a prompt that does not fit or a schema that cannot be enforced.
 * @param onUsage told once what was computed, also where the answer did not come to its end
 */
export async function* complete(
  model: ServedModel,
  request: CompletionRequest,
  onUsage: (usage: Usage) => void,
): AsyncGenerator<CompletionEvent, void, undefined> {
  const { engine, tokenizer, config } = model;
  const dialect = dialectOf(tokenizer);
  const { tokens, text: rendered } = promptOf(tokenizer, request.prompt, dialect);
  const longest = Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS);
  if (tokens.length === 0)
    throw new ServerError("invalid_request", "the prompt is empty: at least one token is needed", { param: promptParam(request.prompt) });
  if (tokens.length >= longest)
    throw new ServerError(
      "context_length_exceeded",
      `the prompt has ${tokens.length} tokens; the model has room for ${longest}, its answer included`,
      { param: promptParam(request.prompt) },
    );
  const calls = request.prompt.kind === "chat" && request.prompt.tools.length > 0 && request.prompt.toolChoice !== "none";
  const splits = request.prompt.kind === "chat" && (dialect.thinks || calls);
  const reasons = dialect.thinks && /<think>\s*$/.test(rendered);
  const splitter = splits ? new TagSplitter(reasons) : null;
  const stops = new StopStrings(request.stop);
  const detokenizer = tokenizer.detokenizer({ skip_special_tokens: !splits });
  const layers = Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i));
  const leave = new AbortController();
  const usage = { promptTokens: tokens.length, cachedTokens: 0, completionTokens: 0, reasoningTokens: 0 };
  let reasoning = reasons;
  let finish: FinishReason = "length";

  /** Text that came through, as events. */
  function* spoken(text: string): Generator<CompletionEvent> {
    if (text === "") return;
    if (!splitter) yield { kind: "text", channel: "answer", text };
    else yield* told(splitter.push(text));
  }
  function* told(pieces: ReturnType<TagSplitter["push"]>): Generator<CompletionEvent> {
    for (const piece of pieces) {
      if (piece.kind === "text") reasoning = piece.channel === "reasoning";
      else reasoning = false;
      yield piece;
    }
  }

  const stopIds = endTokenIds(model.generationConfig, config);
  const constraint = await constrained(model, request);
  try {
    const stream = engine.submit({
      tokens,
      sampling: request.sampling,
      maxNewTokens: Math.min(request.maxTokens ?? Number.POSITIVE_INFINITY, longest - tokens.length),
      stopIds,
      topLogprobs: request.logprobs ?? 0,
      wantRouting: request.routing && layers.length > 0,
      owner: request.owner,
      ...(constraint ? { constraint } : {}),
      signal: anyOf(request.signal, leave.signal),
    });
    for await (const token of stream) {
      usage.completionTokens++;
      usage.cachedTokens = token.cachedTokens ?? usage.cachedTokens;
      if (request.signal.aborted) return;
      const ends = token.finish === "stop" && stopIds.includes(token.id);
      if (request.logprobs !== null && !ends) yield logprobOf(tokenizer, token);
      if (token.routing) yield { kind: "routing", token: { id: token.id, text: tokenizer.decode([token.id]), layers, ...token.routing } };
      const watched = stops.push(ends ? "" : detokenizer.push([token.id]));
      yield* spoken(watched.text);
      if (reasoning) usage.reasoningTokens++;
      if (watched.stopped || ends) {
        finish = "stop";
        break;
      }
    }
    const rest = stops.push(detokenizer.finish());
    yield* spoken(rest.text + stops.finish());
    if (splitter) yield* told(splitter.finish());
    if (request.signal.aborted) return;
    if (finish === "stop" && splitter && splitter.calls > 0) finish = "toolCalls";
    yield { kind: "end", reason: finish, usage };
  } finally {
    leave.abort();
    constraint?.dispose();
    onUsage(usage);
  }
}

/** The prompt's ids; of a chat also as it was rendered. Throws ServerError naming the field. */
export function promptOf(
  tokenizer: Tokenizer,
  prompt: Prompt,
  dialect = dialectOf(tokenizer),
): { tokens: readonly number[]; text: string } {
  switch (prompt.kind) {
    case "tokens":
      return { tokens: prompt.tokens, text: "" };
    case "text":
      return { tokens: tokenizer.encode(prompt.text), text: prompt.text };
    case "chat": {
      if (tokenizer.chat_template === null)
        throw new ServerError("invalid_request", "this model has no chat template; use /v1/completions", { param: "messages" });
      const tools = prompt.toolChoice === "none" ? [] : prompt.tools;
      const messages = dialect.takesTools ? prompt.messages : withoutTools(prompt.messages, tools);
      try {
        const text = tokenizer.apply_chat_template(messages, {
          ...prompt.templateVariables,
          ...(dialect.takesTools && tools.length > 0 ? { tools: describe(tools) } : {}),
          add_generation_prompt: true,
          tokenize: false,
        });
        return { tokens: tokenizer.encode(text, { add_special_tokens: false }), text };
      } catch (cause) {
        throw new ServerError("invalid_request", cause instanceof Error ? cause.message : "the messages cannot be rendered", {
          param: "messages",
          cause,
        });
      }
    }
    default:
      return prompt satisfies never;
  }
}

function dialectOf(tokenizer: Tokenizer): Dialect {
  const template = tokenizer.chat_template ?? "";
  return { thinks: template.includes("<think>"), takesTools: /\btools\b/.test(template) };
}

function promptParam(prompt: Prompt): string {
  return prompt.kind === "chat" ? "messages" : "prompt";
}

async function constrained(model: ServedModel, { format, prompt }: CompletionRequest): Promise<(Constraint & { dispose(): void }) | null> {
  let shape: Shape | null = null;
  let param = "response_format";
  if (format.kind === "json") shape = { kind: "json" };
  else if (format.kind === "schema") {
    shape = { kind: "schema", schema: format.schema };
    param = "response_format.json_schema.schema";
  } else if (prompt.kind === "chat" && prompt.tools.length > 0 && prompt.toolChoice !== "auto" && prompt.toolChoice !== "none") {
    const { toolChoice } = prompt;
    const tools = toolChoice === "required" ? prompt.tools : prompt.tools.filter((tool) => tool.name === toolChoice.name);
    shape = { kind: "calls", tools, several: toolChoice === "required" && !prompt.oneToolCall };
    param = "tools";
  }
  return shape && model.grammars.constraint(shape, param);
}

function logprobOf(tokenizer: Tokenizer, { id, logprob, top = [] }: GeneratedToken): CompletionEvent {
  const named = (each: { id: number; logprob: number }): TokenLogprob => ({ ...each, bytes: bytesOf(tokenizer, each.id) });
  return { kind: "logprob", token: named({ id, logprob }), top: top.map(named) };
}

/** The bytes that a token stands for, which need not be whole characters. */
export function bytesOf(tokenizer: Tokenizer, id: number): Uint8Array {
  const piece = tokenizer.convert_ids_to_tokens(id) as string;
  const byte = /^<0x([0-9A-F]{2})>$/i.exec(piece)?.[1];
  return byte === undefined ? Buffer.from(tokenizer.decode([id]) || piece.replaceAll("▁", " ")) : Uint8Array.of(Number.parseInt(byte, 16));
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
