/**
 * Talks to a hub over HTTP: authentication, which failures are worth a retry, and error responses as one-line messages.
 * Knows neither the cache nor the files.
 */
import { CheckpointError, errorCode, errorText } from "./error.ts";

/** One repository on a hub. */
export interface Remote {
  /** For example `https://huggingface.co`; without a slash at the end. */
  readonly endpoint: string;
  /** The repository's id, for errors. */
  readonly id: string;
  readonly revision: string;
  readonly token: string | undefined;
  readonly signal: AbortSignal | undefined;
  /** Delay before the second attempt, doubled for each further one. */
  readonly retryDelayMs: number;
  /** Called before a wait, with its reason and length. */
  readonly onRetry?: (message: string) => void;
}

/** Number of failed attempts in a row after which the failure is reported. */
export const ATTEMPTS = 5;

/** A failure that a retry may fix: no connection, a broken one, or a server error. */
export class Unavailable extends Error {
  override readonly name = "Unavailable";
  /** Whether there is no way to the hub at all, which seconds seldom change: no network, no such host, nobody listens. */
  get unreachable(): boolean {
    return NO_WAY.has(networkCode(this.cause) ?? "");
  }
}

const NO_WAY: ReadonlySet<string> = new Set(["ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN"]);

/**
 * `fetch` for a hub: with its token (sent to that origin only), and with error responses thrown.
 * @throws Unavailable, CheckpointError if the hub rejects the request, or the reason of the signal
 */
export function remoteFetch(remote: Remote): typeof fetch {
  return async (input, init) => {
    const url = input instanceof Request ? input.url : String(input);
    const headers = new Headers(init?.headers);
    if (remote.token && new URL(url).origin === new URL(remote.endpoint).origin) headers.set("authorization", `Bearer ${remote.token}`);
    let response: Response;
    try {
      response = await fetch(input, { ...init, headers, ...(remote.signal && { signal: remote.signal }) });
    } catch (cause) {
      remote.signal?.throwIfAborted();
      throw new Unavailable(`can't reach ${remote.endpoint} (${networkText(cause)})`, { cause });
    }
    if (response.ok) return response;
    await response.body?.cancel();
    throw refusal(remote, url, response);
  };
}

/**
 * Runs an operation until it succeeds, up to `attempts` times, with growing delays; a hub that cannot be reached at all is not tried
 * again. A body that breaks off shows up as a `TypeError` or broken JSON, and is retried too.
 * @throws the last Unavailable, whatever else the operation throws, or the reason of the signal
 */
export async function retrying<T>(remote: Remote, attempts: number, operation: () => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    let failure: Unavailable | undefined;
    try {
      return await operation();
    } catch (error) {
      remote.signal?.throwIfAborted();
      failure = asUnavailable(remote, error);
      if (!failure) throw error;
      if (attempt >= attempts || failure.unreachable)
        throw attempt === 1 ? failure : new Unavailable(`${failure.message}, ${attempt} times in a row`, { cause: error });
    }
    await delay(remote, attempt, failure);
  }
}

/** Waits before attempt `attempt + 1`, and says why. */
export async function delay(remote: Remote, attempt: number, { message }: Unavailable): Promise<void> {
  const seconds = (remote.retryDelayMs * 2 ** (attempt - 1)) / 1000;
  remote.onRetry?.(`${remote.id}: ${message}; trying again in ${Number(seconds.toFixed(1))} s (attempt ${attempt + 1} of ${ATTEMPTS})`);
  await new Promise<void>((resolve) => {
    const done = () => {
      clearTimeout(timer);
      remote.signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, remote.retryDelayMs * 2 ** (attempt - 1));
    remote.signal?.addEventListener("abort", done);
  });
  remote.signal?.throwIfAborted();
}

/** The system's code of a network failure, if there is one. */
function networkCode(error: unknown): string | undefined {
  const cause = error instanceof Error ? error.cause : undefined;
  return errorCode(cause instanceof AggregateError && cause.errors.length > 0 ? cause.errors[0] : cause);
}

/** The reason of a network failure, which Node wraps in "fetch failed". */
export function networkText(error: unknown): string {
  const cause = error instanceof Error ? error.cause : undefined;
  if (cause instanceof AggregateError && cause.errors.length > 0) return errorText(cause.errors[0]);
  return errorText(cause ?? error);
}

function asUnavailable(remote: Remote, error: unknown): Unavailable | undefined {
  if (error instanceof Unavailable) return error;
  if (error instanceof TypeError || error instanceof SyntaxError) {
    return new Unavailable(`${remote.endpoint} sent an incomplete response (${networkText(error)})`, { cause: error });
  }
  return undefined;
}

function refusal({ endpoint, id, revision, token }: Remote, url: string, { status, headers }: Response): Error {
  if (status >= 500 || status === 408 || status === 429) {
    return new Unavailable(status === 429 ? `${endpoint} answers 429, too many requests` : `${endpoint} answers ${status}`);
  }
  const said = headers.get("x-error-message");
  const why = said ? ` ("${said.slice(0, 200)}")` : "";
  switch (status) {
    case 401:
    case 403: {
      const remedy = token
        ? "the token that was sent may not read it: ask for access, or set another HF_TOKEN"
        : "set HF_TOKEN to a token that may read it";
      const what = `${endpoint} answers ${status}${why}: private, gated or nonexistent, and no local folder has this name`;
      return new CheckpointError(id, `${what}; ${remedy}`);
    }
    case 404:
      switch (headers.get("x-error-code")) {
        case "RevisionNotFound":
          return new CheckpointError(id, `no revision ${revision} at ${endpoint} (404); check the branch, tag or commit`);
        case "EntryNotFound":
          return new CheckpointError(id, `no file ${new URL(url).pathname} at ${endpoint} (404)`);
        default:
          return new CheckpointError(
            id,
            `not found: no repository (or revision ${revision}) at ${endpoint} (404), and no local folder has this name`,
          );
      }
    default:
      return new CheckpointError(id, `${endpoint} answers ${status}${why} to ${url}`);
  }
}
