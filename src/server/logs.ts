/** The server's log: JSON lines with request ids. It never contains keys, nor prompts and answers unless `logContent` is on. */
import { randomUUID } from "node:crypto";
import pino, { type DestinationStream, type Logger } from "pino";

export type { Logger };

/** @param destination default: standard output */
export function createLogger(level: string, destination?: DestinationStream): Logger {
  return pino(
    {
      level,
      base: undefined,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: {
        err: pino.stdSerializers.err,
        // Not the whole request: queries may hold user text, headers hold keys.
        req: (request: { method?: string; url?: string }) => ({ method: request.method, path: request.url?.split("?", 1)[0] }),
        res: (reply: { statusCode?: number }) => ({ status: reply.statusCode }),
      },
      // A safeguard in case headers are ever logged.
      redact: { paths: ["authorization", "*.authorization", "headers.cookie", '*.headers["x-api-key"]'], censor: "[hidden]" },
    },
    destination ?? pino.destination({ sync: false, fd: 1 }),
  );
}

/** The client's request id if it is safe to log, so that clients can trace their requests; otherwise a new id. */
export function requestId(given: unknown): string {
  return typeof given === "string" && /^[\w.-]{1,128}$/.test(given) ? given : randomUUID();
}
