/** The inFlight that are under way: cuts off clients that take nothing of theirs, and waits for the last when the server goes down. */
import type { ServerResponse } from "node:http";

interface Watched {
  /** Bytes that had left when last looked at, and since when there were no more. */
  sent: number;
  since: number;
}

export class InFlight {
  readonly #open = new Map<ServerResponse, Watched>();
  readonly #stallMs: number;
  readonly #onStall: () => void;
  readonly #timer: NodeJS.Timeout;
  #idle: (() => void) | null = null;

  /** `stallSeconds`: how long a client may take nothing of bytes that wait for it. */
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

  /** Waits until all have ended; those that have not by then are cut off. Resolves with their number. */
  async drain(timeoutSeconds: number): Promise<number> {
    if (this.#open.size > 0) {
      const ended = new Promise<void>((resolve) => {
        this.#idle = resolve;
      });
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, timeoutSeconds * 1000);
      });
      await Promise.race([ended, late]);
      clearTimeout(timer);
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
