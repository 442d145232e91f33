/**
 * Parses a request's JSON safely: valid UTF-8, limited nesting, limited counts, no keys that reach prototypes. The counts are
 * taken from the bytes, so that nothing is built of a body that has too much of anything. Knows no schema.
 */
import { isUtf8 } from "node:buffer";
import { ServerError } from "../errors.ts";

const [QUOTE, BACKSLASH, COMMA, COLON] = [0x22, 0x5c, 0x2c, 0x3a];
const [OPEN_BRACKET, CLOSE_BRACKET, OPEN_BRACE, CLOSE_BRACE] = [0x5b, 0x5d, 0x7b, 0x7d];

/** The most values of a body, at any depth: as many as the longest prompts have token ids. */
export const MOST_VALUES = 2 ** 17;
/** The most of them that stand in objects, under a name: ten thousand messages with their parts. */
export const MOST_FIELDS = 2 ** 15;

/**
 * Throws ServerError `invalid_request`; its message quotes nothing of the body, which is private.
 * @param what name of the text, for errors
 */
export function parseBody(bytes: Buffer, maxDepth: number, what = "the body"): unknown {
  const wrong = (message: string) => new ServerError("invalid_request", `${what} ${message}`);
  if (bytes.length === 0) throw wrong("is empty; send a JSON object");
  if (!isUtf8(bytes)) throw wrong("is not valid UTF-8");
  const fault = faultOf(bytes, maxDepth);
  if (fault !== null) throw wrong(fault);
  const value = parsed(bytes.toString("utf8"), (position) =>
    wrong(`is broken JSON${position === null ? "" : `, from character ${position} on`}`),
  );
  if (MAY_HOLD_PROTOTYPE.some((mark) => bytes.includes(mark)) && holdsPrototype(value))
    throw wrong("has a field __proto__, which is not allowed");
  return value;
}

function parsed(text: string, broken: (position: string | null) => ServerError): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw broken(/at position (\d+)/.exec((error as Error).message)?.[1] ?? null);
  }
}

/** In the bytes of JSON that has the name `__proto__`, plain or with escaped characters. */
const MAY_HOLD_PROTOTYPE = ["__proto__", "\\u00"];

function holdsPrototype(value: unknown): boolean {
  if (typeof value !== "object" || value === null) return false;
  return Object.hasOwn(value, "__proto__") || Object.values(value).some(holdsPrototype);
}

/** What the JSON has too much of; null: nothing. Code that walks the parsed value is recursive, so the depth is limited too. */
function faultOf(bytes: Buffer, maxDepth: number): string | null {
  let depth = 0;
  let values = 1;
  let fields = 0;
  let texts = 0; // broken JSON may have them without commas
  for (let i = 0; i < bytes.length; i++) {
    switch (bytes[i]) {
      case QUOTE:
        if (++texts > MOST_VALUES + MOST_FIELDS) return `holds more than ${MOST_VALUES + MOST_FIELDS} texts, which is the most`;
        i = endOfString(bytes, i + 1);
        break;
      case OPEN_BRACKET:
      case OPEN_BRACE:
        if (++depth > maxDepth) return `is JSON nested more than ${maxDepth} levels deep`;
        if (++values > MOST_VALUES) return `holds more than ${MOST_VALUES} values, which is the most`;
        break;
      case CLOSE_BRACKET:
      case CLOSE_BRACE:
        depth--;
        break;
      case COMMA:
        if (++values > MOST_VALUES) return `holds more than ${MOST_VALUES} values, which is the most`;
        break;
      case COLON:
        if (++fields > MOST_FIELDS) return `holds more than ${MOST_FIELDS} fields in its objects, which is the most`;
        break;
      default:
    }
  }
  return null;
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
