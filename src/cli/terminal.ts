/** Terminal output: colours, width, and how many columns a text takes. */
import pc from "picocolors";

/** Colours for a stream: none when it is not a terminal or NO_COLOR is set; FORCE_COLOR turns them on anyway. */
export function colours(stream: NodeJS.WriteStream): ReturnType<typeof pc.createColors> {
  return pc.createColors(hasColours(stream));
}

export function hasColours(stream: NodeJS.WriteStream): boolean {
  if (process.env["NO_COLOR"]) return false;
  return Boolean(process.env["FORCE_COLOR"]) || (stream.isTTY === true && process.env["TERM"] !== "dumb");
}

/** Writes a message that is not data to standard error. */
export function notice(text: string): void {
  process.stderr.write(`${colours(process.stderr).dim(text)}\n`);
}

/** Columns of standard output; 100 where it is not a terminal. */
export function terminalWidth(): number {
  return process.stdout.columns || Number(process.env["COLUMNS"]) || 100;
}

const WIDE =
  /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\ua960-\ua97f\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|\p{Emoji_Presentation}/u;
const NARROWLESS = /[\p{Mn}\p{Me}\p{Cf}]/u;

/** Columns that a text takes: two for each Chinese, Japanese or Korean character, none for combining marks. */
export function displayWidth(text: string): number {
  let width = 0;
  for (const c of text) width += NARROWLESS.test(c) ? 0 : WIDE.test(c) || (c.codePointAt(0) ?? 0) >= 0x20000 ? 2 : 1;
  return width;
}

/** A text as one line of at most `columns`, truncated with an ellipsis. */
export function excerpt(text: string, columns: number): string {
  const line = text.replace(/\s+/g, " ").trim();
  if (displayWidth(line) <= columns) return line;
  let cut = "";
  for (const c of line) {
    if (displayWidth(cut + c) > columns - 1) break;
    cut += c;
  }
  return `${cut}…`;
}

/** Pads with spaces to `columns`. */
export function padEnd(text: string, columns: number): string {
  return text + " ".repeat(Math.max(0, columns - displayWidth(text)));
}

/** Writes a warning to standard error. */
export function warn(message: string): void {
  notice(`mixtape: ${message}`);
}

/** 12345678 as `12.3 MB`. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${power === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[power]}`;
}

/** `1 token`, `2 tokens`. */
export function counted(count: number, thing: string): string {
  return `${count} ${thing}${count === 1 ? "" : "s"}`;
}

/** 38012345 as `38.0 M`. */
export function formatCount(count: number): string {
  if (count < 10_000) return String(count);
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} k` : count < 1e9 ? `${(count / 1e6).toFixed(1)} M` : `${(count / 1e9).toFixed(2)} B`;
}
