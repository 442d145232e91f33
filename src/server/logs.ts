/** The server's log: JSON lines with request ids. It never sees prompts, answers or keys, unless content is asked for. */
import { randomUUID } from "node:crypto";
import pino, { type DestinationStream, type Logger } from "pino";

export type { Logger };

/** `destination`: default standard output. */
export function createLogger(level: string, destination?: DestinationStream): Logger {
  return pino(
    {
      level,
      base: undefined,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: {
        err: pino.stdSerializers.err,
        // Not the whole requests: queries may hold what users typed, headers hold keys.
        req: (request: { method?: string; url?: string }) => ({ method: request.method, path: request.url?.split("?", 1)[0] }),
        res: (reply: { statusCode?: number }) => ({ status: reply.statusCode }),
      },
      // A second fence, for whoever logs headers one day.
      redact: { paths: ["authorization", "*.authorization", "headers.cookie", '*.headers["x-api-key"]'], censor: "[hidden]" },
    },
    destination ?? pino.destination({ sync: false, fd: 1 }),
  );
}

/** The caller's own id of its request where it is harmless in a log, so that it can follow it; else a new one. */
export function requestId(given: unknown): string {
  return typeof given === "string" && /^[\w.-]{1,128}$/.test(given) ? given : randomUUID();
}
