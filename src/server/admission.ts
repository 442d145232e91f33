/** Who is let in: by key, by rate and budget, and as many at once as there is room for. The same for every protocol. */
import { ServerError } from "./errors.ts";
import type { KeyRing, StoredKey } from "./keys.ts";
import type { Caller } from "./served.ts";

const ANYONE: Caller = { id: "anonymous", models: null };

export interface Visitor {
  readonly caller: Caller;
  /** Null where the server has no keys. */
  readonly key: StoredKey | null;
}

export class Admission {
  readonly #ring: KeyRing | null;
  readonly #most: number;
  readonly #mostPerKey: number;
  readonly #onChange: (inProgress: number) => void;
  readonly #byCaller = new Map<string, number>();
  #total = 0;
  /** Nobody is let in any more. */
  draining = false;

  /** @param onChange told how many requests are in progress */
  constructor(ring: KeyRing | null, most: number, mostPerKey: number, onChange: (inProgress: number) => void) {
    this.#ring = ring;
    this.#most = most;
    this.#mostPerKey = mostPerKey;
    this.#onChange = onChange;
  }

  get inProgress(): number {
    return this.#total;
  }

  /** Throws ServerError `invalid_api_key`. */
  authenticate(secret: string | null): Visitor {
    return this.#ring?.authenticate(secret) ?? { caller: ANYONE, key: null };
  }

  /** Takes a place until `release`. Throws ServerError where there is none, or where the key's rate or budget is used up. */
  enter({ caller, key }: Visitor): { readonly headers: Readonly<Record<string, string>>; release(): void } {
    if (this.draining) throw new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 5 });
    const own = this.#byCaller.get(caller.id) ?? 0;
    const full = this.#total >= this.#most ? this.#most : key && own >= this.#mostPerKey ? this.#mostPerKey : null;
    if (full !== null)
      throw new ServerError("overloaded", `${full} requests are in progress, which is as many as are taken; try again soon`, {
        retryAfterSeconds: 1 + Math.random() * 4, // so that they do not all come back at once
      });
    const headers = key && this.#ring ? this.#ring.admit(key) : {};
    this.#count(caller.id, 1);
    let released = false;
    return {
      headers,
      release: () => {
        if (!released) this.#count(caller.id, -1);
        released = true;
      },
    };
  }

  #count(id: string, by: 1 | -1): void {
    this.#total += by;
    const left = (this.#byCaller.get(id) ?? 0) + by;
    if (left > 0) this.#byCaller.set(id, left);
    else this.#byCaller.delete(id);
    this.#onChange(this.#total);
  }
}
