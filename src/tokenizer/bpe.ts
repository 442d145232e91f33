// Byte-pair encoding of one stretch of text. Serves tokenizer.json (ranks of merges) and SentencePiece (ranks of scores) alike.
// Knows nothing of normalisation, added tokens or files.
import type { Pairs } from "./pairs.ts";

export interface BpeOptions {
  /** Tokens that symbols can be: single characters start from here. */
  readonly vocab: ReadonlyMap<string, number>;
  /** Merges of symbols: an id, or -1 - code point for a character without one. */
  readonly pairs: Pairs;
  /** Ids of the 256 byte tokens (-1 where absent) for characters without a token; null: those become `unknown`. */
  readonly bytes: Int32Array | null;
  /** Id of the unknown token; null: unknown characters vanish. */
  readonly unknown: number | null;
  /** A run of unknown characters becomes one token. */
  readonly fuseUnknown: boolean;
  /** A stretch that is a token as a whole is not cut at all. */
  readonly ignoreMerges: boolean;
  /** Tokens that are only steps on the way to others: taken apart again at the end (SentencePiece type UNUSED). */
  readonly unused: ReadonlySet<number>;
}

const planeSize = 0x10000;
const rankStep = 2 ** 32; // a heap key is rank * 2^32 + position: exact in a double while ranks stay below 2^21

export class Bpe {
  private readonly options: BpeOptions;
  private readonly plane = new Int32Array(planeSize); // symbol of each character of the basic plane
  private readonly beyond = new Map<number, number>(); // and of the others that have one

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

  /** Appends the ids of `text` to `out`. Time grows with n log n at worst, also for one character repeated. */
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

  /** Merges in place: a symbol that went into its left neighbour becomes `absorbed`. Returns how unused tokens came about. */
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

  /** Appends the ids of one merged symbol. True when it became the unknown token. */
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

/** What unused tokens were merged from, last seen. */
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
