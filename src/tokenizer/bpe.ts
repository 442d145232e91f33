// Byte-pair encoding of one section of text, for tokenizer.json (merges ranked by position) and SentencePiece (ranked by score).
// Knows nothing of normalisation, added tokens or files.
import type { Pairs } from "./pairs.ts";

export interface BpeOptions {
  /** Ids of the tokens; characters are looked up here before merging. */
  readonly vocab: ReadonlyMap<string, number>;
  /** Merges of symbols. A symbol is an id, or -1 - code point for a character without a token. */
  readonly pairs: Pairs;
  /** Ids of the 256 byte tokens (-1 if absent), used for characters without a token; null: such characters become `unknown`. */
  readonly bytes: Int32Array | null;
  /** Id of the unknown token; null: unknown characters are dropped. */
  readonly unknown: number | null;
  /** Encode a run of unknown characters as a single unknown token. */
  readonly fuseUnknown: boolean;
  /** Encode a section that is itself a token as that token, without merging. */
  readonly ignoreMerges: boolean;
  /** Tokens that are only intermediate results of merging and are split again at the end (SentencePiece type UNUSED). */
  readonly unused: ReadonlySet<number>;
}

const planeSize = 0x10000;
const rankStep = 2 ** 32; // a heap key is rank * 2^32 + position: exact in a double while ranks stay below 2^21

export class Bpe {
  private readonly options: BpeOptions;
  private readonly plane = new Int32Array(planeSize); // symbol of each character in the basic multilingual plane
  private readonly beyond = new Map<number, number>(); // symbols of characters beyond it that have a token

  constructor(options: BpeOptions) {
    this.options = options;
    for (let code = 0; code < planeSize; code++) this.plane[code] = -1 - code;
    for (const [token, id] of options.vocab) {
      const code = token.length > 2 ? undefined : token.codePointAt(0);
      if (code === undefined || token.length !== (code < planeSize ? 1 : 2)) continue;
      if (code < planeSize) this.plane[code] = id;
      else this.beyond.set(code, id);
    }
  }

  /** Appends the ids of `text` to `out`. Takes O(n log n) time at worst, also for a single repeated character. */
  encode(text: string, out: number[]): void {
    const { vocab, unused, ignoreMerges } = this.options;
    if (ignoreMerges) {
      const id = vocab.get(text);
      if (id !== undefined) {
        out.push(id);
        return;
      }
    }
    const symbols = new Int32Array(text.length);
    let count = 0;
    for (let i = 0; i < text.length; i++) {
      const code = text.codePointAt(i) ?? 0;
      if (code < planeSize) symbols[count++] = this.plane[code] ?? 0;
      else {
        symbols[count++] = this.beyond.get(code) ?? -1 - code;
        i++;
      }
    }
    const parts = this.merge(symbols, count, unused);
    let unknown = false; // the last symbol became the unknown token
    for (let i = 0; i < count; i++) {
      const symbol = symbols[i] ?? 0;
      if (symbol !== absorbed) unknown = this.emit(symbol, unknown, parts, out);
    }
  }

  /** Merges in place: a symbol merged into its left neighbour becomes `absorbed`. Returns the halves of unused tokens. */
  private merge(symbols: Int32Array, count: number, unused: ReadonlySet<number>): Parts {
    const { pairs } = this.options;
    const parts = new Map<number, readonly [number, number]>();
    const previous = new Int32Array(count);
    const next = new Int32Array(count);
    const heap = new Heap(2 * count);
    const consider = (left: number, right: number): void => {
      const a = symbols[left] ?? 0;
      const b = symbols[right] ?? 0;
      const slot = pairs.slot(a, b);
      const rank = pairs.rank(slot);
      if (rank < 0) return;
      heap.push(rank * rankStep + left);
      if (unused.size > 0 && unused.has(pairs.result(slot))) parts.set(pairs.result(slot), [a, b]);
    };
    for (let i = 0; i < count; i++) {
      previous[i] = i - 1;
      next[i] = i + 1 < count ? i + 1 : -1;
    }
    for (let i = 1; i < count; i++) consider(i - 1, i);
    while (heap.size > 0) {
      const key = heap.pop();
      const rank = Math.floor(key / rankStep);
      const left = key - rank * rankStep;
      const right = next[left] ?? -1;
      if (right < 0 || symbols[left] === absorbed) continue;
      const slot = pairs.slot(symbols[left] ?? 0, symbols[right] ?? 0);
      if (pairs.rank(slot) !== rank) continue; // a neighbour has changed since
      symbols[left] = pairs.result(slot);
      symbols[right] = absorbed;
      const after = next[right] ?? -1;
      next[left] = after;
      if (after >= 0) previous[after] = left;
      const before = previous[left] ?? -1;
      if (before >= 0) consider(before, left);
      if (after >= 0) consider(left, after);
    }
    return parts;
  }

  /** Appends the ids of one merged symbol. Returns true if it became the unknown token. */
  private emit(symbol: number, afterUnknown: boolean, parts: Parts, out: number[]): boolean {
    const { bytes, unknown, fuseUnknown, unused } = this.options;
    if (symbol >= 0) {
      const halves = unused.has(symbol) ? parts.get(symbol) : undefined;
      if (halves === undefined) {
        out.push(symbol);
        return false;
      }
      return this.emit(halves[1], this.emit(halves[0], afterUnknown, parts, out), parts, out);
    }
    if (bytes !== null) {
      const ids = Array.from(utf8.encode(String.fromCodePoint(-1 - symbol)), (byte) => bytes[byte] ?? -1);
      if (ids.every((id) => id >= 0)) {
        for (const id of ids) out.push(id);
        return false;
      }
    }
    if (unknown === null) return false;
    if (!(afterUnknown && fuseUnknown)) out.push(unknown);
    return true;
  }
}

const absorbed = -(2 ** 31);
const utf8 = new TextEncoder();

/** The two symbols from which each unused token was last merged. */
type Parts = ReadonlyMap<number, readonly [number, number]>;

/** A binary heap of doubles, smallest first. */
class Heap {
  size = 0;
  private readonly keys: Float64Array;

  constructor(capacity: number) {
    this.keys = new Float64Array(capacity);
  }

  push(key: number): void {
    const { keys } = this;
    let at = this.size++;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      const other = keys[parent] ?? 0;
      if (other <= key) break;
      keys[at] = other;
      at = parent;
    }
    keys[at] = key;
  }

  pop(): number {
    const { keys } = this;
    const top = keys[0] ?? 0;
    const size = --this.size;
    const key = keys[size] ?? 0;
    let at = 0;
    for (let child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && (keys[child + 1] ?? 0) < (keys[child] ?? 0)) child++;
      const other = keys[child] ?? 0;
      if (other >= key) break;
      keys[at] = other;
      at = child;
    }
    keys[at] = key;
    return top;
  }
}
