/** One message, with its versions, what it cost, and its experts. */
import { useEffect, useRef, useState } from "preact/hooks";
import type { Say } from "./app.tsx";
import { Experts } from "./experts.tsx";
import { markdown } from "./markdown.ts";
import { type Conversation, type Node, showVersion, versionsOf } from "./store.ts";

export interface MessageProps {
  readonly say: Say;
  readonly node: Node;
  readonly conversation: Conversation;
  readonly writing: boolean;
  readonly busy: boolean;
  readonly showsRouting: boolean;
  onShow(next: Conversation): void;
  onEdit(text: string): void;
  onAgain(): void;
}

export function Message({ say, node, conversation, writing, busy, showsRouting, onShow, onEdit, onAgain }: MessageProps) {
  const [editing, setEditing] = useState<string | null>(null);
  const [copied, setCopied] = useState(false);
  const versions = versionsOf(conversation, node);
  const at = versions.indexOf(node);
  const mine = node.role === "user";

  async function copy(): Promise<void> {
    await navigator.clipboard.writeText(node.content);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  }

  return (
    <article class={mine ? "message mine" : "message"} aria-label={say(mine ? "you" : "assistant")} aria-busy={writing}>
      <h2 class="who">{say(mine ? "you" : "assistant")}</h2>
      {node.reasoning && (
        <details class="reasoning" open={writing && node.content === ""}>
          <summary>{say("reasoning")}</summary>
          <p>{node.reasoning}</p>
        </details>
      )}
      {editing !== null ? (
        <form
          class="editor"
          onSubmit={(e) => {
            e.preventDefault();
            onEdit(editing);
            setEditing(null);
          }}
        >
          <label>
            <span class="hidden">{say("edit")}</span>
            <textarea rows={3} value={editing} onInput={(e) => setEditing(e.currentTarget.value)} />
          </label>
          <div class="row">
            <button type="submit" class="primary">
              {say("save")}
            </button>
            <button type="button" onClick={() => setEditing(null)}>
              {say("cancel")}
            </button>
          </div>
        </form>
      ) : mine ? (
        <p class="plain">{node.content}</p>
      ) : (
        <Markdown text={node.content} />
      )}
      {node.calls?.map((call) => (
        <pre key={call.name} class="call">
          {say("toolCall")} {call.name}({call.arguments})
        </pre>
      ))}
      {writing && node.content === "" && <span class="cursor" aria-hidden="true" />}
      {node.error !== undefined && (
        <p class="error" role="alert">
          {say("failed")} {node.error}{" "}
          <button type="button" disabled={busy} onClick={onAgain}>
            {say("retry")}
          </button>
        </p>
      )}
      <footer class="meta">
        {versions.length > 1 && (
          <span class="versions">
            <button
              type="button"
              class="icon"
              aria-label={say("previous")}
              disabled={at === 0 || busy}
              onClick={() => onShow(showVersion(conversation, versions[at - 1]))}
            >
              ‹
            </button>
            <span role="img" aria-label={`${say("version")} ${at + 1} ${say("of")} ${versions.length}`}>
              {at + 1}/{versions.length}
            </span>
            <button
              type="button"
              class="icon"
              aria-label={say("next")}
              disabled={at === versions.length - 1 || busy}
              onClick={() => onShow(showVersion(conversation, versions[at + 1]))}
            >
              ›
            </button>
          </span>
        )}
        {node.stats && (
          <span class="stats">
            {node.stats.tokens} {say("tokens")} · {node.stats.perSecond.toFixed(0)} {say("perSecond")} · {say("firstToken")}{" "}
            {node.stats.firstMs.toFixed(0)} ms
          </span>
        )}
        {!writing && editing === null && (
          <span class="actions">
            <button type="button" onClick={() => void copy()}>
              {say(copied ? "copied" : "copy")}
            </button>
            {mine ? (
              <button type="button" disabled={busy} onClick={() => setEditing(node.content)}>
                {say("edit")}
              </button>
            ) : (
              <button type="button" disabled={busy} onClick={onAgain}>
                {say("regenerate")}
              </button>
            )}
          </span>
        )}
      </footer>
      {showsRouting && node.routing && node.routing.length > 0 && <Experts say={say} routing={node.routing} writing={writing} />}
    </article>
  );
}

function Markdown({ text }: { text: string }) {
  const at = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (at.current) at.current.innerHTML = markdown(text); // DOMPurify has been over it
  }, [text]);
  return <div class="markdown" ref={at} />;
}
