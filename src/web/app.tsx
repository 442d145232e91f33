/** The page: its frame, which conversation is shown, language and theme. What is said in one is in `talk.tsx`. */
import { useEffect, useMemo, useState } from "preact/hooks";
import { Status } from "./status.tsx";
import { type Conversation, emptyConversation, exported, loadAll, parseExport, remove, save } from "./store.ts";
import { Talk } from "./talk.tsx";
import { apiKey, models, setApiKey, WireError } from "./wire.ts";
import { LANGUAGES, type Language, preferredLanguage, type Word } from "./words.ts";

export type Say = (word: Word) => string;
type Theme = "auto" | "light" | "dark";

export function App() {
  const [language, setLanguage] = useState<Language>(preferredLanguage);
  const [theme, setTheme] = useState<Theme>((localStorage.getItem("theme") as Theme | null) ?? "auto");
  const [view, setView] = useState<"chat" | "status">("chat");
  const [menu, setMenu] = useState(false);
  const [names, setNames] = useState<readonly string[]>([]);
  const [model, setModel] = useState("");
  const [needsKey, setNeedsKey] = useState(false);
  const [notice, setNotice] = useState("");
  const [all, setAll] = useState<readonly Conversation[]>([]);
  const [current, setCurrent] = useState<Conversation>(emptyConversation);
  const say: Say = useMemo(() => (word) => LANGUAGES[language][word], [language]);

  useEffect(() => {
    document.documentElement.lang = language;
    localStorage.setItem("language", language);
  }, [language]);
  useEffect(() => {
    document.documentElement.dataset["theme"] = theme;
    localStorage.setItem("theme", theme);
  }, [theme]);
  useEffect(() => {
    void loadAll().then((found) => {
      setAll(found);
      if (found[0]) setCurrent(found[0]);
    });
    void findModels();
  }, []);

  async function findModels(): Promise<void> {
    try {
      const found = await models();
      setNames(found);
      setModel((m) => (found.includes(m) ? m : (found[0] ?? "")));
      setNeedsKey(false);
      setNotice("");
    } catch (error) {
      if (error instanceof WireError && error.status === 401) setNeedsKey(true);
      else setNotice("unreachable");
    }
  }

  /** Shows a conversation's newest state, and keeps it once it has anything in it. */
  function change(next: Conversation, keep: boolean): void {
    setCurrent(next);
    setAll((list) => [next, ...list.filter((c) => c.id !== next.id)].filter((c) => c.nodes.length > 0));
    if (keep && next.nodes.length > 0) save(next).catch(() => setNotice("storageFull"));
  }

  function open(conversation: Conversation): void {
    setCurrent(conversation);
    setView("chat");
    setMenu(false);
  }

  async function drop(conversation: Conversation): Promise<void> {
    await remove(conversation.id);
    setAll((list) => list.filter((c) => c.id !== conversation.id));
    if (conversation.id === current.id) setCurrent(emptyConversation());
  }

  function download(): void {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([exported(all)], { type: "application/json" }));
    link.download = "mixtape-conversations.json";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  async function upload(file: File | undefined): Promise<void> {
    const found = file ? parseExport(await file.text()) : null;
    if (!found) return setNotice("badFile");
    for (const conversation of found) await save(conversation);
    setAll(await loadAll());
  }

  return (
    <div class="frame">
      <a class="skip" href="#main">
        {say("skip")}
      </a>
      <header class="bar">
        <button
          type="button"
          class="icon menu"
          aria-label={say("menu")}
          aria-expanded={menu}
          aria-controls="side"
          onClick={() => setMenu(!menu)}
        >
          ☰
        </button>
        <h1 class="brand">mixtape</h1>
        <nav aria-label={say("menu")}>
          {(["chat", "status"] as const).map((name) => (
            <button type="button" key={name} class="tab" aria-current={view === name ? "page" : undefined} onClick={() => setView(name)}>
              {say(name)}
            </button>
          ))}
        </nav>
        <label class="quiet">
          <span class="hidden">{say("model")}</span>
          <select value={model} onChange={(e) => setModel(e.currentTarget.value)}>
            {names.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
      </header>
      <aside id="side" class={menu ? "side open" : "side"} aria-label={say("conversations")}>
        <button type="button" class="primary wide" onClick={() => open(emptyConversation())}>
          {say("newChat")}
        </button>
        <ul class="list">
          {all.map((c) => (
            <li key={c.id} class={c.id === current.id ? "item current" : "item"}>
              <button type="button" class="title" aria-current={c.id === current.id ? "true" : undefined} onClick={() => open(c)}>
                {c.title || say("newChat")}
              </button>
              <button
                type="button"
                class="icon"
                aria-label={`${say("rename")}: ${c.title}`}
                onClick={() => {
                  const title = prompt(say("rename"), c.title);
                  if (title) change({ ...c, title }, true);
                }}
              >
                ✎
              </button>
              <button type="button" class="icon" aria-label={`${say("remove")}: ${c.title}`} onClick={() => void drop(c)}>
                ×
              </button>
            </li>
          ))}
        </ul>
        <div class="foot">
          <div class="row">
            <button type="button" onClick={download} disabled={all.length === 0}>
              {say("exportAll")}
            </button>
            <label class="button">
              {say("importAll")}
              <input class="hidden" type="file" accept="application/json" onChange={(e) => void upload(e.currentTarget.files?.[0])} />
            </label>
          </div>
          <label>
            {say("language")}
            <select value={language} onChange={(e) => setLanguage(e.currentTarget.value as Language)}>
              <option value="en">English</option>
              <option value="zh">中文</option>
            </select>
          </label>
          <label>
            {say("theme")}
            <select value={theme} onChange={(e) => setTheme(e.currentTarget.value as Theme)}>
              {(["auto", "light", "dark"] as const).map((name) => (
                <option key={name} value={name}>
                  {say(name)}
                </option>
              ))}
            </select>
          </label>
        </div>
      </aside>
      <main id="main" tabIndex={-1}>
        {notice && (
          <p class="notice" role="alert">
            {say(notice as Word)}
          </p>
        )}
        {needsKey && <KeyForm say={say} onKey={() => void findModels()} />}
        {view === "status" ? (
          <Status say={say} />
        ) : (
          <Talk
            key={current.id}
            say={say}
            model={model}
            conversation={current}
            onChange={change}
            onUnauthorized={() => setNeedsKey(true)}
          />
        )}
      </main>
    </div>
  );
}

function KeyForm({ say, onKey }: { say: Say; onKey: () => void }) {
  const [key, setKey] = useState(apiKey);
  const [keep, setKeep] = useState(false);
  return (
    <form
      class="notice"
      onSubmit={(e) => {
        e.preventDefault();
        setApiKey(key, keep);
        onKey();
      }}
    >
      <p>{say("apiKeyNeeded")}</p>
      <label>
        {say("apiKey")}
        <input type="password" autocomplete="off" value={key} onInput={(e) => setKey(e.currentTarget.value)} />
      </label>
      <label class="check">
        <input type="checkbox" checked={keep} onChange={(e) => setKeep(e.currentTarget.checked)} />
        {say("remember")}
      </label>
      <button type="submit" class="primary">
        {say("send")}
      </button>
    </form>
  );
}
