// Shared by tests of the server's parts: a log kept in memory, and a key in a file.
import { spawnSync } from "node:child_process";
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

/** False where there is no openssl to make certificates with. */
export const canCertify = spawnSync("openssl", ["version"]).error === undefined;

/** Files of a certificate for localhost and 127.0.0.1, and its key. */
export function certificate(): { readonly cert: string; readonly key: string } {
  const folder = temporary();
  const [cert, key] = [join(folder, "tls.crt"), join(folder, "tls.key")];
  const names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"];
  const made = spawnSync("openssl", [
    "req",
    "-x509",
    "-newkey",
    "rsa:2048",
    "-nodes",
    "-days",
    "2",
    "-keyout",
    key,
    "-out",
    cert,
    ...names,
  ]);
  if (made.status !== 0) throw new Error(String(made.stderr));
  return { cert, key };
}
