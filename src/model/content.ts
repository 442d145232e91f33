/** What a sequence is made of: ids, and where there are any, positions and embeddings. */
import { createHash } from "node:crypto";

export interface Content {
  readonly tokens: readonly number[];
  /** Of each token, axis by axis, [axes, tokens]. Default: 0, 1, 2, ... on every axis. */
  readonly positions?: Int32Array;
  /** Embeddings in place of those of the ids, for example of a picture's patches. */
  readonly embeddings?: readonly EmbeddedSpan[];
}

/** Consecutive tokens whose ids are placeholders. */
export interface EmbeddedSpan {
  /** Index of the first token. */
  readonly at: number;
  readonly count: number;
  /** [count, hidden] */
  readonly values: Float32Array;
}

/**
 * A number for each token that covers all of its content: its id, or where it is a placeholder or has a position of its own,
 * 53 bits of a digest, so that two pictures behind the same placeholders are told apart.
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

/** Never a token id: those are whole and not negative. */
function keyOf(text: string): number {
  const digest = createHash("sha256").update(text).digest();
  return -1 - Number(digest.readBigUInt64LE() >> 11n);
}

/** Throws RangeError where positions or embeddings do not fit the tokens. */
export function checkContent({ tokens, positions, embeddings = [] }: Content, axes: number, hidden: number): void {
  if (positions && positions.length !== axes * tokens.length)
    throw new RangeError(
      `positions has ${positions.length} numbers; ${tokens.length} tokens with ${axes} each take ${axes * tokens.length}`,
    );
  if (positions?.some((p) => p < 0)) throw new RangeError(`positions has ${positions.find((p) => p < 0)}; positions begin at 0`);
  let end = 0;
  for (const { at, count, values } of embeddings) {
    if (!Number.isInteger(at) || !Number.isInteger(count) || count < 1 || at < end || at + count > tokens.length)
      throw new RangeError(`embeddings of ${count} tokens from token ${at} on: they must lie in order within the ${tokens.length} tokens`);
    if (values.length !== count * hidden)
      throw new RangeError(`embeddings of ${count} tokens have ${values.length} numbers; at ${hidden} each they take ${count * hidden}`);
    end = at + count;
  }
}
