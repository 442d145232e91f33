/** Problems that validation finds in the input, as errors for clients. Knows zod's issues and no protocol. */
import { ServerError } from "./errors.ts";

/** One problem in the input, as Fastify's zod validator reports it. */
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

/**
 * A finding as an `invalid_request` error: a sentence and the field that it is about.
 * @param nameOf the sentence's name for a field. Default: unchanged.
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
  // Of a union, a branch that fits but for its length explains most, else the branch that got furthest.
  const long = (params?.errors ?? []).flat().find(({ code, path: at = [] }) => code === "too_big" && at.length === 0);
  if (long) return about([], long.message ?? message);
  const furthest = (params?.errors ?? [])
    .flat()
    .reduce<Issue | null>((best, issue) => ((issue.path?.length ?? 0) > (best?.path?.length ?? 0) ? issue : best), null);
  if (furthest) return about(furthest.path ?? [], furthest.message ?? message);
  return about([], message);
}

/** A path as people write it: `messages[2].content`. */
function pathOf(path: readonly (string | number)[]): string {
  return path.reduce<string>((at, key) => (/^\d+$/.test(String(key)) ? `${at}[${key}]` : at ? `${at}.${key}` : String(key)), "");
}
