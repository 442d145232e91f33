// The one error that this folder throws for a user's mistake or a bad file.

/** A tokenizer file, option, text or id is not usable. The message is one line and says what was seen. */
export class TokenizerError extends Error {
  override readonly name = "TokenizerError";
}
