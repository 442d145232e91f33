/**
 * The server's log: JSON lines with request ids. It never contains keys or other files' text, nor prompts and answers unless
 * `logContent` is on.
 */
import { randomUUID } from "node:crypto";
import pino, { type DestinationStream, type Logger } from "pino";

export type { Logger };

export function createLogger(level: string, destination: DestinationStream): Logger {
  return pino(
    {
      level,
      base: undefined,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: {
        err: (error: unknown) => plainError(error),
        res: ({ status }: { status?: number }) => ({ status }),
        // Not the whole request: queries may hold user text, headers hold keys.
        req: (request: { method?: string; url?: string }) => ({
          method: request.method,
          path: request.url?.split("?", 1)[0].slice(0, LONGEST_PATH),
        }),
      },
      // A safeguard in case headers are ever logged.
      redact: { paths: ["authorization", "*.authorization", "headers.cookie", '*.headers["x-api-key"]'], censor: "[hidden]" },
    },
    destination,
  );
}

const LONGEST_PATH = 200;
const DEEPEST_CAUSE = 5;

interface PlainError {
  readonly type: string;
  readonly code?: unknown;
  readonly message: string;
  readonly stack: string;
  readonly cause?: PlainError;
}

/**
 * An error as it is logged: not its own fields, which hold whatever a library put there, and not the message of a parser, which
 * quotes what it could not parse.
 */
function plainError(error: unknown, depth = 0): PlainError {
  if (!(error instanceof Error)) return { type: typeof error, message: "something that is no error was thrown", stack: "" };
  const { name, message, cause } = error;
  const { code } = error as { code?: unknown };
  const frames = (error.stack ?? "").split("\n").filter((line) => /^ {4}at /.test(line));
  return {
    type: name,
    ...(typeof code === "string" ? { code } : {}),
    message: QUOTES.test(name) ? `broken input${placeIn(message)}; the parser's message quotes it and is left out` : message,
    stack: frames.join("\n"),
    ...(cause === undefined || depth === DEEPEST_CAUSE ? {} : { cause: plainError(cause, depth + 1) }),
  };
}

function placeIn(message: string): string {
  const [place] = /at (position|line) \d+/.exec(message) ?? [];
  return place === undefined ? "" : ` ${place}`;
}

/** Names of errors whose messages quote their input. */
const QUOTES = /^(SyntaxError|\$?ZodError|YAML\w*)$/;

/** The client's request id if it is safe to log, so that clients can trace their requests; otherwise a new id. */
export function requestId(given: unknown): string {
  return typeof given === "string" && /^[\w.-]{1,128}$/.test(given) ? given : randomUUID();
}
