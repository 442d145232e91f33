/** API keys: creates them, stores them in a file and looks them up. Enforces neither rates nor budgets. */
import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import type { Stats } from "node:fs";
import { open, readFile, realpath, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";
import { z } from "zod";
import { LockError, withLock } from "./lock.ts";

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

/** The key file is missing, broken, or can't be written; the message is one line and quotes nothing of the file. */
export class KeyFileError extends Error {
  override readonly name = "KeyFileError";
  /** What is wrong, without the file's name: anyone may see it. */
  readonly reason: string;

  constructor(file: string, reason: string, advice = "") {
    super(`${file}: ${reason}${advice && `; ${advice}`}`);
    this.reason = reason;
  }
}

/** Fifty thousand keys. The server reads the file each second. */
const MOST_BYTES = 16 * 2 ** 20;

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
    if (found.length === 0) throw new KeyFileError(file, `there is no valid key '${idOrName}'`);
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
  return parseKeys(file, await readKeyText(file));
}

/** The text of a key file. Rejects with KeyFileError, also when the file is an old one that no path leads to any more. */
export async function readKeyText(file: string): Promise<string> {
  try {
    const { size, nlink, isFile } = await statOf(file);
    if (!isFile) throw new KeyFileError(file, "not a file");
    if (size > MOST_BYTES) throw new KeyFileError(file, `larger than ${MOST_BYTES / 2 ** 20} MiB, so not a key file`);
    // A mounted file stays what it was when a new one is renamed into its place: revoked keys would stay valid.
    if (nlink === 0) throw new KeyFileError(file, "replaced where it is mounted from", "mount its directory instead of the file");
    return await readFile(file, "utf8");
  } catch (cause) {
    if (cause instanceof KeyFileError) throw cause;
    if ((cause as NodeJS.ErrnoException).code === "ENOENT")
      throw new KeyFileError(file, "no such key file", "'mixtape keys create' creates one");
    throw new KeyFileError(file, `can't be read (${(cause as NodeJS.ErrnoException).code})`);
  }
}

async function statOf(file: string): Promise<{ size: number; nlink: number; isFile: boolean }> {
  const found = await stat(file);
  return { size: found.size, nlink: found.nlink, isFile: found.isFile() };
}

/** The keys in the text of a key file. Throws KeyFileError. */
export function parseKeys(file: string, text: string): readonly ApiKey[] {
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch {
    throw new KeyFileError(file, "broken JSON, so not a key file"); // without the parser's excerpt, since the file is private
  }
  const result = fileSchema.safeParse(raw);
  if (result.success) return result.data.keys;
  const [issue] = result.error.issues;
  const what = issue.code === "unrecognized_keys" ? "fields that no key has" : issue.message; // names of fields are the file's text
  throw new KeyFileError(file, `not a key file: ${issue.path.join(".") || "the whole"}: ${what}`);
}

/** True where a file is mounted by itself: it can't be replaced there, and does not follow when it is replaced where it comes from. */
export async function isMountedAlone(file: string): Promise<boolean> {
  const [path, mounts] = await Promise.all([realpath(file), readFile("/proc/self/mountinfo", "utf8")]).catch(() => ["", ""]);
  // Fields are separated by spaces; a space in a path is written as \040.
  return mounts
    .split("\n")
    .some((line) => line.split(" ")[4]?.replace(/\\(\d{3})/g, (_, o) => String.fromCharCode(Number.parseInt(o, 8))) === path);
}

/**
 * Updates or creates a key file. A new one is readable by its owner only; an existing one keeps owner, group and mode, so that the
 * server can read it as before. The update is atomic: the new file is written beside the old one and renamed. Writers wait for each
 * other. Rejects with KeyFileError.
 */
async function changeKeys(file: string, change: (keys: readonly ApiKey[]) => readonly ApiKey[]): Promise<void> {
  try {
    const there = await realpath(file).catch(() => file); // a link stays one
    await withLock(`${there}.lock`, async () => {
      const before = await stat(there).catch(() => null);
      const keys = change(before ? await readKeys(there) : []);
      await replace(there, `${JSON.stringify({ version: 1, keys }, null, 2)}\n`, before);
    });
  } catch (error) {
    if (error instanceof KeyFileError) throw error;
    if (error instanceof LockError) throw new KeyFileError(file, error.message);
    const { code } = error as NodeJS.ErrnoException;
    if (code === "EBUSY" && (await isMountedAlone(file)))
      throw new KeyFileError(
        file,
        "mounted as a single file, which can't be replaced",
        "change it where it is mounted from; mount its directory instead",
      );
    if (code !== undefined) throw new KeyFileError(file, `can't be written (${(error as Error).message})`);
    throw error;
  }
}

/** To be called by one process at a time. */
async function replace(file: string, text: string, before: Stats | null): Promise<void> {
  if (Buffer.byteLength(text) > MOST_BYTES)
    throw new KeyFileError(file, `would be larger than ${MOST_BYTES / 2 ** 20} MiB`, "remove revoked and expired keys from it");
  const temporary = `${file}.new`;
  await rm(temporary, { force: true }); // left by a writer that was killed
  const handle = await open(temporary, "wx", 0o600);
  try {
    await handle.writeFile(text);
    if (before) {
      const { uid, gid } = await handle.stat();
      if (uid !== before.uid || gid !== before.gid)
        await handle.chown(before.uid, before.gid).catch(() => {
          throw new KeyFileError(
            file,
            `belongs to user ${before.uid} and group ${before.gid}, and must stay so`,
            "run this as that user or as root",
          );
        });
      await handle.chmod(before.mode & 0o7777);
    }
    await handle.sync();
    await handle.close();
    await rename(temporary, file);
  } catch (error) {
    await handle.close().catch(() => {}); // it may be closed
    await rm(temporary, { force: true });
    throw error;
  }
  const folder = await open(dirname(file), "r");
  await folder.sync().catch(() => {}); // some file systems can't; the change is made
  await folder.close();
}

function digest(secret: string): Buffer {
  return createHash("sha256").update(secret).digest();
}
