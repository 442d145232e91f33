/** Server-sent events: written one at a time, waiting for slow readers, so that nothing piles up in memory. Knows no content. */
import type { ServerResponse } from "node:http";

const KEEP_ALIVE_MS = 15_000;

export class EventStream {
  readonly #response: ServerResponse;
  readonly #keepAlive: NodeJS.Timeout;
  #turn: Promise<void> = Promise.resolve();

  /** Sends the headers. The caller must have hijacked the response from the framework. */
  constructor(response: ServerResponse, headers: Readonly<Record<string, string>> = {}) {
    this.#response = response;
    response.writeHead(200, {
      ...headers,
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache, no-transform",
      "x-accel-buffering": "no",
    });
    response.flushHeaders();
    this.#keepAlive = setInterval(() => void this.#write(": keep-alive\n\n"), KEEP_ALIVE_MS);
    this.#keepAlive.unref();
  }

  /** Resolves when the event has been handed to the socket; immediately if the reader has gone. */
  send(data: unknown, event?: string): Promise<void> {
    return this.#write(
      `${event === undefined ? "" : `event: ${event}\n`}data: ${typeof data === "string" ? data : JSON.stringify(data)}\n\n`,
    );
  }

  async end(): Promise<void> {
    await this.#turn;
    clearInterval(this.#keepAlive);
    this.#response.end();
  }

  #write(text: string): Promise<void> {
    this.#turn = this.#turn.then(() => this.#flush(text));
    return this.#turn;
  }

  #flush(text: string): Promise<void> {
    const response = this.#response;
    if (response.destroyed || response.writableEnded || response.write(text)) return Promise.resolve();
    return new Promise((resolve) => {
      const done = () => {
        response.off("drain", done);
        response.off("close", done);
        resolve();
      };
      response.on("drain", done).on("close", done);
    });
  }
}
