/** Parses a request's JSON safely: valid UTF-8, limited nesting, no keys that reach prototypes. Knows no schema. */
import { isUtf8 } from "node:buffer";
import { ServerError } from "../errors.ts";

const [QUOTE, BACKSLASH] = [0x22, 0x5c];
const [OPEN_BRACKET, CLOSE_BRACKET, OPEN_BRACE, CLOSE_BRACE] = [0x5b, 0x5d, 0x7b, 0x7d];

/**
 * Throws ServerError `invalid_request`; its message quotes nothing of the body, which is private.
 * @param what name of the text, for errors
 */
export function parseBody(bytes: Buffer, maxDepth: number, what = "the body"): unknown {
  if (bytes.length === 0) throw new ServerError("invalid_request", `${what} is empty; it must be a JSON object`);
  if (!isUtf8(bytes)) throw new ServerError("invalid_request", `${what} is not valid UTF-8`);
  checkDepth(bytes, maxDepth, what);
  try {
    const text = bytes.toString("utf8");
    const value: unknown = JSON.parse(text);
    if (MAY_HOLD_PROTOTYPE.test(text)) refusePrototype(value, what);
    return value;
  } catch (error) {
    if (error instanceof ServerError) throw error;
    const position = /at position (\d+)/.exec((error as Error).message)?.[1];
    throw new ServerError("invalid_request", `${what} is broken JSON${position === undefined ? "" : `, from character ${position} on`}`);
  }
}

/** `__proto__`, plain or with escaped characters. */
const MAY_HOLD_PROTOTYPE = /__proto__|\\u00[5-7]/i;

function refusePrototype(value: unknown, what: string): void {
  if (typeof value !== "object" || value === null) return;
  if (Object.hasOwn(value, "__proto__")) throw new ServerError("invalid_request", `${what} has a field __proto__, which is not allowed`);
  for (const each of Object.values(value)) refusePrototype(each, what);
}

/** Code that walks the parsed value is recursive, so the depth is limited first. */
function checkDepth(bytes: Buffer, maxDepth: number, what: string): void {
  let depth = 0;
  for (let i = 0; i < bytes.length; i++) {
    const byte = bytes[i];
    if (byte === QUOTE) {
      i = endOfString(bytes, i + 1);
    } else if (byte === OPEN_BRACKET || byte === OPEN_BRACE) {
      if (++depth > maxDepth) throw new ServerError("invalid_request", `${what}: its JSON is nested more than ${maxDepth} levels deep`);
    } else if (byte === CLOSE_BRACKET || byte === CLOSE_BRACE) depth--;
  }
}

/** Position of the closing quote, found with the platform's fast search: strings are most of a body. */
function endOfString(bytes: Buffer, from: number): number {
  for (let at = bytes.indexOf(QUOTE, from); at >= 0; at = bytes.indexOf(QUOTE, at + 1)) {
    let backslashes = 0;
    while (bytes[at - 1 - backslashes] === BACKSLASH && at - 1 - backslashes >= from) backslashes++;
    if (backslashes % 2 === 0) return at;
  }
  return bytes.length;
}
