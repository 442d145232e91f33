// The error that this folder throws for invalid input and malformed files.

/** A tokenizer file, option, text or id is invalid. The message is one line and says what was seen. */
export class TokenizerError extends Error {
  override readonly name = "TokenizerError";
}
