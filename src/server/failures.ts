/** From whatever was thrown to what an HTTP client is told, in OpenAI's shape. Tells nothing of failures that are not the client's. */
import { hasZodFastifySchemaValidationErrors } from "fastify-type-provider-zod";
import { formatPath } from "./config.ts";
import { ERRORS, type ErrorCode, ServerError } from "./errors.ts";

/** The body of every failed reply. */
export interface ErrorBody {
  readonly error: { readonly message: string; readonly type: string; readonly param: string | null; readonly code: ErrorCode };
}

export interface Failure {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: ErrorBody;
  /** True if it is the server's fault: to be logged with its stack. */
  readonly internal: boolean;
}

/** Codes of Fastify's own errors, by ours. */
const FRAMEWORK: Readonly<Record<string, readonly [ErrorCode, string]>> = {
  FST_ERR_CTP_BODY_TOO_LARGE: ["request_too_large", "the request's body is too large"],
  FST_ERR_CTP_INVALID_MEDIA_TYPE: [
    "unsupported_media_type",
    "the request's body must be JSON, with the header 'Content-Type: application/json'",
  ],
};

export function failureOf(error: unknown): Failure {
  const known = error instanceof ServerError ? error : translate(error);
  const { status, type } = ERRORS[known.code];
  return {
    status,
    headers: known.retryAfterSeconds === null ? {} : { "retry-after": String(Math.max(1, Math.ceil(known.retryAfterSeconds))) },
    body: { error: { message: known.message, type, param: known.param, code: known.code } },
    internal: known.code === "internal",
  };
}

function translate(error: unknown): ServerError {
  if (hasZodFastifySchemaValidationErrors(error)) {
    const { path, message } = deepest(
      error.validation.map((v) => ({ ...v.params, path: pathOf(v.instancePath), message: v.message ?? "" })),
    );
    const where = formatPath(path);
    return new ServerError("invalid_request", where ? `${where}: ${message}` : message, where ? { param: where } : {});
  }
  const { statusCode, code, message } = error instanceof Error ? (error as Error & { statusCode?: number; code?: string }) : {};
  const mapped = code === undefined ? undefined : FRAMEWORK[code];
  if (mapped) return new ServerError(...mapped);
  // Fastify's other refusals (a broken URL, a length that does not match) are the client's, and their texts are fixed.
  if (code?.startsWith("FST_ERR_") && statusCode !== undefined && statusCode >= 400 && statusCode < 500)
    return new ServerError("invalid_request", message ?? "the request can't be read");
  return new ServerError("internal", "the server failed; its logs have the reason under this request's id", { cause: error });
}

interface Issue {
  readonly path: readonly PropertyKey[];
  readonly message: string;
  /** Of a union: what was wrong with each alternative. */
  readonly errors?: unknown;
  readonly keys?: unknown;
}

/** The first issue; of a union, that of the alternative which came furthest, since it is the one that was meant. */
function deepest(issues: readonly Issue[]): { path: readonly PropertyKey[]; message: string } {
  const [first] = issues;
  if (!Array.isArray(first.errors)) return named(first);
  const alternatives = (first.errors as readonly (readonly Issue[])[]).filter((each) => each.length > 0).map((each) => deepest(each));
  const best = alternatives.reduce<ReturnType<typeof deepest> | null>(
    (a, b) => (a === null || b.path.length > a.path.length ? b : a),
    null,
  );
  return best === null ? first : { path: [...first.path, ...best.path], message: best.path.length ? best.message : first.message };
}

/** An unknown field is blamed itself, not the object that holds it. */
function named(issue: Issue): Issue {
  return Array.isArray(issue.keys) && issue.keys.length > 0
    ? { path: [...issue.path, String(issue.keys[0])], message: "unknown field" }
    : issue;
}

function pathOf(instancePath: string): PropertyKey[] {
  return instancePath
    .split("/")
    .filter((part) => part !== "")
    .map((part) => (/^\d+$/.test(part) ? Number(part) : part));
}
