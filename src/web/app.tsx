/** The page's frame: chooses the view from the address (`#/c/ID`, `#/status`) and handles the global keyboard shortcuts. */
import type { ComponentType } from "preact";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Chat, type Panel } from "./chat.tsx";
import type { Client } from "./client.ts";
import { type Conversation, shownMessages } from "./conversation.ts";
import { Dialog } from "./dialog.tsx";
import { Experts } from "./experts.tsx";
import { KeyForm } from "./key.tsx";
import { type Page, PageContext, useView } from "./page.ts";
import { applyPreferences, type Preferences } from "./preferences.ts";
import type { Session } from "./session.ts";
import { Settings } from "./settings.tsx";
import { SHORTCUTS, shortcutOf } from "./shortcuts.ts";
import { Sidebar } from "./sidebar.tsx";
import type { Vault } from "./vault.ts";
import { sayIn } from "./words.ts";
export interface AppParts {
  readonly session: Session;
  readonly client: Client;
  readonly vault: Vault;
  readonly preferences: Preferences;
}

export function App({ session, client, vault, preferences: first }: AppParts) {
  const view = useView(session);
  const [preferences, setPreferences] = useState(first);
  const [address, setAddress] = useState(location.hash);
  const [draft, setDraft] = useState<Conversation>(() => session.create());
  const [panel, setPanel] = useState<Panel>(null);
  const [drawer, setDrawer] = useState(false);
  const [help, setHelp] = useState(false);
  const [selected, setSelected] = useState<string | null>(null);
  const spoken = useRef<HTMLDivElement>(null);
  const { language, theme } = preferences;

  const announce = useCallback((text: string) => {
    if (!spoken.current || text === "") return;
    const line = document.createElement("p");
    line.textContent = text;
    spoken.current.append(line);
    while (spoken.current.childElementCount > 8) spoken.current.firstElementChild?.remove();
  }, []);
  const page: Page = useMemo(
    () => ({ session, client, vault, language, theme, say: sayIn(language), announce }),
    [session, client, vault, language, theme, announce],
  );
  const { say } = page;

  useLayoutEffect(() => applyPreferences(preferences), [preferences]);
  useEffect(() => void session.load(), [session]);
  useEffect(() => {
    session.wantRouting = panel === "experts";
  }, [session, panel]);
  useEffect(() => {
    const moved = () => {
      setAddress(location.hash);
      setDrawer(false);
      setSelected(null);
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);

  const atStatus = address === "#/status";
  const wanted = /^#\/c\/([\w-]+)$/.exec(address)?.[1];
  const conversation = (wanted === undefined ? undefined : session.find(wanted)) ?? session.find(draft.id) ?? draft;

  const startNew = useCallback(() => {
    setDraft(session.create());
    location.hash = "#/";
    setDrawer(false);
    requestAnimationFrame(() => document.getElementById("message")?.focus());
  }, [session]);

  /** A conversation without messages lives only here; one with messages is saved. */
  const change = (next: Conversation) => (next.messages.length === 0 ? setDraft(next) : session.put(next));

  useEffect(() => {
    // A new conversation gets its address with its first message.
    if (!atStatus && conversation.messages.length > 0 && wanted !== conversation.id) location.replace(`#/c/${conversation.id}`);
    document.title = atStatus ? `${say("status")} · mixtape` : conversation.title ? `${conversation.title} · mixtape` : "mixtape";
  });

  useEffect(() => {
    const pressed = (event: KeyboardEvent) => {
      const shortcut = shortcutOf(event);
      if (shortcut === null || document.querySelector("dialog[open]")) return;
      switch (shortcut) {
        case "stop":
          if (session.view.running.has(conversation.id)) session.stop(conversation.id);
          else if (drawer) setDrawer(false);
          else if (panel) setPanel(null);
          else return;
          break;
        case "message":
          document.getElementById("message")?.focus();
          break;
        case "new":
          startNew();
          break;
        case "experts":
        case "settings":
          setPanel(panel === shortcut ? null : shortcut);
          break;
        case "status":
          location.hash = atStatus ? `#/c/${conversation.id}` : "#/status";
          break;
        case "help":
          setHelp(true);
          break;
        default:
          shortcut satisfies never;
      }
      event.preventDefault();
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  });

  const answers = shownMessages(conversation).filter((m) => m.role === "assistant");
  const traced = answers.find((m) => m.id === selected) ?? answers.at(-1) ?? null;

  return (
    <PageContext.Provider value={page}>
      {/* biome-ignore lint/a11y/useValidAnchor: a link, because screen readers list links; its action is in the handler */}
      <a class="skip" href="#main" onClick={skipToMain}>
        {say("skipToMain")}
      </a>
      <div class="frame" data-panel={atStatus ? undefined : (panel ?? undefined)}>
        <Sidebar
          open={drawer}
          current={atStatus ? null : conversation.id}
          atStatus={atStatus}
          preferences={preferences}
          onPreferences={setPreferences}
          onNew={startNew}
          onClose={() => setDrawer(false)}
          onHelp={() => setHelp(true)}
        />
        <main id="main" tabIndex={-1}>
          {view.connection === "key" && <KeyForm />}
          {atStatus ? (
            <StatusLater onMenu={() => setDrawer(true)} />
          ) : (
            view.loaded && (
              <Chat
                key={conversation.id}
                conversation={conversation}
                panel={panel}
                onPanel={setPanel}
                onChange={change}
                onMenu={() => setDrawer(true)}
                traced={panel === "experts" ? (traced?.id ?? null) : null}
                onTraced={setSelected}
              />
            )
          )}
        </main>
        {!atStatus && panel === "experts" && <Experts answer={traced} onClose={() => setPanel(null)} />}
        {!atStatus && panel === "settings" && (
          <Settings key={conversation.id} conversation={conversation} onChange={change} onClose={() => setPanel(null)} />
        )}
      </div>
      <div ref={spoken} class="unseen" aria-live="polite" />
      {help && (
        <Dialog title={say("shortcuts")} onClose={() => setHelp(false)}>
          <dl class="shortcuts">
            {SHORTCUTS.map(({ keys, word }) => (
              <div key={word}>
                <dt>
                  {keys.map((key) => (
                    <kbd key={key}>{key}</kbd>
                  ))}
                </dt>
                <dd>{say(word)}</dd>
              </div>
            ))}
          </dl>
        </Dialog>
      )}
    </PageContext.Provider>
  );
}

/** Loads the status page and its chart library on first use. */
function StatusLater({ onMenu }: { readonly onMenu: () => void }) {
  const [Status, setStatus] = useState<ComponentType<{ readonly onMenu: () => void }> | null>(null);
  useEffect(() => void import("./status.tsx").then((module) => setStatus(() => module.Status)), []);
  return Status && <Status onMenu={onMenu} />;
}

/** Moves the focus without following the link, which would replace the address of the current view. */
function skipToMain(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}
