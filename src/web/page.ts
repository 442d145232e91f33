/** What every part of the page is given: what there is to show, and words to show it with. */
import { createContext } from "preact";
import { useContext, useEffect, useReducer } from "preact/hooks";
import type { Client } from "./client.ts";
import type { Theme } from "./preferences.ts";
import type { Session, View } from "./session.ts";
import type { Vault } from "./vault.ts";
import type { Language, Say } from "./words.ts";

export interface Page {
  readonly session: Session;
  readonly client: Client;
  readonly vault: Vault;
  readonly language: Language;
  readonly theme: Theme;
  readonly say: Say;
  /** Tells a screen reader, politely. */
  readonly announce: (text: string) => void;
}

export const PageContext = createContext<Page | null>(null);

export function usePage(): Page {
  const page = useContext(PageContext);
  if (!page) throw new Error("internal: a part of the page is drawn outside of it");
  return page;
}

/** The session's view, drawn again whenever it changes. */
export function useView(session: Session): View {
  const [, draw] = useReducer((count: number) => count + 1, 0);
  useEffect(() => session.subscribe(() => draw(undefined as never)), [session]);
  return session.view;
}

/** Numbers as the language writes them, with so many digits behind the point. */
export function formatNumber(value: number, language: Language, digits = 0): string {
  return new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** `85 ms`, `1.2 s`. */
export function formatSeconds(seconds: number, language: Language): string {
  return seconds < 1 ? `${formatNumber(seconds * 1000, language)} ms` : `${formatNumber(seconds, language, 1)} s`;
}
