/**
 * Limits how many requests run at once and how many wait. Requests beyond that are rejected immediately, so that running ones
 * are not slowed. Owners take turns in the queue. Knows no protocol and no model.
 */
import { ServerError } from "../errors.ts";

export interface AdmissionLimits {
  readonly running: number;
  readonly queued: number;
  /** Requests of one owner, running and waiting; null: no limit per owner. */
  readonly perOwner: number | null;
  readonly queueSeconds: number;
}

/** A compute slot; `leave` frees it and is idempotent. */
export interface Place {
  readonly queuedSeconds: number;
  leave(): void;
}

interface Waiter {
  readonly owner: string;
  readonly since: number;
  settle(result: Place | ServerError): void;
}

/** Weight of the latest request in the moving average of request times. */
const LATEST = 0.05;

export class Admission {
  readonly #limits: AdmissionLimits;
  /** Waiting requests by owner; the owner whose turn it is comes first. */
  readonly #queue = new Map<string, Waiter[]>();
  /** Requests of each owner, running and waiting. */
  readonly #owners = new Map<string, number>();
  #running = 0;
  #queued = 0;
  #meanSeconds = 1;

  constructor(limits: AdmissionLimits) {
    this.#limits = limits;
  }

  get running(): number {
    return this.#running;
  }

  get queued(): number {
    return this.#queued;
  }

  /**
   * Waits for a compute slot. Rejects with ServerError `overloaded`: immediately when the queue is full or the owner has too
   * many requests, later when no slot became free in time. Aborting the signal leaves the queue and rejects with its reason.
   */
  async enter(owner: string, signal?: AbortSignal): Promise<Place> {
    signal?.throwIfAborted();
    this.check(owner);
    this.#owners.set(owner, (this.#owners.get(owner) ?? 0) + 1);
    if (this.#running < this.#limits.running) return this.#place(owner, 0);
    try {
      return await this.#wait(owner, signal);
    } catch (error) {
      this.#forget(owner);
      throw error;
    }
  }

  /** Throws ServerError `overloaded` when `enter` would reject immediately. */
  check(owner: string): void {
    const { perOwner, running, queued } = this.#limits;
    const own = this.#owners.get(owner) ?? 0;
    if (perOwner !== null && own >= perOwner)
      throw this.#overloaded(`this API key has ${own} requests in progress, which is its limit; try again when some have ended`);
    if (this.#running >= running && this.#queued >= queued)
      throw this.#overloaded(
        `the server is computing ${this.#running} requests and ${this.#queued} are waiting, which is its limit; try again later`,
      );
  }

  #overloaded(message: string): ServerError {
    const turns = (this.#queued + 1) / this.#limits.running;
    const retryAfterSeconds = Math.min(60, Math.max(1, Math.ceil(turns * this.#meanSeconds)));
    return new ServerError("overloaded", message, { retryAfterSeconds });
  }

  #place(owner: string, queuedSeconds: number): Place {
    const since = performance.now();
    let left = false;
    this.#running++;
    return {
      queuedSeconds,
      leave: () => {
        if (left) return;
        left = true;
        this.#running--;
        this.#meanSeconds += LATEST * ((performance.now() - since) / 1000 - this.#meanSeconds);
        this.#forget(owner);
        this.#callNext();
      },
    };
  }

  #wait(owner: string, signal?: AbortSignal): Promise<Place> {
    return new Promise((resolve, reject) => {
      const giveUp = (reason: unknown) => {
        this.#dequeue(waiter);
        finish();
        reject(reason);
      };
      const onAbort = () => giveUp(signal?.reason);
      const { queueSeconds } = this.#limits;
      const late = () => giveUp(this.#overloaded(`no place became free within ${queueSeconds} s; try again later`));
      const timer = setTimeout(late, queueSeconds * 1000);
      const finish = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", onAbort);
      };
      const waiter: Waiter = {
        owner,
        since: performance.now(),
        settle: (result) => {
          finish();
          if (result instanceof ServerError) reject(result);
          else resolve(result);
        },
      };
      signal?.addEventListener("abort", onAbort, { once: true });
      const line = this.#queue.get(owner);
      if (line) line.push(waiter);
      else this.#queue.set(owner, [waiter]);
      this.#queued++;
    });
  }

  /** Gives a free slot to the owner whose turn it is. */
  #callNext(): void {
    for (const [owner, line] of this.#queue) {
      const waiter = line[0];
      this.#dequeue(waiter);
      const rest = this.#queue.get(owner);
      if (rest) {
        this.#queue.delete(owner);
        this.#queue.set(owner, rest); // to the end of the queue
      }
      waiter.settle(this.#place(owner, (performance.now() - waiter.since) / 1000));
      return;
    }
  }

  /** Rejects all waiting requests: the server is shutting down. */
  close(): void {
    for (const line of [...this.#queue.values()])
      for (const waiter of [...line]) {
        this.#dequeue(waiter);
        waiter.settle(new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 1 }));
      }
  }

  #dequeue(waiter: Waiter): void {
    const line = this.#queue.get(waiter.owner);
    const at = line?.indexOf(waiter) ?? -1;
    if (!line || at < 0) return;
    line.splice(at, 1);
    this.#queued--;
    if (line.length === 0) this.#queue.delete(waiter.owner);
  }

  #forget(owner: string): void {
    const own = (this.#owners.get(owner) ?? 1) - 1;
    if (own === 0) this.#owners.delete(owner);
    else this.#owners.set(owner, own);
  }
}
