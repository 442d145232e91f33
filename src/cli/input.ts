/** Input of `chat`: lines from a terminal or a pipe, and messages of several lines. Knows no models. */
import { createInterface, type Interface } from "node:readline";
import { Writable } from "node:stream";

/** A line; `cleared`: Ctrl-C discarded what was typed; `end`: end of input. */
export type Line = { readonly text: string } | "cleared" | "end";

export interface Lines {
  next(prompt: string): Promise<Line>;
  close(): void;
}

const BLOCK = '"""';

/** A message: a line; lines that end with \ and the next; or everything between two """. Null at the end, "" when cleared. */
export async function readMessage(lines: Lines, prompt: string, more: string): Promise<string | null> {
  const first = await lines.next(prompt);
  if (typeof first === "string") return first === "end" ? null : "";
  let { text } = first;
  const block = text.trimStart().startsWith(BLOCK);
  if (block) text = text.trimStart().slice(BLOCK.length);
  const open = () => (block ? !text.trimEnd().endsWith(BLOCK) : text.endsWith("\\"));
  while (open()) {
    const next = await lines.next(more);
    if (next === "cleared") return "";
    if (next === "end") return text; // the message is what has been read so far
    text = `${block ? text : text.slice(0, -1)}\n${next.text}`;
  }
  return block
    ? text
        .trimEnd()
        .slice(0, -BLOCK.length)
        .replace(/^\n|\n$/g, "")
    : text;
}

/** Lines of a pipe or file. */
export function pipedLines(input: NodeJS.ReadableStream): Lines {
  const reader = createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY });
  const lines = reader[Symbol.asyncIterator]();
  return {
    async next() {
      const { value, done } = await lines.next();
      return done ? "end" : { text: value };
    },
    close: () => reader.close(),
  };
}

/**
 * Lines typed at a terminal, with history on the arrow keys. While no line is being read, typed keys are kept but not shown, so
 * that they don't mix with an answer, and Ctrl-C calls `onInterrupt`.
 */
export class TerminalLines implements Lines {
  onInterrupt: () => void = () => {};
  readonly #screen: Screen;
  readonly #reader: Interface;
  readonly #typed: string[] = [];
  readonly #hint: string;
  #waiting: ((line: Line) => void) | null = null;
  #ended = false;
  #leaving = false;

  /** `words`: completed with Tab. `hint`: shown at the first Ctrl-C. */
  constructor(input: NodeJS.ReadStream, output: NodeJS.WriteStream, { words, hint }: { words: readonly string[]; hint: string }) {
    this.#screen = new Screen(output);
    this.#hint = hint;
    this.#reader = createInterface({
      input,
      output: this.#screen,
      terminal: true,
      historySize: 1000,
      removeHistoryDuplicates: true,
      completer: (line: string) => [
        line.startsWith("/") ? words.map((word) => `${word} `).filter((word) => word.startsWith(line)) : [],
        line,
      ],
    });
    this.#screen.shown = false;
    this.#reader.on("line", (text) => {
      this.#leaving = false;
      if (this.#waiting) this.#give({ text });
      else this.#typed.push(text);
    });
    this.#reader.on("SIGINT", () => this.#interrupt());
    this.#reader.on("close", () => {
      this.#ended = true;
      this.#give("end");
    });
  }

  next(prompt: string): Promise<Line> {
    const typed = this.#typed.shift();
    this.#screen.shown = true;
    if (typed !== undefined) {
      this.#screen.write(`${prompt}${typed}\n`);
      this.#screen.shown = false;
      return Promise.resolve({ text: typed });
    }
    if (this.#ended) return Promise.resolve("end");
    return new Promise((resolve) => {
      this.#waiting = resolve;
      this.#reader.setPrompt(prompt);
      this.#reader.prompt(true);
    });
  }

  close(): void {
    this.#reader.close();
  }

  #give(line: Line): void {
    const waiting = this.#waiting;
    this.#waiting = null;
    this.#screen.shown = false;
    waiting?.(line);
  }

  /** At the prompt: the first clears the line, and another on the empty line ends. */
  #interrupt(): void {
    if (!this.#waiting) {
      this.onInterrupt();
      return;
    }
    const empty = this.#reader.line === "";
    this.#reader.write(null, { ctrl: true, name: "e" });
    this.#reader.write(null, { ctrl: true, name: "u" });
    this.#screen.write("\n");
    if (this.#leaving && empty) {
      this.#reader.close();
      return;
    }
    this.#leaving = true;
    this.#screen.write(`${this.#hint}\n`);
    this.#give("cleared");
  }
}

/** The output that readline writes to; it can be muted. */
class Screen extends Writable {
  shown = true;
  readonly #output: NodeJS.WriteStream;

  constructor(output: NodeJS.WriteStream) {
    super({ decodeStrings: false });
    this.#output = output;
    output.on("resize", () => this.emit("resize"));
  }

  get columns(): number {
    return this.#output.columns;
  }

  override _write(text: string | Buffer, _encoding: BufferEncoding, done: () => void): void {
    if (this.shown) this.#output.write(text);
    done();
  }
}
