/** API keys: creates them, stores them in a file and looks them up. Enforces neither rates nor budgets. */
import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import { type FileHandle, open, readFile, rename, rm, stat } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";

const moment = z.iso.datetime();

const keySchema = z.strictObject({
  /** Names the key in lists, logs and metrics; not secret. */
  id: z.string().regex(/^key_[a-z0-9]{8,}$/),
  name: z.string().min(1).max(200),
  /** SHA-256 of the key, hexadecimal. */
  hash: z.string().regex(/^[0-9a-f]{64}$/),
  created: moment,
  expires: moment.nullable(),
  /** Models that the key may use; null: all. */
  models: z.array(z.string().min(1)).nullable(),
  requestsPerMinute: z.int().min(1).nullable(),
  /** Tokens of prompts and answers per day, in UTC. */
  tokensPerDay: z.int().min(1).nullable(),
  revoked: moment.nullable(),
});
const fileSchema = z.strictObject({ version: z.literal(1), keys: z.array(keySchema) });

export type ApiKey = Readonly<z.infer<typeof keySchema>>;

/** What a new key may do. */
export type KeyTerms = Pick<ApiKey, "name" | "expires" | "models" | "requestsPerMinute" | "tokensPerDay">;

/** The key file is missing, broken, or can't be written; the message is one line. */
export class KeyFileError extends Error {
  override readonly name = "KeyFileError";
}

/**
 * Creates a key of 256 random bits and adds it to a file, creating the file if necessary. The file stores a hash, never the
 * key's text. One round of SHA-256 is right here, unlike for passwords: nobody can try 2^256 keys, and every request would pay
 * for a slow hash.
 */
export async function createKey(file: string, terms: KeyTerms): Promise<{ readonly secret: string; readonly key: ApiKey }> {
  const secret = `mxt_${randomBytes(32).toString("base64url")}`;
  const id = `key_${randomBytes(6).toString("hex")}`;
  const key = { id, ...terms, hash: digest(secret).toString("hex"), created: new Date().toISOString(), revoked: null };
  await changeKeys(file, (keys) => [...keys, key]);
  return { secret, key };
}

/** Revokes the key with this id, or all valid keys with this name. Rejects with KeyFileError if there are none. */
export async function revokeKey(file: string, idOrName: string): Promise<readonly ApiKey[]> {
  const matches = ({ id, name, revoked }: ApiKey) => revoked === null && (id === idOrName || name === idOrName);
  const found: ApiKey[] = [];
  await changeKeys(file, (keys) => {
    found.push(...keys.filter(matches));
    if (found.length === 0) throw new KeyFileError(`${file}: there is no valid key '${idOrName}'`);
    return keys.map((key) => (found.includes(key) ? { ...key, revoked: new Date().toISOString() } : key));
  });
  return found;
}

/** Why a key is not valid now; null if it is. */
export function refusal(key: ApiKey, now = Date.now()): "revoked" | "expired" | null {
  if (key.revoked !== null) return "revoked";
  return key.expires !== null && Date.parse(key.expires) <= now ? "expired" : null;
}

/** A server's keys, looked up by their text. */
export class KeyRing {
  readonly #keys: readonly { readonly key: ApiKey; readonly hash: Buffer }[];

  constructor(keys: readonly ApiKey[]) {
    this.#keys = keys.map((key) => ({ key, hash: Buffer.from(key.hash, "hex") }));
  }

  get size(): number {
    return this.#keys.length;
  }

  /** The key with this text, or null. Takes the same time for any text: every hash is compared, each in constant time. */
  find(secret: string): ApiKey | null {
    const hash = digest(secret);
    let found: ApiKey | null = null;
    for (const each of this.#keys) if (timingSafeEqual(each.hash, hash)) found = each.key;
    return found;
  }

  get(id: string): ApiKey | null {
    return this.#keys.find(({ key }) => key.id === id)?.key ?? null;
  }
}

/** Reads a key file. Rejects with KeyFileError. */
export async function readKeys(file: string): Promise<readonly ApiKey[]> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === "ENOENT";
    const what = missing ? "no such key file; 'mixtape keys create' creates one" : `can't be read (${(cause as Error).message})`;
    throw new KeyFileError(`${file}: ${what}`, { cause });
  }
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch (cause) {
    throw new KeyFileError(`${file}: broken JSON, so not a key file`, { cause }); // without the parser's excerpt, since the file is private
  }
  const result = fileSchema.safeParse(raw);
  if (!result.success) {
    const [issue] = result.error.issues;
    throw new KeyFileError(`${file}: not a key file: ${issue.path.join(".") || "the whole"}: ${issue.message}`);
  }
  return result.data.keys;
}

/**
 * Updates or creates a key file, readable by its owner only. The update is atomic: the new file is written beside the old one
 * and renamed. Writers wait for each other. Rejects with KeyFileError.
 */
async function changeKeys(file: string, change: (keys: readonly ApiKey[]) => readonly ApiKey[]): Promise<void> {
  const temporary = `${file}.new`;
  const handle = await takeTurn(file, temporary);
  try {
    const there = await stat(file).then(
      () => true,
      () => false,
    );
    const keys = change(there ? await readKeys(file) : []);
    await handle.writeFile(`${JSON.stringify({ version: 1, keys }, null, 2)}\n`);
    await handle.sync();
    await handle.close();
    await rename(temporary, file);
  } catch (cause) {
    await handle.close().catch(() => {}); // it may be closed
    await rm(temporary, { force: true });
    if (cause instanceof Error && "code" in cause) throw new KeyFileError(`${file}: can't be written (${cause.message})`, { cause });
    throw cause;
  }
}

const PATIENCE_MS = 5000;

/** Creates the temporary file, which doubles as the lock of one writer. An old one was left by a writer that was killed. */
async function takeTurn(file: string, temporary: string): Promise<FileHandle> {
  for (;;) {
    try {
      return await open(temporary, "wx", 0o600);
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code !== "EEXIST")
        throw new KeyFileError(`${file}: can't be written (${(cause as Error).message})`, { cause });
      const age = await stat(temporary).then(
        ({ mtimeMs }) => Date.now() - mtimeMs,
        () => 0,
      );
      if (age > PATIENCE_MS) await rm(temporary, { force: true });
      else await sleep(20);
    }
  }
}

function digest(secret: string): Buffer {
  return createHash("sha256").update(secret).digest();
}
