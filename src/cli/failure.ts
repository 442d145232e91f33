/** How a command ends badly: one line on standard error and an exit code. The stack is shown with MIXTAPE_DEBUG=1 only. */
import { CommanderError } from "commander";
import { nearest } from "../tokenizer/nearest.ts";

/** The user's input can't be used; the message is one line and says what was seen. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** The user pressed Ctrl-C. It needs no message. */
export class Interrupted extends Error {
  override readonly name = "Interrupted";

  constructor() {
    super("interrupted");
  }
}

/** Reports an error to the user. Returns the exit code: 0 for requested help, 130 for Ctrl-C, else 1. */
export function fail(error: unknown): number {
  if (error instanceof CommanderError && error.exitCode === 0) return 0;
  if (error instanceof Interrupted) return 130;
  process.stderr.write(`mixtape: ${oneLine(error)}\n`);
  if (process.env["MIXTAPE_DEBUG"] === "1" && error instanceof Error) process.stderr.write(`${error.stack}\n`);
  return 1;
}

/** The message of whatever was thrown, without line breaks and without commander's own prefix. */
export function oneLine(error: unknown): string {
  const message = error instanceof Error ? error.message || error.name : String(error);
  return message
    .replace(/^error: /, "")
    .replace(/\s*[\r\n]+\s*/g, " ")
    .trim();
}

/** The error with the library's names of fields replaced by those that the command line has for them. */
export function inFlags(error: unknown, names: Readonly<Record<string, string>>): unknown {
  if (!(error instanceof Error)) return error;
  const message = Object.entries(names).reduce(
    (text, [field, flag]) => text.replace(new RegExp(`\\b${field}\\b`, "g"), flag),
    error.message,
  );
  return message === error.message ? error : new UsageError(message, { cause: error });
}

/** An option that is missing because it is misspelt: the error names the word that was given. Otherwise the error. */
export function misspelt(error: unknown, given: readonly string[]): unknown {
  if (!(error instanceof CommanderError) || error.code !== "commander.missingMandatoryOptionValue") return error;
  const option = /--[\w-]+/.exec(error.message)?.[0] ?? "";
  const slip = given.find((word) => word.startsWith("--") && word !== option && nearest(word.replace(/=.*/s, ""), [option]) !== null);
  return slip === undefined ? error : new UsageError(`unknown option '${slip.replace(/=.*/s, "")}' (Did you mean ${option}?)`);
}

let outputMatters = true;

/**
 * When the reader closes the pipe (`mixtape … | head`), the program exits silently; when output can't be written for another reason,
 * it says so and fails.
 */
export function endOnBrokenOutput(): void {
  for (const stream of [process.stdout, process.stderr]) {
    stream.on("error", (error: NodeJS.ErrnoException) => {
      if (!outputMatters) return;
      if (error.code === "EPIPE") process.exit(0);
      if (stream === process.stdout) fail(new Error(`standard output can't be written (${error.code})`));
      process.exit(1);
    });
  }
}

/** From now on, the program outlives its readers. */
export function surviveBrokenOutput(): void {
  outputMatters = false;
}

/** A signal that Ctrl-C aborts with `Interrupted`, until `release` is called. */
export function onInterrupt(): { readonly signal: AbortSignal; release(): void } {
  const controller = new AbortController();
  const abort = () => controller.abort(new Interrupted());
  process.once("SIGINT", abort);
  return { signal: controller.signal, release: () => void process.off("SIGINT", abort) };
}
