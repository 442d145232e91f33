/** One message and its actions. The model's text is shown as sanitised Markdown, the user's verbatim. */

import { useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { copyText } from "./clipboard.ts";
import { fitHeight } from "./composer.tsx";
import { type Conversation, type Figures, type Message, show, siblings } from "./conversation.ts";
import { Icon, type IconName } from "./icons.tsx";
import { clean, renderBlocks } from "./markdown.ts";
import { memo } from "./memo.ts";
import { formatNumber, formatSeconds, usePage } from "./page.ts";

export interface MessageParts {
  readonly conversation: Conversation;
  readonly message: Message;
  /** Whether an answer is being generated in this conversation, so that no other can start. */
  readonly busy: boolean;
  readonly waitUntil: number | null;
  /** Whether this answer's experts are shown. */
  readonly traced: boolean;
  /** Shows this answer's experts; null while the routing view is closed. */
  readonly onTraced: (() => void) | null;
}

export function MessageView({ conversation, message, busy, waitUntil, traced, onTraced }: MessageParts) {
  const { session, say } = usePage();
  const [editing, setEditing] = useState(false);
  const mine = message.role === "user";
  const writing = message.end === null;
  return (
    <li class={mine ? "message mine" : "message"} data-traced={traced || undefined}>
      <h3 class="unseen">{say(mine ? "you" : "assistant")}</h3>
      {message.reasoning !== "" && (
        <details class="reasoning" open={writing && message.content === ""}>
          <summary>{say("reasoning")}</summary>
          <p>{message.reasoning}</p>
        </details>
      )}
      {editing ? (
        <Editor
          message={message}
          onDone={(text) => {
            setEditing(false);
            if (text !== null && text.trim() !== "" && text !== message.content) session.edit(conversation, message, text);
          }}
        />
      ) : mine ? (
        <p class="said">{message.content}</p>
      ) : (
        <Markdown text={message.content} />
      )}
      {message.toolCalls.map((call, i) => (
        <div class="tool" key={i}>
          <p class="tool-name">{say("toolCall", { name: call.name })}</p>
          {/* biome-ignore lint/a11y/noNoninteractiveTabindex: scrollable regions must be focusable to scroll by keyboard */}
          <pre tabIndex={0}>{indented(call.arguments)}</pre>
        </div>
      ))}
      {writing && waitUntil === null && <span class="caret" role="img" aria-label={say("writing")} />}
      {waitUntil !== null && <Waiting until={waitUntil} />}
      {message.end === "failed" && (
        <div class="notice failure row between" role="alert">
          <span>
            <Icon name="alert" /> {say("failed", { reason: message.error ?? "" })}
          </span>
          <button type="button" disabled={busy} onClick={() => session.retry(conversation, message)}>
            {say("retry")}
          </button>
        </div>
      )}
      {!editing && (
        <footer class="foot">
          <Branches conversation={conversation} message={message} />
          {!writing && (
            <>
              <Copy text={message.content} />
              <Act icon="edit" label={say("edit")} disabled={busy} onClick={() => setEditing(true)} />
              {!mine && (
                <Act icon="again" label={say("regenerate")} disabled={busy} onClick={() => session.regenerate(conversation, message)} />
              )}
              {!mine && onTraced && <Act icon="experts" label={say("routingTitle")} pressed={traced} onClick={onTraced} />}
            </>
          )}
          {!mine && <Facts message={message} />}
        </footer>
      )}
    </li>
  );
}

function Markdown({ text }: { readonly text: string }) {
  const { say, announce } = usePage();
  const blocks = useMemo(() => renderBlocks(text), [text]);
  return (
    <div class="prose">
      {blocks.map((html, i) => (
        <Block key={i} html={html} copyLabel={say("copyCode")} copiedLabel={say("copied")} announce={announce} />
      ))}
    </div>
  );
}

interface BlockParts {
  readonly html: string;
  readonly copyLabel: string;
  readonly copiedLabel: string;
  readonly announce: (text: string) => void;
}

/** Renders again only when its HTML has changed. Copy buttons are added here, after sanitising, so that model text cannot forge one. */
const Block = memo(({ html, copyLabel, copiedLabel, announce }: BlockParts) => {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    if (!element.current) return;
    // The only place where the page inserts HTML; `clean` has sanitised it.
    element.current.innerHTML = clean(html);
    for (const code of element.current.querySelectorAll(".code")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "quiet";
      button.textContent = copyLabel;
      button.addEventListener("click", async () => {
        if (!(await copyText(code.querySelector("code")?.textContent ?? ""))) return;
        button.textContent = copiedLabel;
        announce(copiedLabel);
        setTimeout(() => (button.textContent = copyLabel), 1500);
      });
      code.querySelector(".code-bar")?.append(button);
    }
  }, [html, copyLabel, copiedLabel, announce]);
  return <div ref={element} class="block" />;
});

