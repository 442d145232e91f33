/** The error of this folder: a checkpoint, or a hub's response, that can't be used, in one line. */

/** A file or folder that can't be used as a checkpoint. `file` is what was opened: an absolute path, or a hub id. */
export class CheckpointError extends Error {
  override readonly name = "CheckpointError";
  readonly file: string;

  /**
   * @param file what was opened; the message starts with it
   * @param what what was seen and what to do, in one line (line breaks become spaces)
   */
  constructor(file: string, what: string, options?: ErrorOptions) {
    super(`${file}: ${what}`.replace(/\s*[\r\n]+\s*/g, " "), options);
    this.file = file;
  }
}

/** The `code` of a system error (`ENOENT`, `ENOSPC`, …), or `undefined` for anything else. */
export function errorCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}

/** The message of whatever was thrown. */
export function errorText(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
