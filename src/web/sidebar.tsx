/** The sidebar: the list of conversations and the page-wide controls. A drawer on narrow screens. */
import { useEffect, useRef, useState } from "preact/hooks";
import type { Conversation } from "./conversation.ts";
import { Dialog } from "./dialog.tsx";
import { readConversations, writeConversations } from "./exchange.ts";
import { Icon, Mark } from "./icons.tsx";
import { usePage, useView } from "./page.ts";
import { type Preferences, THEMES, type Theme } from "./preferences.ts";
import { LANGUAGES, type Language, type Word } from "./words.ts";

const THEME_WORDS: Readonly<Record<Theme, Word>> = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };

export interface SidebarParts {
  readonly open: boolean;
  /** Id of the visible conversation. */
  readonly current: string | null;
  readonly atStatus: boolean;
  readonly preferences: Preferences;
  readonly onPreferences: (preferences: Preferences) => void;
  readonly onNew: () => void;
  readonly onClose: () => void;
  readonly onHelp: () => void;
}

export function Sidebar({ open, current, atStatus, preferences, onPreferences, onNew, onClose, onHelp }: SidebarParts) {
  const { session, say } = usePage();
  const { conversations, running } = useView(session);
  const [renaming, setRenaming] = useState<Conversation | null>(null);
  const [removing, setRemoving] = useState<Conversation | null>(null);
  const closer = useRef<HTMLButtonElement>(null);
  useEffect(() => {
    if (!open) return;
    const before = document.activeElement;
    closer.current?.focus();
    return () => {
      if (before instanceof HTMLElement) before.focus();
    };
  }, [open]);

  return (
    <>
      {open && <button type="button" class="veil" tabIndex={-1} aria-label={say("close")} onClick={onClose} />}
      <header class="side" data-open={open || undefined}>
        <div class="brand">
          <Mark />
          <h1>mixtape</h1>
          <button ref={closer} type="button" class="quiet square only-narrow" aria-label={say("close")} onClick={onClose}>
            <Icon name="close" />
          </button>
        </div>
        <button type="button" class="wide new-chat" onClick={onNew}>
          <Icon name="plus" /> {say("newChat")}
        </button>
        <nav class="talks" aria-label={say("conversations")}>
          {conversations.length === 0 && <p class="quiet-text">{say("noConversations")}</p>}
          <ul>
            {conversations.map((c) => {
              const title = c.title || say("untitled");
              return (
                <li key={c.id} class="talk" data-current={c.id === current || undefined}>
                  <a href={`#/c/${c.id}`} title={title} aria-current={c.id === current ? "page" : undefined}>
                    {running.has(c.id) && <span class="pulse" role="img" aria-label={say("writing")} />}
                    <span class="cut">{title}</span>
                  </a>
                  <button
                    type="button"
                    class="quiet square"
                    aria-label={say("renameOf", { title })}
                    title={say("rename")}
                    onClick={() => setRenaming(c)}
                  >
                    <Icon name="edit" />
                  </button>
                  <button
                    type="button"
                    class="quiet square"
                    aria-label={say("removeOf", { title })}
                    title={say("remove")}
                    onClick={() => setRemoving(c)}
                  >
                    <Icon name="trash" />
                  </button>
                </li>
              );
            })}
          </ul>
        </nav>
        <div class="side-foot">
          <a class="side-link" href="#/status" aria-current={atStatus ? "page" : undefined}>
            <Icon name="status" /> {say("status")}
          </a>
          <button type="button" class="quiet side-link" onClick={onHelp}>
            <Icon name="keyboard" /> {say("shortcuts")}
          </button>
          <Exchange />
          <div class="row between">
            <Choice
              label={say("language")}
              name="language"
              value={preferences.language}
              options={(Object.keys(LANGUAGES) as Language[]).map((value) => ({ value, label: LANGUAGES[value] }))}
              onChange={(language) => onPreferences({ ...preferences, language })}
            />
            <Choice
              label={say("theme")}
              name="theme"
              value={preferences.theme}
              options={THEMES.map((value) => ({ value, label: say(THEME_WORDS[value]), icon: value }))}
              onChange={(theme) => onPreferences({ ...preferences, theme })}
            />
          </div>
        </div>
      </header>
      {renaming && <Rename conversation={renaming} onClose={() => setRenaming(null)} />}
      {removing && (
        <Dialog title={say("removeQuestion")} onClose={() => setRemoving(null)}>
          <p>{say("removeConsequence", { title: removing.title || say("untitled") })}</p>
          <div class="row end">
            <button type="button" onClick={() => setRemoving(null)}>
              {say("cancel")}
            </button>
            <button
              type="button"
              class="danger"
              onClick={() => {
                void session.remove(removing.id);
                setRemoving(null);
                if (removing.id === current) onNew();
              }}
            >
              {say("remove")}
            </button>
          </div>
        </Dialog>
      )}
    </>
  );
}

