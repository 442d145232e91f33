/** What the user prefers of the page itself: language and colours, kept in this browser. Knows no conversation. */
import { LANGUAGES, type Language } from "./words.ts";

export const THEMES = ["auto", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

export interface Preferences {
  readonly language: Language;
  readonly theme: Theme;
}

const NAMES = { language: "mixtape.language", theme: "mixtape.theme" } as const;

/** What was chosen before, else what the browser is set to. */
export function readPreferences(): Preferences {
  const language = localStorage.getItem(NAMES.language);
  const theme = localStorage.getItem(NAMES.theme);
  return {
    language: language !== null && Object.hasOwn(LANGUAGES, language) ? (language as Language) : languageOf(navigator.languages),
    theme: THEMES.find((t) => t === theme) ?? "auto",
  };
}

/** The first of the browser's languages that the page speaks; English where there is none. */
export function languageOf(wanted: readonly string[]): Language {
  return wanted.map((tag) => tag.split("-", 1)[0].toLowerCase()).find((tag): tag is Language => Object.hasOwn(LANGUAGES, tag)) ?? "en";
}

/** Applies them to the document and keeps them. */
export function applyPreferences({ language, theme }: Preferences): void {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.documentElement.dataset["theme"] = theme;
  localStorage.setItem(NAMES.language, language);
  localStorage.setItem(NAMES.theme, theme);
}
