// Decodes tokens to text incrementally: each decoder of tokenizer.json is a step that emits text once no later token can change it.
// Decoding a complete list runs the same steps, so streamed and complete texts are equal by construction. Knows nothing of ids.
import { TokenizerError } from "./error.ts";

/** The decoders that this project supports, as tokenizer.json spells them. */
export type DecoderConfig =
  | { readonly type: "Sequence"; readonly decoders: readonly DecoderConfig[] }
  | { readonly type: "Replace"; readonly pattern: { readonly String?: string; readonly Regex?: string }; readonly content: string }
  | { readonly type: "ByteFallback" }
  | { readonly type: "Fuse" }
  | { readonly type: "Strip"; readonly content: string; readonly start: number; readonly stop: number }
  | { readonly type: "Metaspace"; readonly replacement?: string; readonly prepend_scheme?: string; readonly add_prefix_space?: boolean }
  | { readonly type: "ByteLevel" };

/** Receives tokens (or the text decoded from them) and passes text on. Must not be used after `finish`. */
export interface Flow {
  push(piece: string): void;
  finish(): void;
}

/** Builds a flow that passes its output to `next`. */
export type Step = (next: Flow) => Flow;

/** Builds the steps of a decoder; null (no decoder) joins tokens with spaces. Throws `TokenizerError` if the decoder is not supported. */
export function decoderStep(config: DecoderConfig | null): Step {
  if (config === null) return spaces;
  let fused = false;
  const flat = (part: DecoderConfig): Step[] => {
    switch (part.type) {
      case "Sequence":
        return part.decoders.flatMap(flat);
      case "Fuse":
        fused = true;
        return [];
      case "Replace":
        if (!fused) return [each(replacement(part))];
        if (part.pattern.String !== undefined) return [literal(part.pattern.String, part.content)];
        throw new TokenizerError("tokenizer.json: decoder Replace with a regular expression after Fuse is not supported");
      case "Strip":
        return [fused ? stripText(part) : each((token) => strip(token, part))];
      case "ByteFallback":
        return [byteFallback];
      case "Metaspace":
        return [metaspace(part.replacement ?? "▁", part.prepend_scheme !== "never" && part.add_prefix_space !== false)];
      case "ByteLevel":
        return [byteLevel];
      default:
        throw new TokenizerError(`tokenizer.json: decoder ${JSON.stringify((part as { type?: unknown }).type)} is not supported`);
    }
  };
  return chain(flat(config));
}

/** Runs steps in order. */
export function chain(steps: readonly Step[]): Step {
  return (next) => steps.reduceRight((flow, step) => step(flow), next);
}