function Rename({ conversation, onClose }: { readonly conversation: Conversation; readonly onClose: () => void }) {
  const { session, say } = usePage();
  const [title, setTitle] = useState(conversation.title);
  return (
    <Dialog title={say("renameOf", { title: conversation.title || say("untitled") })} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          session.put({ ...(session.find(conversation.id) ?? conversation), title: title.trim() });
          onClose();
        }}
      >
        <label>
          {say("title")}
          <input class="wide" maxLength={200} required value={title} onInput={(event) => setTitle(event.currentTarget.value)} />
        </label>
        <div class="row end">
          <button type="button" onClick={onClose}>
            {say("cancel")}
          </button>
          <button type="submit" class="primary">
            {say("save")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

/** Export to a file, and import from one. */
function Exchange() {
  const { session, say, announce } = usePage();
  const [outcome, setOutcome] = useState<{ readonly bad: boolean; readonly text: string } | null>(null);
  const picker = useRef<HTMLInputElement>(null);
  const { conversations } = session.view;

  function save(): void {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([writeConversations(conversations)], { type: "application/json" }));
    link.download = `mixtape-${new Date().toISOString().slice(0, 10)}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  async function open(file: File): Promise<void> {
    try {
      const added = readConversations(await file.text());
      for (const conversation of added) session.put(conversation);
      setOutcome({ bad: false, text: say("imported", { count: added.length }) });
      announce(say("imported", { count: added.length }));
    } catch (error) {
      setOutcome({ bad: true, text: say("importFailed", { reason: (error as Error).message }) });
    }
  }

  return (
    <>
      <div class="row halves">
        <button type="button" class="quiet side-link" disabled={conversations.length === 0} title={say("exportAllHint")} onClick={save}>
          <Icon name="save" /> {say("exportAll")}
        </button>
        <button type="button" class="quiet side-link" title={say("importAllHint")} onClick={() => picker.current?.click()}>
          <Icon name="open" /> {say("importAll")}
        </button>
        <input
          ref={picker}
          class="unseen"
          type="file"
          accept="application/json,.json"
          tabIndex={-1}
          aria-label={say("importAllHint")}
          onChange={(event) => {
            const file = event.currentTarget.files?.[0];
            event.currentTarget.value = "";
            if (file) void open(file);
          }}
        />
      </div>
      {outcome && (
        <p class={outcome.bad ? "bad small" : "quiet-text small"} role={outcome.bad ? "alert" : undefined}>
          {outcome.text}
        </p>
      )}
    </>
  );
}

interface ChoiceParts<T extends string> {
  readonly label: string;
  readonly name: string;
  readonly value: T;
  readonly options: readonly { readonly value: T; readonly label: string; readonly icon?: Theme }[];
  readonly onChange: (value: T) => void;
}

/** A segmented control: radio buttons, so the arrow keys move between them. */
function Choice<T extends string>({ label, name, value, options, onChange }: ChoiceParts<T>) {
  return (
    <fieldset class="choice">
      <legend class="unseen">{label}</legend>
      {options.map((option) => (
        <label key={option.value} title={option.label}>
          <input
            class="unseen"
            type="radio"
            name={name}
            value={option.value}
            checked={option.value === value}
            onChange={() => onChange(option.value)}
          />
          <span class="choice-face">
            {option.icon ? (
              <>
                <Icon name={option.icon} />
                <span class="unseen">{option.label}</span>
              </>
            ) : (
              option.label
            )}
          </span>
        </label>
      ))}
    </fieldset>
  );
}
