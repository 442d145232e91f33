// SentencePiece's precompiled normalisation rules: a double-array trie (Darts-clone) over UTF-8, followed by the replacements.
// Knows nothing of white space rules or tokens.
import { TokenizerError } from "./error.ts";

/** A set of rules that each replace one string with another. */
export class CharsMap {
  private readonly units: Uint32Array;
  private readonly replacements: Uint8Array; // NUL-terminated strings
  private readonly decoded = new Map<number, string>();

  /** `bytes`: trie size (u32, little-endian), trie, replacements. Throws `TokenizerError` if the sizes are inconsistent. */
  constructor(bytes: Uint8Array) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const size = bytes.length >= 4 ? view.getUint32(0, true) : -1;
    if (size <= 0 || size % 4 !== 0 || 4 + size > bytes.length)
      throw new TokenizerError(`precompiled_charsmap is malformed: it has ${bytes.length} bytes and claims a trie of ${size}`);
    this.units = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.replacements = bytes.subarray(4 + size);
  }

  /** The rule with the longest match at `at`: where the match ends and its replacement; null if none matches. */
  match(text: string, at: number): { readonly end: number; readonly text: string } | null {
    let node = offset(this.units[0] ?? 0);
    let end = -1;
    let value = 0;
    walk: for (let i = at; i < text.length; ) {
      const code = text.codePointAt(i) ?? 0;
      i += code > 0xffff ? 2 : 1;
      const length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
      for (let k = length - 1; k >= 0; k--) {
        const low = (code >> (6 * k)) & 0x3f;
        const byte = k < length - 1 ? 0x80 | low : length === 1 ? code : ((0xf00 >> length) & 0xff) | (code >> (6 * k));
        node ^= byte;
        const unit = this.units[node];
        if (unit === undefined || (unit & 0x800000ff) !== byte) break walk;
        node ^= offset(unit);
        if (((unit >>> 8) & 1) === 1) {
          end = i;
          value = (this.units[node] ?? 0) & 0x7fffffff;
        }
      }
    }
    return end < 0 ? null : { end, text: this.replacement(value) };
  }

  /** Applies the rules from left to right, always the longest match. */
  normalize(text: string): string {
    let out = "";
    for (let i = 0; i < text.length; ) {
      const rule = this.match(text, i);
      const end = rule?.end ?? i + ((text.codePointAt(i) ?? 0) > 0xffff ? 2 : 1);
      out += rule?.text ?? text.slice(i, end);
      i = end;
    }
    return out;
  }

  private replacement(start: number): string {
    let text = this.decoded.get(start);
    if (text === undefined) {
      const end = this.replacements.indexOf(0, start);
      text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.replacements.subarray(start, end < 0 ? undefined : end));
      this.decoded.set(start, text);
    }
    return text;
  }
}

function offset(unit: number): number {
  return (unit >>> 10) << ((unit & 0x200) >>> 6);
}
