/**
 * API keys: made, listed, revoked, recognised, and what each has used today. Keys are 256 random bits, so a plain SHA-256
 * of them is as hard to turn back as the key to guess; a slow password hash would only slow the server.
 */
import { createHash, randomBytes, randomUUID, timingSafeEqual } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import { open, readFile, rename, rm } from "node:fs/promises";
import { z } from "zod";
import { ServerError } from "./errors.ts";
import type { Caller, Usage } from "./served.ts";

const PREFIX = "mxt_";
const RELOAD_MS = 1000;
const SAVE_MS = 10_000;

const StoredKey = z.strictObject({
  id: z.string(),
  name: z.string(),
  /** SHA-256, hexadecimal. */
  hash: z.string().length(64),
  created: z.iso.datetime(),
  expires: z.iso.datetime().nullable(),
  models: z.array(z.string()).nullable(),
  requestsPerMinute: z.number().int().min(1).nullable(),
  tokensPerDay: z.number().int().min(1).nullable(),
  revoked: z.boolean(),
});
export type StoredKey = z.infer<typeof StoredKey>;
const KeyFile = z.strictObject({ version: z.literal(1), keys: z.array(StoredKey) });

export type NewKey = Pick<StoredKey, "name" | "expires" | "models" | "requestsPerMinute" | "tokensPerDay">;

/** Reads a key file; a missing one is empty. Throws a one-line error for anything else. */
export async function readKeys(file: string): Promise<StoredKey[]> {
  const text = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return null;
    throw new Error(`${file}: cannot be read: ${error.message}`);
  });
  return text === null ? [] : parseKeys(file, text);
}

/** Makes a key and adds it to the file. The key itself is nowhere but in what this returns. */
export async function createKey(file: string, wanted: NewKey): Promise<{ secret: string; key: StoredKey }> {
  const secret = PREFIX + randomBytes(32).toString("base64url");
  const key: StoredKey = {
    id: randomUUID().slice(0, 8),
    hash: hashOf(secret),
    created: new Date().toISOString(),
    revoked: false,
    ...wanted,
  };
  await writePrivately(file, { version: 1, keys: [...(await readKeys(file)), key] });
  return { secret, key };
}

/** Revokes keys by id or name. Throws when there is none. */
export async function revokeKey(file: string, idOrName: string): Promise<StoredKey[]> {
  const keys = await readKeys(file);
  const found = keys.filter((k) => !k.revoked && (k.id === idOrName || k.name === idOrName));
  if (found.length === 0) throw new Error(`${file}: there is no key '${idOrName}' that is valid`);
  await writePrivately(file, { version: 1, keys: keys.map((k) => (found.includes(k) ? { ...k, revoked: true } : k)) });
  return found;
}

/** The keys of a running server. */
export class KeyRing {
  readonly #file: string;
  #keys: readonly StoredKey[];
  #readAt = 0;
  #modified = 0;
  readonly #buckets = new Map<string, { tokens: number; at: number }>();
  #usage: { day: string; tokens: Record<string, number> };
  #unsaved = false;
  readonly #saving: NodeJS.Timeout;

  private constructor(file: string, keys: readonly StoredKey[], usage: KeyRing["usage"]) {
    this.#file = file;
    this.#keys = keys;
    this.#usage = usage;
    this.#modified = modifiedAt(file);
    this.#saving = setInterval(() => void this.save().catch(() => {}), SAVE_MS); // tried again in ten seconds
    this.#saving.unref();
  }

  static async open(file: string): Promise<KeyRing> {
    const keys = await readKeys(file);
    if (keys.length === 0) throw new Error(`${file}: there are no keys in it; make one with 'mixtape keys create'`);
    const usage = await readFile(usageFile(file), "utf8").then(
      (text) => JSON.parse(text) as KeyRing["usage"],
      () => ({ day: today(), tokens: {} }),
    );
    return new KeyRing(file, keys, usage);
  }

  get usage(): { day: string; tokens: Record<string, number> } {
    return this.#usage;
  }

