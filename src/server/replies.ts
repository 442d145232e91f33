/** Errors as HTTP replies in OpenAI's shape. Knows Fastify's and zod's errors, and no route. */
import { ERRORS, type ErrorCode, ServerError } from "./errors.ts";

export interface ErrorBody {
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: ErrorCode };
}

/** What Fastify and its validators throw. */
interface FrameworkError {
  readonly code?: string;
  readonly statusCode?: number;
  readonly message: string;
  readonly validation?: readonly {
    readonly instancePath?: string;
    readonly message?: string;
    readonly params?: { readonly issue?: Issue };
  }[];
}

/** A zod issue. */
interface Issue {
  readonly code?: string;
  readonly path?: readonly (string | number)[];
  readonly message?: string;
  readonly keys?: readonly string[];
}

/** Status, body and headers of a failure. What is not meant for clients becomes `internal`, without its text. */
export function errorBody(error: unknown): { status: number; body: ErrorBody; headers: Record<string, string>; code: ErrorCode } {
  const known = serverError(error);
  const { status, type } = ERRORS[known.code];
  return {
    status,
    code: known.code,
    body: { error: { message: known.message, type, param: known.param, code: known.code } },
    headers: known.retryAfterSeconds === null ? {} : { "retry-after": String(Math.max(1, Math.ceil(known.retryAfterSeconds))) },
  };
}

export function serverError(error: unknown): ServerError {
  if (error instanceof ServerError) return error;
  // The engine and the library refuse what makes no sense with a RangeError that says what was seen.
  if (error instanceof RangeError && !error.message.startsWith("internal:"))
    return new ServerError("invalid_request", error.message, { cause: error });
  const { code, statusCode, message, validation } = error as FrameworkError;
  if (validation?.length) return invalid(validation[0]);
  switch (code) {
    case "FST_ERR_CTP_BODY_TOO_LARGE":
      return new ServerError("request_too_large", "the body is larger than this server takes");
    case "FST_ERR_CTP_INVALID_MEDIA_TYPE":
      return new ServerError("unsupported_media_type", "the body must be JSON: content-type application/json");
    case "FST_ERR_CTP_EMPTY_JSON_BODY":
    case "FST_ERR_CTP_INVALID_JSON_BODY":
      return new ServerError("invalid_request", "the body is not valid JSON");
    default:
  }
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) return new ServerError("invalid_request", message);
  return new ServerError("internal", "something went wrong here; the server's log has more under this request's id", { cause: error });
}

function invalid({ instancePath = "", message, params }: NonNullable<FrameworkError["validation"]>[number]): ServerError {
  const issue = params?.issue;
  const path = issue?.path ?? instancePath.split("/").slice(1);
  const param = [...path, ...(issue?.code === "unrecognized_keys" ? (issue.keys?.slice(0, 1) ?? []) : [])].reduce<string>(
    (at, key) => (/^\d+$/.test(String(key)) ? `${at}[${key}]` : at ? `${at}.${String(key)}` : String(key)),
    "",
  );
  const text = issue?.code === "unrecognized_keys" ? "is not a field that is known here" : (issue?.message ?? message ?? "is not valid");
  return new ServerError("invalid_request", param ? `${param}: ${text}` : text, { param: param || undefined });
}
