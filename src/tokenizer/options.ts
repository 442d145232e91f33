// Options given by name: an unknown one is an error that suggests the nearest known name, since what is ignored in silence gives another
// result than the caller expects. Knows no option.
import { suggestion } from "./nearest.ts";

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
    return `${what} has no option '${name.slice(0, 60)}'${suggestion(name, [...names]) || `; it has ${[...names].join(", ")}`}`;
  }
  return null;
}
