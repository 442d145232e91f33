/**
 * Finds texts that are nearly the same as an earlier one: MinHash (Broder 1997, "On the resemblance and containment of documents") with bands of hashes
 * finds candidates, the exact Jaccard similarity of their shingles decides. Holds a few numbers of each text, not the text. Knows no files.
 */
import { DataError } from "../data/fault.ts";
import { hash32, mixed, Random } from "../random.ts";
import { scriptOf } from "./words.ts";

/** Hashes of a signature. */
const HASHES = 128;
/** Chance that a text as similar as the threshold becomes a candidate. */
const RECALL = 0.99;
/** Texts that are remembered: at a threshold of 0.8, each takes 336 to 672 bytes. */
const MOST_TEXTS = 2_000_000;
/** Candidates that are compared with a text, nearest first: texts that all are alike would otherwise be compared with each other. */
const MOST_CANDIDATES = 16;
/** Texts that are remembered for the same band: one that so many share tells little. */
const MOST_PER_BAND = 128;

/** Bands, and hashes of each: the longest bands that still find a text as similar as the threshold with the chance `RECALL`. */
export function bandsFor(threshold: number): { readonly bands: number; readonly rows: number } {
  let rows = 1;
  const recall = (r: number) => 1 - (1 - threshold ** r) ** Math.floor(HASHES / r);
  while (rows < 32 && recall(rows + 1) >= RECALL) rows++;
  return { bands: Math.floor(HASHES / rows), rows };
}

/** UTF-16 units of a text that are compared. */
const MOST_COMPARED = 100_000;

/** The pieces of a text that are compared: 5 characters each, 3 in Chinese, without regard to case and white space; of its first 100,000 units. */
export function shingles(text: string): Set<string> {
  const plain = text.slice(0, MOST_COMPARED).toLowerCase().normalize("NFKC").replace(/\s+/g, " ").trim();
  const characters = Array.from(plain);
  const size = scriptOf(plain) === "han" ? 3 : 5;
  const found = new Set<string>();
  for (let i = 0; i + size <= characters.length; i++) found.add(characters.slice(i, i + size).join(""));
  if (found.size === 0) found.add(plain);
  return found;
}

/** The share of pieces that two texts have in common. */
export function jaccard(a: ReadonlySet<string>, b: ReadonlySet<string>): number {
  let common = 0;
  for (const each of a) if (b.has(each)) common++;
  return common / (a.size + b.size - common);
}

export class Duplicates {
  readonly #threshold: number;
  readonly #bands: number;
  readonly #rows: number;
  /** Factors and addends of the hashes. */
  readonly #a = new Uint32Array(HASHES);
  readonly #b = new Uint32Array(HASHES);
  /** Open addressing: hash of a band, and the text that has it plus 1. */
  #keys: Uint32Array = new Uint32Array(1 << 16);
  #texts: Uint32Array = new Uint32Array(1 << 16);
  #used = 0;
  #count = 0;

  /** @param threshold Jaccard similarity, above 0 and at most 1, from which on texts are the same */
  constructor(threshold: number) {
    if (!(threshold > 0 && threshold <= 1))
      throw new DataError(`the similarity of duplicates is ${threshold}; it must be above 0 and at most 1`);
    this.#threshold = threshold;
    ({ bands: this.#bands, rows: this.#rows } = bandsFor(threshold));
    const random = new Random(0, "minhash");
    for (let i = 0; i < HASHES; i++) [this.#a[i], this.#b[i]] = [random.word() | 1, random.word()];
  }

  /**
   * The number of an earlier text that this one is a duplicate of, and how similar they are; null for a new one, which gets the next number, from 0.
   * @param earlier gives the text of a number again
   */
  async add(
    text: string,
    earlier: (number: number) => Promise<string>,
  ): Promise<{ readonly of: number; readonly similarity: number } | null> {
    const own = shingles(text);
    const keys = this.#bandKeys(own);
    let best: { readonly of: number; readonly similarity: number } | null = null;
    for (const candidate of this.#candidates(keys)) {
      const similarity = jaccard(own, shingles(await earlier(candidate)));
      if (similarity >= this.#threshold && (best === null || similarity > best.similarity)) best = { of: candidate, similarity };
      if (best?.similarity === 1) break;
    }
    if (best !== null) return best;
    if (this.#count === MOST_TEXTS) throw new DataError(`more than ${MOST_TEXTS} different texts: remove duplicates of a part at a time`);
    for (const key of keys) this.#insert(key, this.#count);
    this.#count++;
    return null;
  }

  #bandKeys(own: ReadonlySet<string>): number[] {
    const least = new Uint32Array(HASHES).fill(0xffffffff);
    for (const shingle of own) {
      const hash = hash32(shingle);
      for (let i = 0; i < HASHES; i++) {
        const value = mixed((Math.imul(hash, this.#a[i]) + this.#b[i]) >>> 0);
        if (value < least[i]) least[i] = value;
      }
    }
    return Array.from({ length: this.#bands }, (_, band) => {
      let key = band;
      for (let r = 0; r < this.#rows; r++) key = mixed((Math.imul(key, 31) + least[band * this.#rows + r]) >>> 0);
      return key;
    });
  }

  /** Texts that share a band, those that share most first. */
  #candidates(keys: readonly number[]): number[] {
    const shared = new Map<number, number>();
    for (const key of keys)
      for (let at = this.#slot(key); this.#texts[at] !== 0; at = (at + 1) & (this.#keys.length - 1)) {
        const text = this.#texts[at] - 1;
        if (this.#keys[at] === key) shared.set(text, (shared.get(text) ?? 0) + 1);
      }
    const found = [...shared].sort(([a, m], [b, n]) => n - m || a - b);
    return found.slice(0, MOST_CANDIDATES).map(([text]) => text);
  }

  #slot(key: number): number {
    return mixed(key) & (this.#keys.length - 1);
  }

  #insert(key: number, text: number): void {
    let [at, same] = [this.#slot(key), 0];
    for (; this.#texts[at] !== 0; at = (at + 1) & (this.#keys.length - 1)) if (this.#keys[at] === key && ++same === MOST_PER_BAND) return;
    [this.#keys[at], this.#texts[at]] = [key, text + 1];
    if (2 * ++this.#used > this.#keys.length) this.#grow();
  }

  #grow(): void {
    const [keys, texts] = [this.#keys, this.#texts];
    this.#keys = new Uint32Array(2 * keys.length);
    this.#texts = new Uint32Array(2 * keys.length);
    for (let i = 0; i < keys.length; i++) {
      if (texts[i] === 0) continue;
      let at = this.#slot(keys[i]);
      while (this.#texts[at] !== 0) at = (at + 1) & (this.#keys.length - 1);
      [this.#keys[at], this.#texts[at]] = [keys[i], texts[i]];
    }
  }
}
