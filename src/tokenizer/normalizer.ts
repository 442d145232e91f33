// SentencePiece's text normalisation: rules, white space and ▁. Follows the library's Normalizer::Normalize step by step.
// Knows nothing of ids.
import { CharsMap } from "./charsmap.ts";
import type { Matcher } from "./matcher.ts";

/** SentencePiece's visible space. */
export const mark = "▁";

/** The NormalizerSpec of a model file. */
export interface NormalizerSpec {
  /** Empty if there are no rules. */
  readonly precompiledCharsmap: Uint8Array;
  readonly addDummyPrefix: boolean;
  readonly removeExtraWhitespaces: boolean;
  readonly escapeWhitespaces: boolean;
}

export class Normalizer {
  private readonly spec: NormalizerSpec;
  private readonly frozen: Matcher;
  private readonly map: CharsMap | null;

  /** `frozen`: user-defined pieces, to which rules do not apply. Throws `TokenizerError` for a malformed charsmap. */
  constructor(spec: NormalizerSpec, frozen: Matcher) {
    this.spec = spec;
    this.frozen = frozen;
    this.map = spec.precompiledCharsmap.length > 0 ? new CharsMap(spec.precompiledCharsmap) : null;
  }

  normalize(text: string): string {
    const { addDummyPrefix, removeExtraWhitespaces, escapeWhitespaces } = this.spec;
    const space = escapeWhitespaces ? mark : " ";
    let at = 0;
    if (removeExtraWhitespaces)
      for (let step = { end: 0, text: " " }; step.text === " "; ) {
        at = step.end;
        if (at >= text.length) return "";
        step = this.step(text, at);
      }
    if (at >= text.length) return "";
    const out = [addDummyPrefix ? space : ""];
    let afterSpace = removeExtraWhitespaces;
    while (at < text.length) {
      const step = this.step(text, at);
      at = step.end;
      const piece = afterSpace ? step.text.replace(/^ +/, "") : step.text;
      if (piece === "") continue;
      out.push(escapeWhitespaces ? piece.replaceAll(" ", mark) : piece);
      afterSpace = removeExtraWhitespaces && piece.endsWith(" ");
    }
    const joined = out.join("");
    let end = joined.length;
    if (removeExtraWhitespaces) while (joined.endsWith(space, end) && end > 0) end -= space.length;
    return joined.slice(0, end);
  }

  /** The next user-defined piece, rule match or character: where it ends and its replacement. */
  private step(text: string, at: number): { readonly end: number; readonly text: string } {
    const end = this.frozen.empty ? -1 : this.frozen.longest(text, at);
    if (end >= 0) return { end, text: text.slice(at, end) };
    const rule = this.map?.match(text, at);
    if (rule) return rule;
    const next = at + ((text.codePointAt(at) ?? 0) > 0xffff ? 2 : 1);
    return { end: next, text: text.slice(at, next) };
  }
}
