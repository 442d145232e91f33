/** User preferences of the page: language and theme, stored in this browser. Knows nothing of conversations. */
import { LANGUAGES, type Language } from "./words.ts";

export const THEMES = ["auto", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

export interface Preferences {
  readonly language: Language;
  readonly theme: Theme;
}

const NAMES = { language: "mixtape.language", theme: "mixtape.theme" } as const;

/** The saved preferences, else those of the browser. */
export function readPreferences(): Preferences {
  const language = localStorage.getItem(NAMES.language);
  const theme = localStorage.getItem(NAMES.theme);
  return {
    language: language !== null && Object.hasOwn(LANGUAGES, language) ? (language as Language) : languageOf(navigator.languages),
    theme: THEMES.find((t) => t === theme) ?? "auto",
  };
}

/** The first of the browser's languages that the page supports; English when it supports none. */
export function languageOf(wanted: readonly string[]): Language {
  return wanted.map((tag) => tag.split("-", 1)[0].toLowerCase()).find((tag): tag is Language => Object.hasOwn(LANGUAGES, tag)) ?? "en";
}

/** Applies the preferences to the document and saves them. */
export function applyPreferences({ language, theme }: Preferences): void {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.documentElement.dataset["theme"] = theme;
  localStorage.setItem(NAMES.language, language);
  localStorage.setItem(NAMES.theme, theme);
}
