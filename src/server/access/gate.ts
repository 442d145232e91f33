/** Who may use the server, and when: checks keys, rates, budgets and capacity, in this order. Knows neither HTTP nor gRPC. */
import { unwatchFile, watchFile } from "node:fs";
import { ServerError } from "../errors.ts";
import type { Logger } from "../logs.ts";
import { Admission, type AdmissionLimits, type Place } from "./admission.ts";
import { type ApiKey, KeyRing, readKeys, refusal } from "./keys.ts";
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
  readonly usageFile: string | null;
  readonly limits: AdmissionLimits;
  readonly log: Logger;
}

const ANONYMOUS: Caller = { id: "anonymous", models: null };

/** How often the key file is checked for changes. */
const RELOAD_MS = 1000;

export class Gate {
  readonly admission: Admission;
  readonly #keyFile: string | null;
  readonly #quota: Quota;
  readonly #log: Logger;
  #ring: KeyRing;

  private constructor(options: GateOptions, ring: KeyRing, quota: Quota) {
    this.admission = new Admission(options.limits);
    this.#keyFile = options.keyFile;
    this.#log = options.log;
    this.#ring = ring;
    this.#quota = quota;
    if (this.#keyFile !== null) watchFile(this.#keyFile, { interval: RELOAD_MS, persistent: false }, this.#reload);
  }

  /** Rejects when the key file or the record of used tokens is broken. */
  static async open(options: GateOptions): Promise<Gate> {
    const { keyFile, log } = options;
    const ring = new KeyRing(keyFile === null ? [] : await readKeys(keyFile));
    const file = keyFile === null ? null : (options.usageFile ?? `${keyFile}.usage`);
    const onSaveError = (err: unknown) => log.error({ err }, "cannot save the used tokens");
    return new Gate(options, ring, await Quota.open({ file, onSaveError }));
  }

  /** False when the server has no keys and serves everyone. */
  get asksForKeys(): boolean {
    return this.#keyFile !== null;
  }

  /** The caller a key belongs to. Throws ServerError `invalid_api_key`. */
  authenticate(secret: string | null): Caller {
    if (!this.asksForKeys) return ANONYMOUS;
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
    if (this.#keyFile !== null) unwatchFile(this.#keyFile, this.#reload);
    this.admission.close();
    await this.#quota.close();
  }

  #keyOf(caller: Caller): ApiKey | null {
    return this.asksForKeys ? this.#ring.get(caller.id) : null;
  }

  /** A file that can't be read leaves the keys unchanged: a bad edit must not invalidate every key. */
  readonly #reload = (): void => {
    readKeys(this.#keyFile as string).then(
      (keys) => {
        this.#ring = new KeyRing(keys);
        this.#log.info({ keys: keys.length }, "API keys reloaded");
      },
      (err) => this.#log.error({ err }, "cannot reload the API keys; the previous ones stay valid"),
    );
  };
}

/** The key in an Authorization header; null without one. */
export function bearerToken(header: string | undefined): string | null {
  const [, token] = /^Bearer +(\S+)$/i.exec(header ?? "") ?? [];
  return token ?? null;
}
