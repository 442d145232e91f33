/** Responses in flight: disconnects clients that stop reading, and waits for the last response on shutdown. Knows no route. */
import type { ServerResponse } from "node:http";
import { within } from "../deadline.ts";

interface Watched {
  /** Bytes sent at the last check, and when the number last changed. */
  sent: number;
  since: number;
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

  add(response: ServerResponse): void {
    this.#open.set(response, { sent: 0, since: performance.now() });
    response.once("close", () => {
      this.#open.delete(response);
      if (this.#open.size === 0) this.#idle?.();
    });
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
    for (const response of this.#open.keys()) response.socket?.destroy();
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
