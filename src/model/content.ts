/** The content of a sequence: ids, and optionally positions and embeddings. */
import { createHash } from "node:crypto";

export interface Content {
  readonly tokens: readonly number[];
  /** The positions of all tokens, axis by axis, [axes, tokens]. Default: 0, 1, 2, ... on every axis. */
  readonly positions?: Int32Array;
  /** Embeddings that replace those of the ids, for example an image's patches. */
  readonly embeddings?: readonly EmbeddedSpan[];
}

/** Embeddings for consecutive tokens whose ids are placeholders. */
export interface EmbeddedSpan {
  /** Index of the first token. */
  readonly at: number;
  readonly count: number;
  /** [count, hidden] */
  readonly values: Float32Array;
}

/**
 * A number for each token that identifies its content: its id, or 53 bits of a digest if it is a placeholder or has a custom
 * position, so that two images with the same placeholders differ.
 */
export function contentKeys({ tokens, positions, embeddings = [] }: Content): readonly number[] {
  if (!positions && embeddings.length === 0) return tokens;
  const keys = [...tokens];
  for (const { at, count, values } of embeddings) {
    const digest = createHash("sha256")
      .update(new Uint8Array(values.buffer, values.byteOffset, values.byteLength))
      .digest("hex");
    for (let i = 0; i < count; i++) keys[at + i] = keyOf(`${digest} ${i}`);
  }
  if (positions) {
    const axes = positions.length / tokens.length;
    for (let i = 0; i < tokens.length; i++) {
      const own = Array.from({ length: axes }, (_, axis) => positions[axis * tokens.length + i]);
      if (own.some((p) => p !== i)) keys[i] = keyOf(`${keys[i]} at ${own}`);
    }
  }
  return keys;
}

/** Never a valid token id: those are integers of at least 0. */
function keyOf(text: string): number {
  const digest = createHash("sha256").update(text).digest();
  return -1 - Number(digest.readBigUInt64LE() >> 11n);
}

/** Throws a RangeError if positions or embeddings do not fit the tokens. */
export function checkContent({ tokens, positions, embeddings = [] }: Content, axes: number, hidden: number): void {
  if (positions && positions.length !== axes * tokens.length)
    throw new RangeError(
      `positions has ${positions.length} numbers; ${tokens.length} tokens with ${axes} each need ${axes * tokens.length}`,
    );
  if (positions?.some((p) => p < 0)) throw new RangeError(`positions has ${positions.find((p) => p < 0)}; positions begin at 0`);
  let end = 0;
  for (const { at, count, values } of embeddings) {
    if (!Number.isInteger(at) || !Number.isInteger(count) || count < 1 || at < end || at + count > tokens.length)
      throw new RangeError(
        `embeddings of ${count} tokens from token ${at} on: they must be in order and within the ${tokens.length} tokens`,
      );
    if (values.length !== count * hidden)
      throw new RangeError(`embeddings of ${count} tokens have ${values.length} numbers; at ${hidden} each they take ${count * hidden}`);
    end = at + count;
  }
}
