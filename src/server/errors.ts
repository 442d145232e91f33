/** Everything that the server answers instead of a result: one catalogue of codes, each with its statuses. Knows no protocol. */

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
  internal: { status: 500, type: "server_error", grpc: "INTERNAL" },
  not_ready: { status: 503, type: "server_error", grpc: "UNAVAILABLE" },
  timeout: { status: 504, type: "server_error", grpc: "DEADLINE_EXCEEDED" },
} as const;

export type ErrorCode = keyof typeof ERRORS;

/** A failure that the client is told of. Anything else that is thrown becomes `internal`, without its text. */
export class ServerError extends Error {
  readonly code: ErrorCode;
  /** The offending field, like `messages[2].content`; null where it is none. */
  readonly param: string | null;
  /** Seconds after which it may go through; null where waiting does not help. */
  readonly retryAfterSeconds: number | null;

  constructor(code: ErrorCode, message: string, options: { param?: string; retryAfterSeconds?: number; cause?: unknown } = {}) {
    super(message, { cause: options.cause });
    this.name = "ServerError";
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfterSeconds = options.retryAfterSeconds ?? null;
  }
}
