/**
 * Where log lines go. A full disk, a closed pipe or a reader that stops reading costs lines, which are counted, and never the service:
 * writing waits in the background, and little is kept meanwhile. Knows no line's content.
 */
import { write } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { DestinationStream } from "pino";
import { within } from "./deadline.ts";

/** Text that may wait, in characters. */
const MOST_WAITING = 2 ** 20;
/** Text written at once. */
const BATCH = 2 ** 16;
/** How often a device is tried that takes nothing now. */
const RETRY_MS = 10;

/** Writes all of the text, or rejects. */
type Write = (text: string) => Promise<void>;

export class LogOutput implements DestinationStream {
  readonly #write: Write;
  #waiting: string[] = [];
  #length = 0;
  #dropped = 0;
  #reported = 0;
  #work: Promise<void> | null = null;

  constructor(write: Write) {
    this.#write = write;
  }

  /** Lines lost so far. */
  get dropped(): number {
    return this.#dropped;
  }

  write(line: string): void {
    if (this.#length + line.length > MOST_WAITING) {
      this.#dropped++;
      return;
    }
    this.#waiting.push(line);
    this.#length += line.length;
    this.#work ??= this.#flush();
  }

  /** Waits until everything is written, for at most `timeoutMs`. */
  async close(timeoutMs: number): Promise<void> {
    if (this.#work) await within(timeoutMs, this.#work);
  }

  async #flush(): Promise<void> {
    await null; // lines of the same moment go together
    while (this.#waiting.length > 0) {
      let count = 0;
      for (let length = 0; count < this.#waiting.length && length < BATCH; count++) length += this.#waiting[count].length;
      const batch = this.#waiting.splice(0, count);
      const text = batch.join("");
      try {
        await this.#write(text);
        this.#report();
      } catch {
        this.#dropped += batch.length;
      }
      this.#length -= text.length;
    }
    this.#work = null;
  }

  /** Lines get through again: says how many did not. */
  #report(): void {
    const lost = this.#dropped - this.#reported;
    if (lost === 0) return;
    this.#reported = this.#dropped;
    this.write(`${JSON.stringify({ level: "warn", time: new Date().toISOString(), lines: lost, msg: "log lines were lost" })}\n`);
  }
}

/**
 * Standard output. Node's own stream for files writes while everything else waits, and those for pipes keep all that nobody reads. So
 * this writes to the descriptor, in a background thread. Pipes and sockets never make that thread wait, because Node opens them as
 * non-blocking when its own stream is asked for.
 */
export function standardOutput(): LogOutput {
  process.stdout.off("error", ignore).on("error", ignore); // nothing is written to it, but its descriptor may break
  return new LogOutput(toDescriptor(1));
}

const ignore = () => {};

function toDescriptor(descriptor: number): Write {
  return async (text) => {
    let rest = Buffer.from(text);
    while (rest.length > 0) {
      const { error, written } = await new Promise<{ error: NodeJS.ErrnoException | null; written: number }>((resolve) =>
        write(descriptor, rest, (error, written) => resolve({ error, written })),
      );
      if (error?.code === "EAGAIN") await sleep(RETRY_MS, undefined, { ref: false });
      else if (error) throw error;
      else rest = rest.subarray(written);
    }
  };
}
