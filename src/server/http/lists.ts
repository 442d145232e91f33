/** Writes long lists of responses as JSON text in slices, between which everything else goes on. Knows no route. */
import { Turns } from "../../grammar/turns.ts";

/** How long a slice takes. */
const SLICE_MS = 2;

const turns = new Turns();

/** A JSON list of what `element` makes of each item. @param owner id of the caller; owners take turns */
export async function jsonList<T>(items: readonly T[], element: (item: T, index: number) => unknown, owner: string): Promise<string> {
  const parts: string[] = [];
  const slice = () => {
    const until = performance.now() + SLICE_MS;
    while (parts.length < items.length && performance.now() < until) parts.push(JSON.stringify(element(items[parts.length], parts.length)));
  };
  while (parts.length < items.length) await turns.take(slice, owner);
  return `[${parts.join()}]`;
}

/** A JSON object with the given fields, and further ones that are JSON text already. */
export function jsonWith(fields: object, texts: Readonly<Record<string, string>>): string {
  const all = [...Object.entries(fields).map(([name, value]) => [name, JSON.stringify(value)]), ...Object.entries(texts)];
  return `{${all.map(([name, text]) => `${JSON.stringify(name)}:${text}`).join()}}`;
}
