/** Every error the server returns: one catalogue of codes, each with its statuses. Knows no protocol. */
import { PromptError } from "../chat/prompt.ts";
import { GrammarError } from "../grammar/error.ts";

/** HTTP status, type as OpenAI's clients know it, and gRPC status of each code. */
export const ERRORS = {
  invalid_request: { status: 400, type: "invalid_request_error", grpc: "INVALID_ARGUMENT" },
  context_length_exceeded: { status: 400, type: "invalid_request_error", grpc: "INVALID_ARGUMENT" },
  invalid_api_key: { status: 401, type: "authentication_error", grpc: "UNAUTHENTICATED" },
  model_not_allowed: { status: 403, type: "permission_error", grpc: "PERMISSION_DENIED" },
  not_found: { status: 404, type: "invalid_request_error", grpc: "NOT_FOUND" },
  model_not_found: { status: 404, type: "invalid_request_error", grpc: "NOT_FOUND" },
  method_not_allowed: { status: 405, type: "invalid_request_error", grpc: "UNIMPLEMENTED" },
  request_too_large: { status: 413, type: "invalid_request_error", grpc: "RESOURCE_EXHAUSTED" },
  unsupported_media_type: { status: 415, type: "invalid_request_error", grpc: "INVALID_ARGUMENT" },
  rate_limit_exceeded: { status: 429, type: "rate_limit_error", grpc: "RESOURCE_EXHAUSTED" },
  budget_exceeded: { status: 429, type: "insufficient_quota", grpc: "RESOURCE_EXHAUSTED" },
  overloaded: { status: 429, type: "overloaded_error", grpc: "RESOURCE_EXHAUSTED" },
  /** The client left before its response was complete. Nobody receives this; logs and metrics count it, with the status that proxies use. */
  cancelled: { status: 499, type: "invalid_request_error", grpc: "CANCELLED" },
  internal: { status: 500, type: "server_error", grpc: "INTERNAL" },
  not_ready: { status: 503, type: "server_error", grpc: "UNAVAILABLE" },
  timeout: { status: 504, type: "server_error", grpc: "DEADLINE_EXCEEDED" },
} as const;

export type ErrorCode = keyof typeof ERRORS;

/** A failure that is reported to the client. Anything else that is thrown becomes `internal`, without its text. */
export class ServerError extends Error {
  readonly code: ErrorCode;
  /** The offending field, like `messages[2].content`; null when it is no single field. */
  readonly param: string | null;
  /** Seconds to wait before trying again; null when waiting does not help. */
  readonly retryAfterSeconds: number | null;

  constructor(code: ErrorCode, message: string, options: { param?: string; retryAfterSeconds?: number; cause?: unknown } = {}) {
    super(message, { cause: options.cause });
    this.name = "ServerError";
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfterSeconds = options.retryAfterSeconds ?? null;
  }
}

/** Converts any failure to one that clients may see. */
export function serverError(error: unknown): ServerError {
  if (error instanceof ServerError) return error;
  if (error instanceof PromptError || error instanceof GrammarError)
    return new ServerError("invalid_request", error.message, { param: error.param, cause: error });
  // The engine and the library reject invalid input with a RangeError that says what they saw.
  if (error instanceof RangeError && !error.message.startsWith("internal:"))
    return new ServerError("invalid_request", error.message, { cause: error });
  return new ServerError("internal", "internal error; the server's log has the details under this request's id", { cause: error });
}
