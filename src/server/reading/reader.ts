/**
 * Reads what clients send without blocking the event loop: small bodies in turns, large ones in one thread that all routes share.
 * Owners take turns in both, and the bytes that are held for them have a bound. Knows no connection.
 */
import { Turns } from "../../grammar/turns.ts";
import { ServerError } from "../errors.ts";
import { Thread, threadScript } from "../thread.ts";
import { type Reading, read } from "./reading.ts";
import type { Job, Outcome } from "./worker.ts";

/** Bodies of at least this size may take milliseconds to read, which makes the thread worthwhile. */
const LARGE_BYTES = 16_384;
/** The most bytes that are held together for bodies that arrive or wait, beyond one of each owner. */
const MOST_HELD = 64 * 2 ** 20;

export interface ReaderOptions {
  /** Largest body. */
  readonly maxBytes: number;
  /** Deepest nesting of JSON. */
  readonly maxJsonDepth: number;
}

/** A body that arrives in chunks. `release` frees what is held for it and is idempotent. */
export interface Arrival {
  /** Takes a chunk, which the caller no longer uses. Throws ServerError `request_too_large` or `overloaded`. */
  add(chunk: Uint8Array): void;
  /**
   * The checked value. Rejects with ServerError `invalid_request`, or the signal's reason.
   * @param reading a function reads here, whatever the size
   */
  read(reading: Reading | ((bytes: Buffer) => unknown), signal?: AbortSignal): Promise<unknown>;
  release(): void;
}

export class Reader {
  readonly #options: ReaderOptions;
  readonly #turns = new Turns();
  readonly #thread: Thread<Job, Outcome>;
  /** Bytes held for each owner, and for all. */
  readonly #owners = new Map<string, number>();
  #held = 0;

  constructor(options: ReaderOptions) {
    this.#options = options;
    this.#thread = new Thread(threadScript(import.meta.url, "worker"), options.maxJsonDepth);
  }

  /** A body of this owner, still empty. */
  arrival(owner: string): Arrival {
    const { maxBytes } = this.#options;
    const chunks = new Chunks();
    let bytes = 0;
    return {
      add: (chunk) => {
        if (bytes + chunk.length > maxBytes) throw tooLarge(maxBytes);
        this.#hold(owner, chunk.length);
        bytes += chunk.length;
        chunks.add(chunk);
      },
      read: (reading, signal) => this.#read(reading, chunks.take(), bytes, owner, signal),
      release: () => {
        this.#hold(owner, -bytes);
        bytes = 0;
      },
    };
  }

  /** The checked value of bytes that are here already and that the caller no longer uses. Rejects as `Arrival` does. */
  async read(reading: Reading, bytes: Uint8Array, owner: string, signal?: AbortSignal): Promise<unknown> {
    const arrival = this.arrival(owner);
    try {
      arrival.add(bytes);
      return await arrival.read(reading, signal);
    } finally {
      arrival.release();
    }
  }

  /** Ends the thread. */
  async close(): Promise<void> {
    await this.#thread.close(new ServerError("not_ready", "the server is shutting down", { retryAfterSeconds: 1 }));
  }

  async #read(
    reading: Reading | ((bytes: Buffer) => unknown),
    chunks: readonly Uint8Array<ArrayBuffer>[],
    bytes: number,
    owner: string,
    signal?: AbortSignal,
  ): Promise<unknown> {
    const { maxJsonDepth } = this.#options;
    if (typeof reading === "function") return this.#turns.take(() => reading(Buffer.concat(chunks)), owner);
    if (bytes < LARGE_BYTES) return this.#turns.take(() => read(reading, Buffer.concat(chunks), maxJsonDepth), owner);
    const transfer = chunks.map(({ buffer }) => buffer);
    const outcome = await this.#thread.run({ reading, chunks }, { owner, signal, transfer });
    switch (outcome.kind) {
      case "read":
        return outcome.value;
      case "refused":
        throw new ServerError("invalid_request", outcome.message, { param: outcome.param ?? undefined });
      case "failed":
        throw new Error(`reading failed: ${outcome.message}`);
      default:
        return outcome satisfies never;
    }
  }

  /** One body of each owner is always taken; more only while all of them together are within the bound. */
  #hold(owner: string, bytes: number): void {
    const own = (this.#owners.get(owner) ?? 0) + bytes;
    if (bytes > 0 && own > this.#options.maxBytes && this.#held + bytes > MOST_HELD)
      throw new ServerError("overloaded", "too many large bodies are being read; try again later", { retryAfterSeconds: 1 });
    this.#held += bytes;
    if (own > 0) this.#owners.set(owner, own);
    else this.#owners.delete(owner);
  }
}

/** A message's frame in gRPC stands before it in the same memory. */
const FRAME_BYTES = 5;
/** Sizes of the blocks that small chunks are gathered in. */
const [LEAST_BLOCK, MOST_BLOCK] = [4096, 65_536];

/**
 * The chunks of a body, in memory of their own that moves to the thread: nothing copies a whole body on the event loop. Small
 * chunks share blocks, since a client may send a byte at a time.
 */
class Chunks {
  readonly #done: Uint8Array<ArrayBuffer>[] = [];
  #block = new Uint8Array(0);
  #filled = 0;
  #bytes = 0;

  add(chunk: Uint8Array): void {
    this.#bytes += chunk.length;
    if (chunk.length >= LARGE_BYTES && fillsItsMemory(chunk)) {
      this.#flush();
      this.#done.push(chunk);
      return;
    }
    if (chunk.length > this.#block.length - this.#filled) {
      this.#flush();
      this.#block = new Uint8Array(Math.max(chunk.length, Math.min(Math.max(this.#bytes, LEAST_BLOCK), MOST_BLOCK)));
    }
    this.#block.set(chunk, this.#filled);
    this.#filled += chunk.length;
  }

  take(): readonly Uint8Array<ArrayBuffer>[] {
    this.#flush();
    return this.#done;
  }

  #flush(): void {
    if (this.#filled > 0) this.#done.push(this.#block.subarray(0, this.#filled));
    this.#block = new Uint8Array(0);
    this.#filled = 0;
  }
}

/** As chunks of sockets do; others are parts of memory that is shared. */
function fillsItsMemory(chunk: Uint8Array): chunk is Uint8Array<ArrayBuffer> {
  return chunk.buffer instanceof ArrayBuffer && chunk.buffer.byteLength <= chunk.length + FRAME_BYTES;
}

export function tooLarge(maxBytes: number): ServerError {
  return new ServerError("request_too_large", `the body is larger than this server accepts: at most ${maxBytes} bytes`);
}
