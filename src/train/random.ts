/** Random numbers that depend on a seed and on what they are for, and on nothing else. Knows no data. */

/** A stream of random numbers: xoshiro128** (https://prng.di.unimi.it/), 32 bits at a time. */
export class Random {
  readonly #s = new Uint32Array(4);

  /** Streams of different keys (an epoch, a row) are independent of each other. Seeds are whole numbers, keys whole numbers or texts. */
  constructor(seed: number, ...keys: readonly (number | string)[]) {
    let state = hash32(JSON.stringify([seed, ...keys]));
    for (let i = 0; i < 4; i++) {
      state = (state + 0x9e3779b9) >>> 0;
      this.#s[i] = mixed(state);
    }
    if (this.#s.every((word) => word === 0)) this.#s[0] = 1;
  }

  /** A whole number from 0 to 2^32 - 1. */
  word(): number {
    const s = this.#s;
    const result = Math.imul(rotated(Math.imul(s[1], 5), 7), 9) >>> 0;
    const t = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotated(s[3], 11);
    return result;
  }

  /** A number in [0, 1). */
  real(): number {
    return this.word() / 2 ** 32;
  }

  /** A whole number from 0 to `n` - 1, for n up to 2^32; every one equally likely. */
  below(n: number): number {
    const limit = 2 ** 32 - (2 ** 32 % n);
    for (;;) {
      const word = this.word();
      if (word < limit) return word % n;
    }
  }

  /** One of the items, which must not be empty. */
  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)];
  }

  /** Puts items into random order, in place (Fisher-Yates). */
  shuffle<T extends { length: number; [index: number]: unknown }>(items: T): T {
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.below(i + 1);
      [items[i], items[j]] = [items[j], items[i]];
    }
    return items;
  }
}

/** A hash of a text's UTF-16 units, 32 bits: FNV-1a, then mixed so that all bits are used. For splits and streams, not for security. */
export function hash32(text: string, seed = 0): number {
  let hash = (0x811c9dc5 ^ seed) >>> 0;
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i);
    hash = Math.imul(hash ^ (unit & 0xff), 0x01000193);
    hash = Math.imul(hash ^ (unit >>> 8), 0x01000193);
  }
  return mixed(hash >>> 0);
}

/** The finalizer of MurmurHash3: a bijection of 32 bits. */
export function mixed(word: number): number {
  let x = word;
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return (x ^ (x >>> 16)) >>> 0;
}

function rotated(word: number, by: number): number {
  return ((word << by) | (word >>> (32 - by))) >>> 0;
}

/** A number of the standard normal distribution, by Box and Muller's transform. */
export function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random.real())) * Math.cos(2 * Math.PI * random.real());
}
