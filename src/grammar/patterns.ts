/** Patterns and formats of a schema's strings, read once each. Knows no value but texts. */
import { SchemaError, show } from "./error.ts";
import { FORMATS, type Form, HINTS, OTHERS } from "./formats.ts";
import { type Language, Languages } from "./language.ts";
import { type Pattern, readPattern } from "./regex.ts";
import type { Work } from "./work.ts";

export class Patterns {
  readonly languages: Languages;
  readonly #read = new Map<string, Pattern>();
  readonly #languages = new Map<string, Language>();
  #path = "";

  constructor(work: Work) {
    this.languages = new Languages((steps) => work.spend(steps, this.#path));
  }

  /** The value of `pattern`. Throws SchemaError. */
  source(value: unknown, path: string): string {
    if (typeof value !== "string") throw new SchemaError(path, `'pattern' must be a text, not ${show(value)}`);
    return value;
  }

  /** A pattern as JSON Schema's `pattern` means it. Throws SchemaError. */
  read(source: string, path: string): Pattern {
    const known = this.#read.get(source);
    if (known) return known;
    try {
      const pattern = readPattern(source, false);
      this.#read.set(source, pattern);
      return pattern;
    } catch (cause) {
      throw new SchemaError(path, cause instanceof Error ? cause.message : String(cause));
    }
  }

  /** The texts in which a pattern matches. */
  language(source: string, path: string): Language {
    this.#path = path;
    const pattern = this.read(source, path);
    const known = this.#languages.get(source) ?? this.languages.pattern(pattern);
    this.#languages.set(source, known);
    return known;
  }

  matches(source: string, text: string, path: string): boolean {
    return this.languages.has(this.language(source, path), text);
  }

  /** The ways to write a format; null if every text has it. @param hasPattern a pattern stands beside it */
  format(format: unknown, path: string, hasPattern: boolean): readonly Form[] | null {
    if (typeof format === "string" && Object.hasOwn(FORMATS, format)) return FORMATS[format];
    if (typeof format === "string" && (HINTS.has(format) || (hasPattern && !OTHERS.has(format)))) return null;
    throw new SchemaError(
      path,
      `'format' ${show(format)} is not supported; supported are ${[...Object.keys(FORMATS), ...HINTS].join(", ")}`,
    );
  }

  /** Whether a text surely has a format. */
  hasFormat(format: unknown, text: string, path: string): boolean {
    const known = this.format(format, path, false);
    return known === null || this.matches(known[0].pattern, text, path);
  }
}
