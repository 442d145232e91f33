/** Events of an answer as messages of mixtape.proto. Knows no call. */
import type { CompletionEvent, FinishReason, RoutedToken, Usage } from "../completion/request.ts";

const REASONS: Readonly<Record<FinishReason, string>> = {
  stop: "FINISH_REASON_STOP",
  length: "FINISH_REASON_LENGTH",
  toolCalls: "FINISH_REASON_TOOL_CALLS",
};

export function eventMessage(event: CompletionEvent): object {
  switch (event.kind) {
    case "text":
      return { text: { text: event.text, channel: event.channel === "answer" ? "CHANNEL_ANSWER" : "CHANNEL_REASONING" } };
    case "logprob":
      return { logprob: { token: event.token, top: event.top } };
    case "routing":
      return { routing: routingMessage(event.token) };
    case "toolCall":
      return { tool_call: { index: event.index, id: event.id, name: event.name, arguments: event.arguments } };
    case "end":
      return { end: { reason: REASONS[event.reason], usage: usageMessage(event.usage) } };
    default:
      return event satisfies never;
  }
}

export function routingMessage({ id, text, layers, experts, weights }: RoutedToken): object {
  const chosen = layers.length ? experts.length / layers.length : 0;
  const row = (all: Int32Array | Float32Array, l: number) => [...all.subarray(l * chosen, (l + 1) * chosen)];
  return { id, text, layers: layers.map((layer, l) => ({ layer, experts: row(experts, l), weights: row(weights, l) })) };
}

function usageMessage({ promptTokens, cachedTokens, completionTokens, reasoningTokens }: Usage): object {
  return {
    prompt_tokens: promptTokens,
    cached_tokens: cachedTokens,
    completion_tokens: completionTokens,
    reasoning_tokens: reasoningTokens,
  };
}
