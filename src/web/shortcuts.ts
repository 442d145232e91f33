/** The global keyboard shortcuts. Single letters are not used, since speech input and screen readers need them. */
import type { Word } from "./words.ts";

export type Shortcut = "stop" | "message" | "new" | "experts" | "settings" | "status" | "help";

/** All shortcuts, in the order of the help dialog. */
export const SHORTCUTS: readonly { readonly keys: readonly string[]; readonly word: Word }[] = [
  { keys: ["Enter"], word: "shortcutSend" },
  { keys: ["Shift", "Enter"], word: "shortcutLine" },
  { keys: ["Esc"], word: "shortcutStop" },
  { keys: ["Alt", "M"], word: "shortcutMessage" },
  { keys: ["Alt", "N"], word: "shortcutNew" },
  { keys: ["Alt", "X"], word: "shortcutRouting" },
  { keys: ["Alt", "G"], word: "shortcutSettings" },
  { keys: ["Alt", "T"], word: "shortcutStatus" },
  { keys: ["Alt", "H"], word: "shortcutHelp" },
];

const BY_CODE: Readonly<Record<string, Shortcut>> = {
  KeyM: "message",
  KeyN: "new",
  KeyX: "experts",
  KeyG: "settings",
  KeyT: "status",
  KeyH: "help",
};

/**
 * The shortcut of a key press; null for all other keys and while an input method is composing. Matches the physical key (`code`),
 * because with Alt some layouts produce another letter.
 */
export function shortcutOf({
  key,
  code,
  altKey,
  ctrlKey,
  metaKey,
  shiftKey,
  isComposing,
}: Pick<KeyboardEvent, "key" | "code" | "altKey" | "ctrlKey" | "metaKey" | "shiftKey" | "isComposing">): Shortcut | null {
  if (isComposing || ctrlKey || metaKey || shiftKey) return null;
  if (key === "Escape") return "stop";
  return altKey ? (BY_CODE[code] ?? null) : null;
}
