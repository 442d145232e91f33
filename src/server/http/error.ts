/** Errors as HTTP responses in OpenAI's shape. Knows Fastify's errors, and no route. */
import { ERRORS, type ErrorCode, ServerError, serverError } from "../errors.ts";

export interface ErrorBody {
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: ErrorCode };
}

/** What Fastify throws. */
interface FrameworkError {
  readonly code?: string;
  readonly statusCode?: number;
  readonly message: string;
}

/** Status, body and headers of a failure. Errors not meant for clients become `internal`, without their text. */
export function errorBody(error: unknown): { status: number; body: ErrorBody; headers: Record<string, string>; code: ErrorCode } {
  const known = httpError(error);
  const { status, type } = ERRORS[known.code];
  return {
    status,
    code: known.code,
    body: { error: { message: known.message, type, param: known.param, code: known.code } },
    headers: known.retryAfterSeconds === null ? {} : { "retry-after": String(Math.max(1, Math.ceil(known.retryAfterSeconds))) },
  };
}

function httpError(error: unknown): ServerError {
  if (error instanceof ServerError) return error;
  const { code, statusCode, message } = error as FrameworkError;
  switch (code) {
    case "FST_ERR_CTP_INVALID_MEDIA_TYPE":
      return new ServerError("unsupported_media_type", "the body must be JSON: content-type application/json");
    default:
  }
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) return new ServerError("invalid_request", message);
  return serverError(error);
}
