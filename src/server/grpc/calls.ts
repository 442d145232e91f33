/**
 * The lifecycle of a call: admission, the handler, responses at the client's pace, the status, and the report for the log. Knows
 * no method.
 */
import { Metadata, type ServerUnaryCall, type ServerWritableStream, type sendUnaryData } from "@grpc/grpc-js";
import type { Caller } from "../access/gate.ts";
import { within } from "../deadline.ts";
import { ServerError } from "../errors.ts";
import { requestId } from "../logs.ts";
import type { Entrance } from "./entrance.ts";
import type { CallReport } from "./report.ts";
import { failureOf } from "./status.ts";

export interface CallsOptions {
  readonly entrance: Entrance;
  /** Waits for a compute slot. Rejects with ServerError `overloaded`, `rate_limit_exceeded` or `budget_exceeded`. */
  readonly enter: (caller: Caller, signal: AbortSignal) => Promise<{ leave(): void }>;
  /** The checked request of a method. Rejects with ServerError `invalid_request` or `overloaded`. */
  readonly read: (method: string, message: Buffer, owner: string, signal: AbortSignal) => Promise<unknown>;
  /** How long a client may read nothing while a response waits, before it is cut off. */
  readonly stallMs: number;
  readonly onEnd: (report: CallReport) => void;
}

export interface Context {
  readonly caller: Caller;
  /** Aborted when the client leaves, its deadline passes, or the server shuts down. */
  readonly signal: AbortSignal;
}

export interface StreamContext extends Context {
  /** Sends a message. Resolves when the client can take the next one; rejects when the client is gone. */
  send(message: object): Promise<void>;
}

export interface MethodOptions {
  /** Whether the method needs a compute slot. Default true. */
  readonly computes?: boolean;
  /** The name here of a field of the HTTP bodies. Default: the same. */
  readonly fieldOf?: (param: string) => string;
}

type Call = ServerUnaryCall<unknown, unknown> | ServerWritableStream<unknown, unknown>;

const GONE = new ServerError("timeout", "the client has disconnected, or its deadline has passed");

export class Calls {
  readonly #options: CallsOptions;
  readonly #open = new Set<AbortController>();
  #draining = false;
  #idle: (() => void) | null = null;
  #messages = 0;

  constructor(options: CallsOptions) {
    this.#options = options;
  }

  /** Stream messages sent so far. */
  get messages(): number {
    return this.#messages;
  }

  /** A method with one response. */
  unary<Q>(act: (request: Q, context: Context) => Promise<object>, options: MethodOptions = {}) {
    return (call: ServerUnaryCall<unknown, unknown>, done: sendUnaryData<unknown>): void => {
      let answer: object = {};
      void this.#run(
        call,
        options,
        async (request, context) => {
          answer = await act(request as Q, context);
        },
        (failure, metadata) => (failure ? done(failure) : done(null, answer, metadata)),
      );
    };
  }

  /** A method with a stream of responses. */
  stream<Q>(act: (request: Q, context: StreamContext) => Promise<void>, options: MethodOptions = {}) {
    return (call: ServerWritableStream<unknown, unknown>): void => {
      void this.#run(
        call,
        options,
        (request, context) => act(request as Q, { ...context, send: (message) => this.#send(call, message, context.signal) }),
        (failure, metadata) => {
          if (call.cancelled) return;
          if (failure) call.emit("error", failure);
          else call.end(metadata);
        },
      );
    };
  }

  /** Rejects new calls, waits for open ones, and cuts off the rest after `timeoutMs`. Resolves with how many were cut off. */
  async drain(timeoutMs: number): Promise<number> {
    this.#draining = true;
    if (this.#open.size === 0) return 0;
    const ended = new Promise<void>((resolve) => {
      this.#idle = resolve;
    });
    await within(timeoutMs, ended);
    const left = this.#open.size;
    for (const open of this.#open)
      open.abort(new ServerError("not_ready", "the server shut down during the call", { retryAfterSeconds: 1 }));
    return left;
  }

  async #run(
    call: Call,
    { computes = true, fieldOf }: MethodOptions,
    act: (request: unknown, context: Context) => Promise<void>,
    settle: (failure: ReturnType<typeof failureOf>["failure"] | null, metadata: Metadata) => void,
  ): Promise<void> {
    const start = performance.now();
    const id = requestId(call.metadata.get("x-request-id")[0]);
    const gone = new AbortController();
    call.on("cancelled", () => gone.abort(GONE));
    this.#open.add(gone);
    let callerId = "";
    let place: { leave(): void } | null = null;
    let failed: unknown = null;
    try {
      const caller = this.#options.entrance.callerOf(call.metadata);
      callerId = caller.id;
      if (this.#draining)
        throw new ServerError("not_ready", "the server is shutting down; another instance may answer", { retryAfterSeconds: 1 });
      // The library passes on calls whose deadline had passed before they arrived, and never cancels them.
      if (call.cancelled || Number(call.getDeadline()) <= Date.now()) throw GONE;
      if (computes) place = await this.#options.enter(caller, gone.signal);
      if (gone.signal.aborted) throw gone.signal.reason;
      // Read after admission: a wrong message costs its sender a place and a part of its rate.
      const method = call.getPath().slice(call.getPath().lastIndexOf("/") + 1);
      const request = await this.#options.read(method, call.request as Buffer, caller.id, gone.signal);
      await act(request, { caller, signal: gone.signal });
      if (gone.signal.aborted) throw gone.signal.reason;
    } catch (error) {
      failed = error;
    } finally {
      place?.leave();
      this.#open.delete(gone);
      if (this.#open.size === 0) this.#idle?.();
    }
    const report = { requestId: id, path: call.getPath(), callerId };
    const seconds = (performance.now() - start) / 1000;
    if (failed === null) {
      const metadata = new Metadata();
      metadata.set("x-request-id", id);
      settle(null, metadata);
      this.#options.onEnd({ ...report, outcome: "ok", seconds });
      return;
    }
    const { failure, known } = failureOf(failed, fieldOf);
    failure.metadata.set("x-request-id", id);
    settle(failure, failure.metadata);
    this.#options.onEnd({ ...report, outcome: failed === GONE ? "cancelled" : known.code, seconds, error: failed });
  }

  async #send(call: ServerWritableStream<unknown, unknown>, message: object, signal: AbortSignal): Promise<void> {
    if (signal.aborted) throw signal.reason;
    this.#messages++;
    if (!call.write(message)) await this.#drained(call, signal);
  }

  /** Waits until the client has read what was written. */
  #drained(call: ServerWritableStream<unknown, unknown>, signal: AbortSignal): Promise<void> {
    const { stallMs } = this.#options;
    return new Promise((resolve, reject) => {
      const stalled = () => finish(new ServerError("timeout", `the client read nothing for ${stallMs / 1000} s`));
      const timer = setTimeout(stalled, stallMs);
      const onDrain = () => finish(null);
      const onAbort = () => finish(signal.reason);
      const finish = (error: unknown) => {
        clearTimeout(timer);
        call.off("drain", onDrain);
        signal.removeEventListener("abort", onAbort);
        if (error === null) resolve();
        else reject(error);
      };
      call.on("drain", onDrain);
      signal.addEventListener("abort", onAbort, { once: true });
      if (signal.aborted) onAbort();
    });
  }
}
