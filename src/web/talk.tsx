/** One conversation: its messages, the answer that is being written, and the controls of how it is written. */
import { useEffect, useRef, useState } from "preact/hooks";
import type { Say } from "./app.tsx";
import { Message } from "./message.tsx";
import { addNode, type Conversation, changeNode, type Node, pathOf, type Sampling } from "./store.ts";
import { chat, type Routing, WireError } from "./wire.ts";
import type { Word } from "./words.ts";

export interface TalkProps {
  readonly say: Say;
  readonly model: string;
  readonly conversation: Conversation;
  onChange(next: Conversation, keep: boolean): void;
  onUnauthorized(): void;
}

const FIELDS: readonly (readonly [keyof Sampling, Word])[] = [
  ["temperature", "temperature"],
  ["topP", "topP"],
  ["topK", "topK"],
  ["maxTokens", "maxTokens"],
  ["seed", "seed"],
  ["repetition", "repetition"],
];

export function Talk({ say, model, conversation, onChange, onUnauthorized }: TalkProps) {
  const [draft, setDraft] = useState("");
  const [settings, setSettings] = useState(false);
  const [showsRouting, setShowsRouting] = useState(false);
  const [spoken, setSpoken] = useState("");
  const [writing, setWriting] = useState<AbortController | null>(null);
  const latest = useRef(conversation);
  const end = useRef<HTMLDivElement>(null);
  const input = useRef<HTMLTextAreaElement>(null);
  latest.current = conversation;
  const path = pathOf(conversation);

  useEffect(() => input.current?.focus(), []);
  useEffect(() => () => writing?.abort(), [writing]);
  useEffect(() => {
    const stop = (e: KeyboardEvent) => e.key === "Escape" && writing?.abort();
    addEventListener("keydown", stop);
    return () => removeEventListener("keydown", stop);
  }, [writing]);
  useEffect(() => end.current?.scrollIntoView({ block: "end" }), [path.length, path.at(-1)?.content]);

  function update(next: Conversation, keep: boolean): void {
    latest.current = next;
    onChange(next, keep);
  }

  /** Writes an answer to the message `parent`, as a new version where there is one already. */
  async function answer(before: Conversation, parent: string): Promise<void> {
    const control = new AbortController();
    const id = crypto.randomUUID();
    const turns = pathOf({ ...before, leaf: parent }).map(({ role, content }) => ({ role, content }));
    setWriting(control);
    setSpoken("");
    update(addNode(before, { id, parent, role: "assistant", content: "" }), true);
    let [content, reasoning, tokens, firstMs] = ["", "", 0, 0];
    const calls: { name: string; arguments: string }[] = [];
    const routing: Routing[] = [];
    const start = performance.now();
    let painted = start;
    const shown = (): Partial<Node> => {
      const seconds = (performance.now() - start - firstMs) / 1000;
      return {
        content,
        ...(reasoning ? { reasoning } : {}),
        ...(calls.length ? { calls: [...calls] } : {}),
        ...(routing.length ? { routing: [...routing] } : {}),
        ...(tokens > 0 ? { stats: { tokens, firstMs, perSecond: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0 } } : {}),
      };
    };
    try {
      const messages = before.system ? [{ role: "system", content: before.system }, ...turns] : turns;
      for await (const delta of chat(
        { model, messages, ...controls(before.sampling), ...(showsRouting ? { routing: true } : {}) },
        control.signal,
      )) {
        if (delta.content || delta.reasoning || delta.calls) {
          if (tokens === 0) firstMs = performance.now() - start;
          tokens++;
        }
        content += delta.content ?? "";
        reasoning += delta.reasoning ?? "";
        for (const { index, name, arguments: args } of delta.calls ?? []) {
          calls[index] ??= { name: name ?? "", arguments: "" };
          calls[index] = { ...calls[index], arguments: calls[index].arguments + args };
        }
        routing.push(...(delta.routing ?? []));
        if (delta.tokens !== undefined) tokens = delta.tokens;
        if (performance.now() - painted < 40) continue; // paint as often as the eye follows
        painted = performance.now();
        update(changeNode(latest.current, id, shown()), false);
      }
      update(changeNode(latest.current, id, shown()), true);
      setSpoken(`${say("answered")} ${content}`);
    } catch (error) {
      if (error instanceof WireError && error.status === 401) onUnauthorized();
      const why = control.signal.aborted ? undefined : error instanceof WireError ? error.message : say("unreachable");
      update(changeNode(latest.current, id, { ...shown(), ...(why === undefined ? {} : { error: why }) }), true);
    } finally {
      setWriting(null);
      input.current?.focus();
    }
  }

  function ask(text: string, parent: string | null, before = conversation): void {
    if (text.trim() === "" || model === "" || writing) return;
    const node: Node = { id: crypto.randomUUID(), parent, role: "user", content: text };
    void answer(addNode(before, node), node.id);
  }

  function send(): void {
    if (draft.trim() === "" || model === "" || writing) return;
    ask(draft, conversation.leaf);
    setDraft("");
  }

  return (
    <section class="talk" aria-label={say("chat")}>
      <div class="messages">
        {path.length === 0 && <p class="empty">{say("empty")}</p>}
        {path.map((node) => (
          <Message
            key={node.id}
            say={say}
            node={node}
            conversation={conversation}
            writing={writing !== null && node.id === conversation.leaf}
            busy={writing !== null}
            showsRouting={showsRouting}
            onShow={(next) => update(next, true)}
            onEdit={(text) => ask(text, node.parent)}
            onAgain={() => node.parent !== null && void answer(conversation, node.parent)}
          />
        ))}
        <div ref={end} />
      </div>
      <p class="hidden" aria-live="polite">
        {spoken}
      </p>
      {settings && (
        <div class="settings" id="settings">
          <label class="wide">
            {say("system")}
            <textarea
              rows={2}
              value={conversation.system}
              onInput={(e) => update({ ...conversation, system: e.currentTarget.value }, true)}
            />
          </label>
          {FIELDS.map(([field, word]) => (
            <label key={field}>
              {say(word)}
              <input
                type="number"
                step="any"
                placeholder={say("byModel")}
                value={conversation.sampling[field]}
                onInput={(e) => update({ ...conversation, sampling: { ...conversation.sampling, [field]: e.currentTarget.value } }, true)}
              />
            </label>
          ))}
        </div>
      )}
      <form
        class="composer"
        onSubmit={(e) => {
          e.preventDefault();
          send();
        }}
      >
        <label class="grow">
          <span class="hidden">{say("message")}</span>
          <textarea
            ref={input}
            rows={2}
            value={draft}
            placeholder={say("placeholder")}
            onInput={(e) => setDraft(e.currentTarget.value)}
            onKeyDown={(e) => {
              if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
              e.preventDefault();
              send();
            }}
          />
        </label>
        <div class="row">
          <button type="button" aria-expanded={settings} aria-controls="settings" onClick={() => setSettings(!settings)}>
            {say("settings")}
          </button>
          <button type="button" aria-pressed={showsRouting} onClick={() => setShowsRouting(!showsRouting)}>
            {say("routing")}
          </button>
          <span class="grow" />
          {writing ? (
            <button type="button" class="primary" onClick={() => writing.abort()}>
              {say("stop")}
            </button>
          ) : (
            <button type="submit" class="primary" disabled={draft.trim() === "" || model === ""}>
              {say("send")}
            </button>
          )}
        </div>
      </form>
    </section>
  );
}

/** Fields that were filled in, under the names of the API. */
function controls({ temperature, topP, topK, maxTokens, seed, repetition }: Sampling): Record<string, number> {
  const fields = { temperature, top_p: topP, top_k: topK, max_tokens: maxTokens, seed, repetition_penalty: repetition };
  return Object.fromEntries(Object.entries(fields).flatMap(([name, value]) => (value === "" ? [] : [[name, Number(value)]])));
}
