/** Who may use the server, and when: checks keys, rates, budgets and capacity, in this order. Knows neither HTTP nor gRPC. */
import { ServerError } from "../errors.ts";
import type { Logger } from "../logs.ts";
import { Admission, type AdmissionLimits, type Place } from "./admission.ts";
import { type ApiKey, isMountedAlone, KeyFileError, KeyRing, parseKeys, readKeyText, refusal } from "./keys.ts";
import { type Allowance, Quota } from "./quota.ts";

/** The authenticated client. */
export interface Caller {
  /** Id of the key, or "anonymous" where the server has no keys. Requests of one caller share a turn in the engine. */
  readonly id: string;
  /** Models that the key may use; null: all. */
  readonly models: readonly string[] | null;
}

export interface GateOptions {
  /** Null: no key is needed; every caller is "anonymous". */
  readonly keyFile: string | null;
  /** How long the keys last read stay valid while the file can't be read. Default 60. */
  readonly graceSeconds?: number;
  readonly usageFile: string | null;
  readonly limits: AdmissionLimits;
  readonly log: Logger;
}

const ANONYMOUS: Caller = { id: "anonymous", models: null };

/** How often the key file is read. Its whole text is compared: no date or size could hide a change. */
const RELOAD_MS = 1000;
/** A file system that does not answer for this long counts as a file that can't be read. */
const PATIENCE_MS = 10_000;

/** Why the keys in use may be out of date. */
export interface KeysFault {
  /** Without the file's name and content. */
  readonly reason: string;
  /** Since the keys were last known to be right. */
  readonly seconds: number;
  /** Whether the grace is over. */
  readonly refusing: boolean;
}

export class Gate {
  readonly admission: Admission;
  readonly #keyFile: string | null;
  readonly #graceMs: number;
  readonly #quota: Quota;
  readonly #log: Logger;
  #text: string;
  #ring: KeyRing;
  #reason: string | null = null;
  #readAt = performance.now();
  #refusalLogged = false;
  #timer: NodeJS.Timeout | null = null;
  #closed = false;
  /** Called when the key file can't be read any more, and when it can again. */
  onFault: (unreadable: boolean) => void = () => {};

  private constructor(options: GateOptions, text: string, ring: KeyRing, quota: Quota) {
    this.admission = new Admission(options.limits);
    this.#keyFile = options.keyFile;
    this.#graceMs = (options.graceSeconds ?? 60) * 1000;
    this.#log = options.log;
    this.#text = text;
    this.#ring = ring;
    this.#quota = quota;
    if (this.#keyFile !== null) this.#checkLater(this.#keyFile);
  }

  /** Rejects when the key file or the record of used tokens is broken. */
  static async open(options: GateOptions): Promise<Gate> {
    const { keyFile, log } = options;
    const text = keyFile === null ? "" : await readKeyText(keyFile);
    const ring = new KeyRing(keyFile === null ? [] : parseKeys(keyFile, text));
    if (keyFile !== null && (await isMountedAlone(keyFile)))
      log.warn("the key file is mounted by itself: changes made by renaming a new file into place will not arrive; mount its directory");
    const file = keyFile === null ? null : (options.usageFile ?? `${keyFile}.usage`);
    const onSaveError = (err: unknown) => log.error({ err }, "cannot save the used tokens");
    return new Gate(options, text, ring, await Quota.open({ file, onSaveError }));
  }

  /** Null while the keys in use are those of the file. */
  get keysFault(): KeysFault | null {
    if (this.#keyFile === null) return null;
    const since = performance.now() - this.#readAt;
    const reason = this.#reason ?? (since > PATIENCE_MS ? "its file system does not answer" : null);
    if (reason === null) return null;
    return { reason, seconds: since / 1000, refusing: since >= this.#graceMs };
  }

  /** False when the server has no keys and serves everyone. */
  get asksForKeys(): boolean {
    return this.#keyFile !== null;
  }

  /** The caller a key belongs to. Throws ServerError `invalid_api_key`, or `not_ready` when no key can be trusted. */
  authenticate(secret: string | null): Caller {
    if (!this.asksForKeys) return ANONYMOUS;
    if (this.keysFault?.refusing)
      throw new ServerError("not_ready", "the server can't read its key file, so it can't tell which keys are valid and accepts none", {
        retryAfterSeconds: 10,
      });
    if (secret === null) throw new ServerError("invalid_api_key", "an API key is needed: send the header 'Authorization: Bearer mxt_…'");
    const key = this.#ring.find(secret);
    if (key === null) throw new ServerError("invalid_api_key", "this API key is not known");
    const why = refusal(key);
    if (why !== null) throw new ServerError("invalid_api_key", `this API key ${why === "revoked" ? "was revoked" : "has expired"}`);
    return { id: key.id, models: key.models };
  }

  /**
   * Waits for a compute slot. Rejects with ServerError `budget_exceeded`, `rate_limit_exceeded` or `overloaded`. The slot is
   * freed with `leave` when the request has ended.
   */
  async enter(caller: Caller, signal?: AbortSignal): Promise<Place> {
    const key = this.#keyOf(caller);
    this.admission.check(caller.id); // before the rate: a rejected request uses none of it
    if (key) this.#quota.take(key);
    return this.admission.enter(caller.id, signal);
  }

  /** What remains of the caller's limits; null where the key has none. */
  allowance(caller: Caller): Allowance | null {
    const key = this.#keyOf(caller);
    return key && this.#quota.allowance(key);
  }

  /** Charges tokens, of prompt and answer, to the caller's budget. */
  charge(callerId: string, tokens: number): void {
    if (this.asksForKeys) this.#quota.charge(callerId, tokens);
  }

  async close(): Promise<void> {
    this.#closed = true;
    if (this.#timer) clearTimeout(this.#timer);
    this.admission.close();
    await this.#quota.close();
  }

  #keyOf(caller: Caller): ApiKey | null {
    return this.asksForKeys ? this.#ring.get(caller.id) : null;
  }

  #checkLater(file: string): void {
    this.#timer = setTimeout(() => {
      void this.#check(file).then(() => {
        if (!this.#closed) this.#checkLater(file);
      });
    }, RELOAD_MS).unref();
  }

  /** A bad edit does not invalidate every key at once, but an unreadable file must not keep revoked ones valid for ever. */
  async #check(file: string): Promise<void> {
    try {
      const text = await readKeyText(file);
      if (text !== this.#text) {
        const keys = parseKeys(file, text);
        this.#ring = new KeyRing(keys);
        this.#text = text;
        this.#log.info({ keys: keys.length }, "API keys reloaded");
      } else if (this.#reason !== null) this.#log.info("the key file can be read again");
      if (this.#reason !== null) this.onFault(false);
      this.#reason = null;
      this.#refusalLogged = false;
      this.#readAt = performance.now();
    } catch (err) {
      const reason = err instanceof KeyFileError ? err.reason : "internal error";
      if (reason !== this.#reason)
        this.#log.error({ err }, `cannot read the API keys; the previous ones stay valid for ${this.#graceMs / 1000} s`);
      if (this.#reason === null) this.onFault(true);
      this.#reason = reason;
      if (this.keysFault?.refusing && !this.#refusalLogged) {
        this.#refusalLogged = true;
        this.#log.error({ reason }, "the grace for the unreadable API keys is over; all keys are refused");
      }
    }
  }
}

/** The key in an Authorization header; null without one. */
export function bearerToken(header: string | undefined): string | null {
  const [, token] = /^Bearer +(\S+)$/i.exec(header ?? "") ?? [];
  return token ?? null;
}