/** Removes the space before punctuation and contractions, as `clean_up_tokenization_spaces` of transformers does. */
export const cleanUp: Step = chain(
  [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"].map((pattern) => literal(pattern, pattern.trim())),
);

const spaces: Step = (next) => {
  let first = true;
  return {
    push(token) {
      next.push(first ? token : " " + token);
      first = false;
    },
    finish: () => next.finish(),
  };
};

function each(change: (token: string) => string): Step {
  return (next) => ({ push: (token) => next.push(change(token)), finish: () => next.finish() });
}

function replacement(part: { readonly pattern: { readonly String?: string; readonly Regex?: string }; readonly content: string }) {
  const { pattern, content } = part;
  if (pattern.String !== undefined) {
    const text = pattern.String;
    return (token: string) => token.replaceAll(text, () => content);
  }
  try {
    const regex = new RegExp(pattern.Regex ?? "", "gu");
    return (token: string) => token.replace(regex, () => content);
  } catch (cause) {
    throw new TokenizerError(`tokenizer.json: decoder pattern ${JSON.stringify(pattern.Regex)} is not supported`, { cause });
  }
}

/** Replaces a fixed string throughout the text. Holds back only a suffix that may be the start of the string. */
function literal(pattern: string, content: string): Step {
  return (next) => {
    let held = "";
    return {
      push(piece) {
        const parts = (held + piece).split(pattern);
        held = parts.pop() ?? "";
        let text = parts.map((part) => part + content).join("");
        let keep = Math.min(pattern.length - 1, held.length);
        while (keep > 0 && !pattern.startsWith(held.slice(held.length - keep))) keep--;
        text += held.slice(0, held.length - keep);
        held = held.slice(held.length - keep);
        if (text !== "") next.push(text);
      },
      finish() {
        if (held !== "") next.push(held);
        next.finish();
      },
    };
  };
}

interface StripConfig {
  readonly content: string;
  readonly start: number;
  readonly stop: number;
}

function strip(text: string, { content, start, stop }: StripConfig): string {
  let from = 0;
  while (from < start && text.charAt(from) === content) from++;
  let to = text.length;
  while (text.length - to < stop && to > from && text.charAt(to - 1) === content) to--;
  return text.slice(from, to);
}

/** Strips the text as a whole: up to `start` characters at its beginning and `stop` at its end. Candidates for the end are held back. */
function stripText(config: StripConfig): Step {
  const { content, start, stop } = config;
  return (next) => {
    let left = start; // how many characters may still be stripped
    let held = "";
    return {
      push(piece) {
        let from = 0;
        while (left > 0 && from < piece.length) {
          if (piece.charAt(from) === content) {
            left--;
            from++;
          } else left = 0;
        }
        held += piece.slice(from);
        let keep = 0;
        while (keep < stop && keep < held.length && held.charAt(held.length - 1 - keep) === content) keep++;
        if (held.length > keep) next.push(held.slice(0, held.length - keep));
        held = held.slice(held.length - keep);
      },
      finish: () => next.finish(),
    };
  };
}

/** Turns ▁ into spaces, and drops the one that encoding may have added to the first token. */
function metaspace(mark: string, prefixed: boolean): Step {
  return (next) => {
    let first = true;
    return {
      push(token) {
        next.push(token.replaceAll(mark, first && prefixed ? "" : " "));
        first = false;
      },
      finish: () => next.finish(),
    };
  };
}

/**
 * Decodes byte tokens (`<0xE4>`) as SentencePiece does: each byte that is not part of a valid character becomes one U+FFFD.
 * (The Rust library turns a whole run of byte tokens into U+FFFD if any of its bytes is invalid, so it cannot stream such a run.)
 */
const byteFallback: Step = (next) => {
  let pending: number[] = []; // the first bytes of an incomplete character
  const push = (byte: number): void => {
    pending.push(byte);
    while (pending.length > 0) {
      const length = characterLength(pending);
      if (length === 0) return;
      next.push(length < 0 ? "\ufffd" : new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(pending)));
      pending = length < 0 ? pending.slice(1) : [];
    }
  };
  const flush = (): void => {
    for (const _ of pending) next.push("\ufffd");
    pending = [];
  };
  return {
    push(token) {
      const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
      if (byte !== null) return push(Number.parseInt(byte[1] ?? "", 16));
      if (pending.length > 0) flush();
      next.push(token);
    },
    finish() {
      flush();
      next.finish();
    },
  };
};

/** Classifies the bytes of at most one character: its length if complete, 0 if more bytes may complete it, -1 if invalid. */
function characterLength(bytes: readonly number[]): number {
  const [a = 0, b] = bytes;
  const length = a < 0x80 ? 1 : a >= 0xc2 && a <= 0xdf ? 2 : (a & 0xf0) === 0xe0 ? 3 : a >= 0xf0 && a <= 0xf4 ? 4 : -1;
  if (length < 0) return -1;
  // no overlong forms, surrogates or code points above U+10FFFF
  if (b !== undefined && ((a === 0xe0 && b < 0xa0) || (a === 0xed && b > 0x9f) || (a === 0xf0 && b < 0x90) || (a === 0xf4 && b > 0x8f)))
    return -1;
  if (bytes.slice(1).some((byte) => (byte & 0xc0) !== 0x80)) return -1;
  return bytes.length === length ? length : 0;
}

/** GPT-2's printable characters that stand for bytes. */
export function byteCharacters(): Map<string, number> {
  const bytes = new Map<string, number>();
  for (let byte = 0, extra = 256; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    bytes.set(String.fromCharCode(printable ? byte : extra++), byte);
  }
  return bytes;
}

/** Decodes those characters back to bytes. */
const byteLevel: Step = (next) => {
  const bytes = byteCharacters();
  const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
  return {
    push(token) {
      const raw = Array.from(token, (character) => bytes.get(character));
      const text = raw.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(raw.map((byte) => byte ?? 0));
      const done = utf8.decode(text, { stream: true });
      if (done !== "") next.push(done);
    },
    finish() {
      const rest = utf8.decode();
      if (rest !== "") next.push(rest);
      next.finish();
    },
  };
};
