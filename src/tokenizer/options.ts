// Options given by name: an unknown one is an error that suggests the nearest known name, since what is ignored in silence gives another
// result than the caller expects. Knows no option.

/**
 * The fault of options that a call does not know, or null.
 * @param what the call, for the message: `generate`
 * @param remedies what to do about options that other libraries have; one whose value is false or absent is allowed
 */
export function optionFault(
  what: string,
  options: object,
  known: Iterable<string>,
  remedies: Readonly<Record<string, string>> = {},
): string | null {
  const names = new Set(known);
  for (const [name, value] of Object.entries(options)) {
    if (names.has(name) || value === undefined) continue;
    if (Object.hasOwn(remedies, name)) {
      if (value === null || value === false) continue;
      return `${what} has no option '${name}': ${remedies[name]}`;
    }
    const near = nearest(name, names);
    return `${what} has no option '${name.slice(0, 60)}'${near ? `; did you mean '${near}'?` : `; it has ${[...names].join(", ")}`}`;
  }
  return null;
}

/** The known name that differs least from `name`: by up to a third of its letters or two of five, not counting case, dashes and underscores. */
function nearest(name: string, known: Iterable<string>): string | undefined {
  const plain = (each: string) => each.toLowerCase().replace(/[-_]/g, "");
  const wanted = plain(name).slice(0, 60);
  let best: string | undefined;
  let least = Math.max(Math.floor(wanted.length / 3), wanted.length > 4 ? 2 : 1) + 1;
  for (const each of known) {
    const steps = distance(wanted, plain(each));
    if (steps < least) [best, least] = [each, steps];
  }
  return best;
}

/** Levenshtein's distance. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) next.push(Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)));
    row = next;
  }
  return row[b.length];
}
