/** The assistant's message, as OpenAI's clients know it, collected from a reply's events. Knows no tokens and no protocol. */
import type { ReplyEvent } from "./reply.ts";

export interface ToolCall {
  readonly id: string;
  readonly type: "function";
  /** `arguments` is JSON text. */
  readonly function: { readonly name: string; readonly arguments: string };
}

export interface AssistantMessage {
  readonly role: "assistant";
  /** Null when there are only calls. */
  readonly content: string | null;
  /** Absent when the model did not reason. */
  readonly reasoning_content?: string;
  /** Absent when the model called no tool. */
  readonly tool_calls?: readonly ToolCall[];
}

export class MessageBuilder {
  #content = "";
  #reasoning = "";
  readonly #calls: { id: string; name: string; arguments: string }[] = [];

  take(event: ReplyEvent): void {
    switch (event.kind) {
      case "text":
        if (event.channel === "answer") this.#content += event.text;
        else this.#reasoning += event.text;
        break;
      case "toolCall": {
        const call = this.#calls[event.index] ?? { id: event.id ?? "", name: event.name ?? "", arguments: "" };
        call.arguments += event.arguments;
        this.#calls[event.index] = call;
        break;
      }
      default:
        event satisfies never;
    }
  }

  /** The message so far. */
  get message(): AssistantMessage {
    const calls = this.#calls.map(
      ({ id, name, arguments: args }): ToolCall => ({ id, type: "function", function: { name, arguments: args } }),
    );
    return {
      role: "assistant",
      content: this.#content === "" && calls.length > 0 ? null : this.#content,
      ...(this.#reasoning ? { reasoning_content: this.#reasoning } : {}),
      ...(calls.length ? { tool_calls: calls } : {}),
    };
  }
}
