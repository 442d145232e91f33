/**
 * A worker thread that does one job at a time. Owners take turns; jobs of clients that left never start, and one that runs on
 * without its client ends with the thread, which starts anew for the next. Knows no job.
 */
import { type TransferListItem, Worker } from "node:worker_threads";
import { Line } from "../grammar/turns.ts";

/** An idle thread ends after this time. */
const IDLE_MS = 60_000;
/** How long a job may run on after its client left: less than a new thread takes to start. */
const GRACE_MS = 100;

export interface JobTerms {
  /** Id of the caller. Default: one of its own, shared by all that give none. */
  readonly owner?: string;
  /** Aborted when the client leaves: the job then rejects with the signal's reason. */
  readonly signal?: AbortSignal;
  /** Buffers that move to the thread instead of being copied. */
  readonly transfer?: readonly TransferListItem[];
}

interface Waiting<Job, Outcome> {
  readonly job: Job;
  readonly owner: string;
  readonly transfer: readonly TransferListItem[];
  resolve(outcome: Outcome): void;
  reject(reason: unknown): void;
}

export class Thread<Job, Outcome> {
  readonly #script: URL;
  readonly #data: unknown;
  readonly #line = new Line<Waiting<Job, Outcome>>();
  #running: Waiting<Job, Outcome> | null = null;
  #worker: Worker | null = null;
  #idle: NodeJS.Timeout | undefined;

  /**
   * @param script what the thread runs (`threadScript`): it answers each message, a job, with one message, its outcome
   * @param data given to it as `workerData`
   */
  constructor(script: URL, data: unknown) {
    this.#script = script;
    this.#data = data;
  }

  /** Rejects when the thread fails or is closed. */
  async run(job: Job, { owner = "", signal, transfer = [] }: JobTerms = {}): Promise<Outcome> {
    signal?.throwIfAborted();
    let leave = () => {};
    return new Promise<Outcome>((resolve, reject) => {
      const waiting = { job, owner, transfer, resolve, reject };
      leave = () => this.#leave(waiting, signal?.reason);
      signal?.addEventListener("abort", leave);
      this.#line.add(owner, waiting);
      if (!this.#running) this.#next();
    }).finally(() => signal?.removeEventListener("abort", leave));
  }

  /** Ends the thread; its pending jobs reject with `reason`. */
  async close(reason: Error): Promise<void> {
    this.#running?.reject(reason);
    for (let waiting = this.#line.next(); waiting; waiting = this.#line.next()) waiting.reject(reason);
    this.#running = null;
    await this.#end();
  }

  #leave(waiting: Waiting<Job, Outcome>, reason: unknown): void {
    waiting.reject(reason);
    if (this.#running !== waiting) {
      this.#line.remove(waiting.owner, waiting);
      return;
    }
    const late = () => {
      if (this.#running !== waiting) return;
      void this.#end();
      this.#next();
    };
    setTimeout(late, GRACE_MS).unref();
  }

  #next(): void {
    clearTimeout(this.#idle);
    this.#running = this.#line.next() ?? null;
    if (this.#running) {
      this.#worker ??= this.#start();
      this.#worker.postMessage(this.#running.job, this.#running.transfer);
    } else if (this.#worker) this.#idle = setTimeout(() => void this.#end(), IDLE_MS).unref();
  }

  #start(): Worker {
    const worker = new Worker(this.#script, { workerData: this.#data });
    worker.unref(); // clients that wait keep the process alive, not the idle thread
    worker.on("message", (outcome: Outcome) => {
      if (worker !== this.#worker) return; // it was ended meanwhile
      this.#running?.resolve(outcome);
      this.#next();
    });
    // A fault costs the job in which it happened; the next starts a new thread.
    worker.on("error", (error) => {
      if (worker !== this.#worker) return;
      this.#worker = null;
      this.#running?.reject(error);
      this.#next();
    });
    return worker;
  }

  async #end(): Promise<void> {
    clearTimeout(this.#idle);
    const worker = this.#worker;
    this.#worker = null;
    await worker?.terminate();
  }
}

/**
 * What a thread runs: the built file or, where this code itself runs from source, the source through tsx.
 * @param from `import.meta.url` of the caller
 * @param name the script's file beside it, without its ending
 */
export function threadScript(from: string, name: string): URL {
  if (!from.endsWith(".ts")) return new URL(`${name}.js`, from);
  const [tsx, source] = [import.meta.resolve("tsx/esm/api"), new URL(`${name}.ts`, from).href];
  // `--import tsx` does not reach worker threads, so the thread registers it itself.
  const code = `import { register } from ${JSON.stringify(tsx)}; register(); await import(${JSON.stringify(source)});`;
  return new URL(`data:text/javascript,${encodeURIComponent(code)}`);
}
