/**
 * Prompts for the benchmarks. Every call returns a new random prompt, so that no prefix cache can answer in place of the
 * model. The same seed returns the same prompts in the same order: subjects that are compared get equal prompts in each round.
 */
const WORDS =
  "amber basket candle dragon engine forest garden harbour island jungle kettle lantern market needle orchard pepper quarry river silver tunnel umbrella village window yellow zebra".split(
    " ",
  );
const FIRST_ID = 20; // the ids below are special in most vocabularies

/** `vocabulary` is the number of token ids to draw from. */
export function freshPrompts({ vocabulary = FIRST_ID + 1, seed = 1 } = {}) {
  const random = generator(seed);
  const below = (n) => Math.floor(random() * n);
  return {
    /** So many random token ids. */
    ids: (count) => Array.from({ length: count }, () => FIRST_ID + below(vocabulary - FIRST_ID)),
    /** So many random words, the first of which is a number that no other prompt is likely to begin with. */
    text: (words) => [below(2 ** 32), ...Array.from({ length: words - 1 }, () => WORDS[below(WORDS.length)])].join(" "),
  };
}

/** Mulberry32: numbers from 0 to 1, exclusive of 1. */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}