  /** Who has this key. Throws ServerError `invalid_api_key` without saying why. */
  authenticate(secret: string | null): { caller: Caller; key: StoredKey } {
    this.#reload();
    const hash = Buffer.from(hashOf(secret ?? ""), "hex");
    let found: StoredKey | null = null;
    for (const key of this.#keys) if (timingSafeEqual(hash, Buffer.from(key.hash, "hex"))) found = key; // all of them, in the same time
    const expired = found?.expires != null && Date.parse(found.expires) < Date.now();
    if (secret === null) throw new ServerError("invalid_api_key", "an API key is needed: Authorization: Bearer mxt_…");
    if (!found || found.revoked || expired) throw new ServerError("invalid_api_key", "this API key is not valid");
    return { caller: { id: found.id, models: found.models }, key: found };
  }

  /** Takes one request off the key's rate and looks at its budget. Throws ServerError; the headers tell clients where they stand. */
  admit(key: StoredKey): Record<string, string> {
    const used = this.#usedToday(key.id);
    if (key.tokensPerDay !== null && used >= key.tokensPerDay)
      throw new ServerError("budget_exceeded", `this key has used its ${key.tokensPerDay} tokens of today (UTC)`, {
        retryAfterSeconds: secondsToMidnight(),
      });
    if (key.requestsPerMinute === null) return {};
    const now = performance.now();
    const bucket = this.#buckets.get(key.id) ?? { tokens: key.requestsPerMinute, at: now };
    const rate = key.requestsPerMinute / 60_000;
    bucket.tokens = Math.min(key.requestsPerMinute, bucket.tokens + (now - bucket.at) * rate);
    bucket.at = now;
    this.#buckets.set(key.id, bucket);
    if (bucket.tokens < 1)
      throw new ServerError("rate_limit_exceeded", `this key may ask ${key.requestsPerMinute} times a minute`, {
        retryAfterSeconds: (1 - bucket.tokens) / rate / 1000,
      });
    bucket.tokens -= 1;
    return {
      "x-ratelimit-limit-requests": String(key.requestsPerMinute),
      "x-ratelimit-remaining-requests": String(Math.floor(bucket.tokens)),
    };
  }

  account(id: string, usage: Usage): void {
    this.#usedToday(id);
    this.#usage.tokens[id] = (this.#usage.tokens[id] ?? 0) + usage.promptTokens + usage.completionTokens;
    this.#unsaved = true;
  }

  async save(): Promise<void> {
    if (!this.#unsaved) return;
    this.#unsaved = false;
    await writePrivately(usageFile(this.#file), this.#usage);
  }

  async close(): Promise<void> {
    clearInterval(this.#saving);
    await this.save();
  }

  #usedToday(id: string): number {
    if (this.#usage.day !== today()) this.#usage = { day: today(), tokens: {} };
    return this.#usage.tokens[id] ?? 0;
  }

  /** Keys that were made or revoked meanwhile count from the next second on. A file that is broken just then changes nothing. */
  #reload(): void {
    const now = performance.now();
    if (now - this.#readAt < RELOAD_MS) return;
    this.#readAt = now;
    const modified = modifiedAt(this.#file);
    if (modified === this.#modified) return;
    try {
      this.#keys = parseKeys(this.#file, readFileSync(this.#file, "utf8"));
      this.#modified = modified;
    } catch {
      // The keys that are known stay valid until the file can be read again.
    }
  }
}

function parseKeys(file: string, text: string): StoredKey[] {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new Error(`${file}: broken JSON: ${(cause as Error).message}`, { cause });
  }
  const parsed = KeyFile.safeParse(value);
  if (!parsed.success) throw new Error(`${file}: ${parsed.error.issues[0].path.join(".")}: ${parsed.error.issues[0].message}`);
  return parsed.data.keys;
}

/** For the owner's eyes only, whole or not at all. */
async function writePrivately(file: string, value: object): Promise<void> {
  const temporary = `${file}.${process.pid}.tmp`;
  try {
    const handle = await open(temporary, "w", 0o600);
    try {
      await handle.writeFile(`${JSON.stringify(value, null, 1)}\n`);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, file);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
}

function hashOf(secret: string): string {
  return createHash("sha256").update(secret).digest("hex");
}

function usageFile(file: string): string {
  return `${file}.usage`;
}

function modifiedAt(file: string): number {
  return statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

function today(): string {
  return new Date().toISOString().slice(0, 10);
}

function secondsToMidnight(): number {
  return 86_400 - (Math.floor(Date.now() / 1000) % 86_400);
}
