/** Finds the name that a misspelt one was meant to be, for error messages. Knows no option and no field. */

/** The longest name that is compared: longer ones are not slips of the keyboard. */
const LONGEST = 64;

/**
 * The known name that is spelt like `name`: the same letters in another style (`topK` for `top_k`), or with at most three slips,
 * fewer in a short name. Null: none is.
 */
export function nearest(name: string, known: readonly string[]): string | null {
  if (name.length > LONGEST) return null;
  const plain = letters(name);
  const same = known.find((each) => letters(each) === plain);
  if (same !== undefined) return same;
  let best: string | null = null;
  let least = Math.min(3, Math.floor(plain.length / 3)) + 1;
  for (const each of known) {
    const slips = distance(plain, letters(each), least);
    if (slips < least) [best, least] = [each, slips];
  }
  return best;
}

/** `, did you mean 'top_k'?`, or nothing. */
export function suggestion(name: string, known: readonly string[]): string {
  const found = nearest(name, known);
  return found === null ? "" : `; did you mean '${found}'?`;
}

function letters(name: string): string {
  return name.toLowerCase().replace(/[\s_-]/g, "");
}

/** Levenshtein's distance, two letters swapped counting once; `most` if it is at least that. */
function distance(a: string, b: string, most: number): number {
  if (Math.abs(a.length - b.length) >= most) return most;
  let before: number[] = [];
  let last = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1] ? 0 : 1;
      row[j] = Math.min(row[j - 1] + 1, last[j] + 1, last[j - 1] + same);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
    }
    [before, last] = [last, row];
  }
  return Math.min(last[b.length], most);
}