interface ActParts {
  readonly icon: IconName;
  readonly label: string;
  readonly disabled?: boolean;
  readonly pressed?: boolean;
  readonly onClick: () => void;
}

function Act({ icon, label, disabled, pressed, onClick }: ActParts) {
  return (
    <button
      type="button"
      class="quiet square act"
      aria-label={label}
      title={label}
      aria-pressed={pressed}
      disabled={disabled}
      onClick={onClick}
    >
      <Icon name={icon} />
    </button>
  );
}

function Copy({ text }: { readonly text: string }) {
  const { say, announce } = usePage();
  const [copied, setCopied] = useState(false);
  return (
    <Act
      icon={copied ? "check" : "copy"}
      label={say(copied ? "copied" : "copy")}
      onClick={async () => {
        if (!(await copyText(text))) return;
        setCopied(true);
        announce(say("copied"));
        setTimeout(() => setCopied(false), 1500);
      }}
    />
  );
}

/** Shows which branch is visible, with buttons to switch to its siblings. */
function Branches({ conversation, message }: Pick<MessageParts, "conversation" | "message">) {
  const { session, say } = usePage();
  const all = siblings(conversation, message);
  if (all.length < 2) return null;
  const at = all.findIndex((m) => m.id === message.id);
  const go = (to: number) => session.put(show(session.find(conversation.id) ?? conversation, all[to]));
  return (
    <span class="branches">
      <span class="unseen">{say("branch", { index: at + 1, count: all.length })}</span>
      <Act icon="left" label={say("branchPrevious")} disabled={at === 0} onClick={() => go(at - 1)} />
      <span aria-hidden="true">
        {at + 1}/{all.length}
      </span>
      <Act icon="right" label={say("branchNext")} disabled={at === all.length - 1} onClick={() => go(at + 1)} />
    </span>
  );
}

/** How the answer ended, and its token counts and timing. */
function Facts({ message: { end, figures } }: Pick<MessageParts, "message">) {
  const { say } = usePage();
  return (
    <span class="facts">
      {end === "stopped" && <span>{say("stopped")}</span>}
      {end === "length" && <span>{say("cutAtLength")}</span>}
      {figures && <Speed {...figures} />}
    </span>
  );
}

function Speed({ completionTokens, tokensPerSecond, firstTokenSeconds, cachedTokens, promptTokens }: Figures) {
  const { say, language } = usePage();
  const number = (value: number, digits = 0) => formatNumber(value, language, digits);
  return (
    <>
      <span>{say("figureTokens", { count: number(completionTokens) })}</span>
      {tokensPerSecond > 0 && <span class="rate">{say("figureRate", { rate: number(tokensPerSecond, 1) })}</span>}
      <span>{say("figureFirst", { time: formatSeconds(firstTokenSeconds, language) })}</span>
      {cachedTokens > 0 && <span>{say("figureCached", { cached: number(cachedTokens), prompt: number(promptTokens) })}</span>}
    </>
  );
}

/** Counts down to the next attempt. */
function Waiting({ until }: { readonly until: number }) {
  const { say } = usePage();
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 250);
    return () => clearInterval(timer);
  }, []);
  return (
    <p class="notice" role="status">
      {say("waiting", { seconds: Math.max(0, Math.ceil((until - now) / 1000)) })}
    </p>
  );
}

/** @param onDone called with the new text, or with null when the edit is cancelled */
function Editor({ message, onDone }: { readonly message: Message; readonly onDone: (text: string | null) => void }) {
  const { say } = usePage();
  const id = useId();
  const [text, setText] = useState(message.content);
  const field = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    field.current?.focus();
    field.current?.setSelectionRange(message.content.length, message.content.length);
  }, []);
  useLayoutEffect(() => fitHeight(field.current), [text]);
  return (
    <form
      class="editor"
      onSubmit={(event) => {
        event.preventDefault();
        onDone(text);
      }}
    >
      <textarea
        ref={field}
        aria-label={say("edit")}
        aria-describedby={id}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.isComposing) return;
          if (event.key === "Escape") {
            event.stopPropagation();
            onDone(null);
          } else if (event.key === "Enter" && !event.shiftKey && message.role === "user") {
            event.preventDefault();
            onDone(text);
          }
        }}
      />
      <p class="hint" id={id}>
        {say("editHint")}
      </p>
      <div class="row end">
        <button type="button" onClick={() => onDone(null)}>
          {say("cancel")}
        </button>
        <button type="submit" class="primary">
          {say(message.role === "user" ? "editSend" : "editSave")}
        </button>
      </div>
    </form>
  );
}

/** Indents JSON; returns any other text unchanged. */
function indented(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
