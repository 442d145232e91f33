// Chat templates: renders messages, rejects conversations that a template would drop parts of, and ends a prompt inside its last
// message. Knows nothing of ids.
import { Template } from "@huggingface/jinja";
import { TokenizerError } from "./error.ts";
import { altered, isText, Marks, marked, type Passage, type Place, passagesOf } from "./marks.ts";
import type { ContentPart, Message } from "./message.ts";

export type { ContentPart, Message };

type Variables = Readonly<Record<string, unknown>>;

/** The most passages that are probed by a rendering of their own, so that the number of renderings has a bound. */
const MOST_PROBED = 16;

export class ChatTemplate {
  private readonly template: Template;
  private readonly takesParts: boolean;

  /** Throws `TokenizerError` if `source` is not a valid Jinja template. */
  constructor(source: string) {
    try {
      this.template = new Template(source);
    } catch (cause) {
      throw new TokenizerError(`chat template: ${reason(cause)}`, { cause });
    }
    this.takesParts = /\bfor\s+\w+\s+in\s+[\w.[\]'"]*content\b/.test(source);
  }

  /**
   * Renders a conversation. Throws `TokenizerError` if the template raises an error, if a message is malformed, or if the template would
   * silently drop the content of a message (the published ERNIE templates do so for the role `tool`).
   */
  render(messages: readonly Message[], variables: Variables): string {
    return this.checked(this.flat(messages), variables);
  }

  /**
   * Renders a conversation up to the end of its last message's text, for the model to continue. A mark behind that text shows what
   * the template writes before and after it. Throws `TokenizerError` as `render` does, and where that end cannot be told.
   */
  renderOpen(messages: readonly Message[], variables: Variables): string {
    const flat = this.flat(messages);
    const last = flat.at(-1);
    if (last === undefined) throw refusal("there is no message to continue");
    const said = textToContinue(last);
    const text = this.checked(flat, variables);

    const marks = new Marks();
    const base = said.trimEnd();
    const space = said.slice(base.length); // which the template may trim
    const probe = this.attempt([...flat.slice(0, -1), endingIn(last, base + marks.of(0))], variables);
    const pieces = marks.between(probe ?? "", 0);
    const after = pieces.pop() ?? "";
    if (pieces.length === 0) throw refusal(`the chat template does not write the end of the last message (${last.role})`);

    // The white space that the template keeps, wherever it writes the text.
    const kept = space.slice(0, Math.max(0, text.length - after.length - pieces.join("").length) / pieces.length);
    const exact = pieces.join(kept) + kept;
    if (text === exact + after) return exact;
    const before = pieces.join("");
    // What follows depends on the text, such as a full stop that the template adds.
    if (text.startsWith(before)) return text.startsWith(before + space) ? before + space : before;
    // The template leaves out a message without text: this is where its text would begin.
    if (base === "") return before;
    // What precedes depends on the text.
    if (text.endsWith(after)) return text.slice(0, text.length - after.length);
    throw refusal("the chat template changes the last message, so its end cannot be found in the rendered text");
  }

  /**
   * What the template writes of the last message behind the conversation before it and its generation prompt: the text that a model
   * has to write. Throws `TokenizerError` as `render` does, and where the rendered conversation does not begin with that prompt.
   */
  renderAnswer(messages: readonly Message[], variables: Variables): string {
    const prompt = this.render(messages.slice(0, -1), { ...variables, add_generation_prompt: true });
    const whole = this.render(messages, { ...variables, add_generation_prompt: false });
    if (whole.startsWith(prompt)) return whole.slice(prompt.length);
    let same = 0;
    while (prompt[same] === whole[same]) same++;
    const role = messages.at(-1)?.role;
    const [expected, written] = [prompt, whole].map((text) => JSON.stringify(text.slice(same, same + 40)));
    throw new TokenizerError(
      `the chat template does not begin message ${messages.length - 1} (${role}) as its generation prompt does: ${expected} against ${written}; ` +
        "a template that has the model think first needs the message's reasoning_content",
    );
  }

  /** Converts a message to the form that this template supports. Throws `TokenizerError` if it has unsupported parts. */
  private fitted(message: Message, index: number): Message {
    if (typeof message !== "object" || message === null || typeof message.role !== "string")
      throw new TokenizerError(`message ${index} has no role: ${JSON.stringify(message)}`);
    const { content } = message;
    if (content === undefined || content === null || typeof content === "string") return message;
    if (!Array.isArray(content))
      throw new TokenizerError(`message ${index} (${message.role}): content is neither text nor a list of parts`);
    if (this.takesParts) return message;
    const texts = (content as readonly ContentPart[]).map((part) => {
      if (part?.type === "text" && typeof part.text === "string") return part.text;
      throw new TokenizerError(
        `message ${index} (${message.role}): the chat template supports only text, not parts of type ${JSON.stringify(part?.type)}`,
      );
    });
    return { ...message, content: texts.join("\n") };
  }

  private flat(messages: readonly Message[]): Message[] {
    return messages.map((message, i) => this.fitted(message, i));
  }

  private checked(messages: readonly Message[], variables: Variables): string {
    let text: string;
    try {
      text = this.template.render({ ...variables, messages });
    } catch (cause) {
      const empty = messages.findIndex(({ content }) => content === undefined || content === null);
      if (empty >= 0)
        throw new TokenizerError(
          `message ${empty} (${messages[empty].role}): the chat template can't render it without content; give it a text, if need be an empty one`,
          { cause },
        );
      throw new TokenizerError(`chat template: ${reason(cause)}`, { cause });
    }
    this.refuseLoss(messages, variables, text);
    return text;
  }

  /**
   * A passage (a text, the name or the arguments of a call) is lost if it does not affect the rendered text. The number of renderings
   * does not grow with the conversation: one with a mark behind each text, one with a mark before those that did not show up
   * (templates may shorten them), one with marks in all calls. The few that remain, because the template rewrites them, are changed
   * one at a time; where many remain, the conversation is refused.
   */
  private refuseLoss(messages: readonly Message[], variables: Variables, text: string): void {
    const passages = messages.flatMap((message, index) => passagesOf(message, index));
    const texts = passages.filter(({ kind }) => kind === "text");
    const calls = passages.filter(({ kind }) => kind !== "text");
    const unseen = this.unseen(messages, this.unseen(messages, texts, variables, "end"), variables, "start");
    unseen.push(...this.unseen(messages, calls, variables, "end"));
    for (const passage of unseen.slice(0, MOST_PROBED))
      if (this.attempt(altered(messages, passage), variables) === text) throw lossError(messages, passage);
    if (unseen.length > MOST_PROBED) {
      const { index } = unseen[MOST_PROBED];
      throw new TokenizerError(
        `the chat template rewrites message ${index} (${messages[index].role}) and ${unseen.length - 1} other texts or calls so that it cannot be told whether it keeps them`,
      );
    }
  }

  /** Those of the passages whose mark the template does not write. */
  private unseen(messages: readonly Message[], passages: readonly Passage[], variables: Variables, at: Place): Passage[] {
    if (passages.length === 0) return [];
    const marks = new Marks();
    const rendered = this.attempt(marked(messages, passages, marks, at), variables);
    const seen = marks.in(rendered ?? "");
    return passages.filter((_, i) => !seen.has(i));
  }

  /** Renders changed messages; null if the template raises an error, which proves that it reads them. */
  private attempt(messages: readonly Message[], variables: Variables): string | null {
    try {
      return this.template.render({ ...variables, messages });
    } catch {
      return null;
    }
  }
}

/** The text that the model is to continue: the content, or its last part. */
function textToContinue({ role, content, tool_calls: calls }: Message): string {
  if (Array.isArray(calls) && calls.length > 0)
    throw refusal(`the last message (${role}) has tool calls, which would be lost: only a text can be continued`);
  if (!Array.isArray(content)) return (content as string | null | undefined) ?? "";
  const part = (content as readonly ContentPart[]).at(-1);
  if (part === undefined) return "";
  if (!isText(part))
    throw refusal(`the last message (${role}) ends with a part of type ${JSON.stringify(part?.type)}: only a text can be continued`);
  return part.text;
}

/** The message with another text in place of the one that `textToContinue` returns. */
function endingIn(message: Message, text: string): Message {
  const { content } = message;
  if (!Array.isArray(content) || content.length === 0) return { ...message, content: text };
  return { ...message, content: content.with(-1, { ...content.at(-1), text }) };
}

function refusal(why: string): TokenizerError {
  return new TokenizerError(`continue_final_message: ${why}`);
}

function lossError(messages: readonly Message[], { index, kind }: Passage): TokenizerError {
  const what = { text: "its content", name: "its tool calls", arguments: "the arguments of its tool calls" }[kind];
  return new TokenizerError(`the chat template drops message ${index} (${messages[index].role}): ${what} would be lost`);
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message.replace(/\s*\n\s*/g, " ") : String(cause);
}
