/** Errors as HTTP replies in OpenAI's shape. Knows Fastify's and zod's errors, and no route. */
import { ERRORS, type ErrorCode, ServerError } from "../errors.ts";

export interface ErrorBody {
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: ErrorCode };
}

/** What Fastify and zod's validator for it throw. */
interface FrameworkError {
  readonly code?: string;
  readonly statusCode?: number;
  readonly message: string;
  readonly validation?: readonly Finding[];
}

/** What a check found, as Fastify's validator for zod tells of it. */
export interface Finding {
  readonly keyword?: string;
  /** Like `/messages/2/content`. */
  readonly instancePath?: string;
  readonly message?: string;
  readonly params?: { readonly keys?: readonly string[]; readonly errors?: readonly (readonly Issue[])[] };
}

/** A zod issue of one branch of a union. */
interface Issue {
  readonly code?: string;
  readonly path?: readonly (string | number)[];
  readonly message?: string;
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
  // The engine and the library refuse what makes no sense with a RangeError that says what was seen.
  if (error instanceof RangeError && !error.message.startsWith("internal:"))
    return new ServerError("invalid_request", error.message, { cause: error });
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) return new ServerError("invalid_request", message);
  return new ServerError("internal", "something went wrong here; the server's log has more under this request's id", { cause: error });
}

/**
 * The finding as a sentence, and the field that it is about.
 * @param nameOf what the sentence calls a field. Default: the same.
 */
export function invalid(
  { keyword, instancePath = "", message = "is not valid", params }: Finding,
  nameOf = (param: string) => param,
): ServerError {
  const path = instancePath.split("/").filter((key) => key !== "");
  const about = (more: readonly (string | number)[], what: string): ServerError => {
    const param = pathOf([...path, ...more]);
    return new ServerError("invalid_request", param ? `${nameOf(param)}: ${what}` : what, { param: param || undefined });
  };
  if (keyword === "unrecognized_keys") return about((params?.keys ?? []).slice(0, 1), "there is no such field here");
  // Of a union, a branch that fits but for its length tells most, else the one that got furthest.
  const long = (params?.errors ?? []).flat().find(({ code, path: at = [] }) => code === "too_big" && at.length === 0);
  if (long) return about([], long.message ?? message);
  const furthest = (params?.errors ?? [])
    .flat()
    .reduce<Issue | null>((best, issue) => ((issue.path?.length ?? 0) > (best?.path?.length ?? 0) ? issue : best), null);
  if (furthest) return about(furthest.path ?? [], furthest.message ?? message);
  return about([], message);
}

/** As people write it: `messages[2].content`. */
function pathOf(path: readonly (string | number)[]): string {
  return path.reduce<string>((at, key) => (/^\d+$/.test(String(key)) ? `${at}[${key}]` : at ? `${at}.${key}` : String(key)), "");
}
