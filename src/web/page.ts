/** The context that every component uses: session, client, preferences and translated texts. */
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
  /** Announces a text to screen readers, without interrupting. */
  readonly announce: (text: string) => void;
}

export const PageContext = createContext<Page | null>(null);

export function usePage(): Page {
  const page = useContext(PageContext);
  if (!page) throw new Error("internal: a component is rendered outside of PageContext");
  return page;
}

/** The session's view; the component renders again whenever it changes. */
export function useView(session: Session): View {
  const [, draw] = useReducer((count: number) => count + 1, 0);
  useEffect(() => session.subscribe(() => draw(undefined as never)), [session]);
  return session.view;
}

/** Formats a number in the conventions of the language, with `digits` decimals. */
export function formatNumber(value: number, language: Language, digits = 0): string {
  return new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** `85 ms`, `1.2 s`. */
export function formatSeconds(seconds: number, language: Language): string {
  return seconds < 1 ? `${formatNumber(seconds * 1000, language)} ms` : `${formatNumber(seconds, language, 1)} s`;
}
