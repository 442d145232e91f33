// The bytes that a single token adds to a text, decoded without regard to its neighbours.
// Knows nothing of ids.
import { byteCharacters, type DecoderConfig } from "./decoder.ts";

/** Builds the function from a token to its bytes for a decoder. Ignores what the decoder strips at the ends of a text. */
export function tokenBytes(config: DecoderConfig | null): (token: string) => Uint8Array {
  const parts = flat(config);
  const utf8 = new TextEncoder();
  if (parts.some(({ type }) => type === "ByteLevel")) {
    const bytes = byteCharacters();
    return (token) => {
      const raw = Array.from(token, (character) => bytes.get(character));
      return raw.includes(undefined) ? utf8.encode(token) : Uint8Array.from(raw, (byte) => byte ?? 0);
    };
  }
  const falls = parts.some(({ type }) => type === "ByteFallback");
  const replaced = parts.flatMap((part): [string | RegExp, string][] => {
    if (part.type === "Metaspace") return [[part.replacement ?? "▁", " "]];
    if (part.type !== "Replace") return [];
    return [[part.pattern.String ?? new RegExp(part.pattern.Regex ?? "", "gu"), part.content]];
  });
  return (token) => {
    const byte = falls ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token) : null;
    if (byte !== null) return Uint8Array.of(Number.parseInt(byte[1] ?? "", 16));
    return utf8.encode(replaced.reduce((text, [pattern, content]) => text.replaceAll(pattern, () => content), token));
  };
}

function flat(config: DecoderConfig | null): DecoderConfig[] {
  if (config === null) return [];
  return config.type === "Sequence" ? config.decoders.flatMap(flat) : [config];
}
