/** Responses in flight: how each ended, who stopped reading, and when the last is done at shutdown. Knows no route. */
import type { ServerResponse } from "node:http";
import { within } from "../deadline.ts";
import { ERRORS } from "../errors.ts";

interface Watched {
  /** Bytes sent at the last check, and when the number last changed. */
  sent: number;
  since: number;
  /** The status that stands for an incomplete response, unless its client left. */
  status: number;
}

export class InFlight {
  readonly #open = new Map<ServerResponse, Watched>();
  readonly #stallMs: number;
  readonly #onStall: () => void;
  readonly #timer: NodeJS.Timeout;
  #idle: (() => void) | null = null;

  /** @param stallSeconds how long a client may read nothing while bytes wait for it */
  constructor(stallSeconds: number, onStall: () => void) {
    this.#stallMs = stallSeconds * 1000;
    this.#onStall = onStall;
    this.#timer = setInterval(() => this.#cutStalled(), Math.min(1000, this.#stallMs / 2)).unref();
  }

  get count(): number {
    return this.#open.size;
  }

  /** @param onEnd called once, with the response's status, or 499 if the client left before it was complete */
  add(response: ServerResponse, onEnd: (status: number) => void = () => {}): void {
    const watched: Watched = { sent: 0, since: performance.now(), status: ERRORS.cancelled.status };
    this.#open.set(response, watched);
    let ended = false;
    const end = (status: number) => {
      if (!ended) onEnd(status);
      ended = true;
    };
    response.once("finish", () => end(response.statusCode));
    response.once("close", () => {
      this.#open.delete(response);
      end(watched.status);
      if (this.#open.size === 0) this.#idle?.();
    });
  }

  /** Breaks off a response whose headers are sent, so its reader can only see it end; `status` says why, in the log. */
  cut(response: ServerResponse, status: number): void {
    const watched = this.#open.get(response);
    if (watched) watched.status = status;
    response.destroy();
  }

  /** Waits for all responses to end, then disconnects the rest. Resolves with how many were cut off. */
  async drain(timeoutSeconds: number): Promise<number> {
    if (this.#open.size > 0) {
      const ended = new Promise<void>((resolve) => {
        this.#idle = resolve;
      });
      await within(timeoutSeconds * 1000, ended);
    }
    const left = this.#open.size;
    for (const response of this.#open.keys()) this.cut(response, ERRORS.not_ready.status);
    return left;
  }

  close(): void {
    clearInterval(this.#timer);
  }

  #cutStalled(): void {
    const now = performance.now();
    for (const [response, watched] of this.#open) {
      const { socket } = response;
      if (!socket) continue;
      const waiting = socket.writableLength;
      const sent = socket.bytesWritten - waiting;
      if (waiting === 0 || sent !== watched.sent) {
        watched.sent = sent;
        watched.since = now;
      } else if (now - watched.since >= this.#stallMs) {
        this.#onStall();
        socket.destroy();
      }
    }
  }
}
