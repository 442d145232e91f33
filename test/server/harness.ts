// Shared by tests of the server's parts: a log kept in memory, and a key in a file.
import { join } from "node:path";
import type { DestinationStream } from "pino";
import { type ApiKey, createKey, type KeyTerms } from "../../src/server/access/keys.ts";
import { temporary } from "../cli/run.ts";

/** Log lines, kept in memory. */
export function keptLines(): { readonly sink: DestinationStream; lines(): string } {
  let text = "";
  return { sink: { write: (line) => void (text += line) }, lines: () => text };
}

/** A key without limits that never expires. */
export const FREE: KeyTerms = { name: "test", expires: null, models: null, requestsPerMinute: null, tokensPerDay: null };

/** A file with one key, and the key. */
export async function keyFile(terms: Partial<KeyTerms> = {}): Promise<{ file: string; secret: string; key: ApiKey }> {
  const file = join(temporary(), "keys.json");
  return { file, ...(await createKey(file, { ...FREE, ...terms })) };
}
