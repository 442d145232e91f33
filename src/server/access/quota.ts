/** What each key has used: requests per minute in a token bucket, tokens per day (UTC) in a budget that survives restarts. Knows no protocol. */
import { randomBytes } from "node:crypto";
import { readFile, rename, rm, writeFile } from "node:fs/promises";
import { z } from "zod";
import { ServerError } from "../errors.ts";
import type { ApiKey } from "./keys.ts";

const usageSchema = z.strictObject({ day: z.iso.date(), tokens: z.record(z.string(), z.int().min(0)) });

/** Limits and what remains of them; null where there is no limit. Resets are in seconds from now. */
export interface Allowance {
  readonly requests: { readonly limit: number; readonly remaining: number; readonly resetSeconds: number } | null;
  readonly tokens: { readonly limit: number; readonly remaining: number; readonly resetSeconds: number } | null;
}

export type Limits = Pick<ApiKey, "id" | "requestsPerMinute" | "tokensPerDay">;

interface Bucket {
  /** Requests left, as of `at`. */
  level: number;
  at: number;
}

export interface QuotaOptions {
  /** File for used tokens; null: kept in memory only. */
  readonly file: string | null;
  readonly onSaveError: (error: unknown) => void;
  /** Default 10. */
  readonly saveSeconds?: number;
  /** Milliseconds since 1970. Default: the system clock. */
  readonly now?: () => number;
}

export class Quota {
  readonly #file: string | null;
  readonly #now: () => number;
  readonly #onSaveError: QuotaOptions["onSaveError"];
  readonly #buckets = new Map<string, Bucket>();
  #tokens = new Map<string, number>();
  #day: string;
  #changed = false;
  #saving: Promise<void> = Promise.resolve();
  readonly #timer: NodeJS.Timeout | null;

  private constructor({ file, onSaveError, saveSeconds = 10, now = Date.now }: QuotaOptions) {
    this.#file = file;
    this.#now = now;
    this.#onSaveError = onSaveError;
    this.#day = dayOf(now());
    this.#timer = file === null ? null : setInterval(() => void this.save().catch(onSaveError), saveSeconds * 1000).unref();
  }

  /** Reads today's usage. A broken file is an error, since ignoring it would reset every budget. */
  static async open(options: QuotaOptions): Promise<Quota> {
    const tokens = options.file === null ? new Map<string, number>() : await readUsage(options.file, dayOf((options.now ?? Date.now)()));
    const quota = new Quota(options);
    quota.#tokens = tokens;
    return quota;
  }

  /**
   * Counts a request of this key. Throws ServerError `rate_limit_exceeded` or `budget_exceeded`, with the seconds to wait. The
   * budget is checked before a request; a running request may exceed it.
   */
  take(key: Limits): void {
    const { tokens } = this.allowance(key);
    if (tokens !== null && tokens.remaining === 0)
      throw new ServerError(
        "budget_exceeded",
        `this API key has used its ${tokens.limit} tokens for today; the budget resets at midnight UTC`,
        {
          retryAfterSeconds: tokens.resetSeconds,
        },
      );
    const { requestsPerMinute: limit } = key;
    if (limit === null) return;
    const bucket = this.#bucket(key.id, limit);
    if (bucket.level < 1)
      throw new ServerError(
        "rate_limit_exceeded",
        `this API key may make ${limit} request${limit === 1 ? "" : "s"} per minute; try again later`,
        {
          retryAfterSeconds: ((1 - bucket.level) * 60) / limit,
        },
      );
    bucket.level--;
  }

  /** What remains, without using any of it. */
  allowance({ id, requestsPerMinute, tokensPerDay }: Limits): Allowance {
    const left = (limit: number) => Math.max(0, limit - this.used(id));
    const level = requestsPerMinute === null ? 0 : this.#bucket(id, requestsPerMinute).level;
    return {
      requests:
        requestsPerMinute === null
          ? null
          : {
              limit: requestsPerMinute,
              remaining: Math.floor(level),
              resetSeconds: ((requestsPerMinute - level) * 60) / requestsPerMinute,
            },
      tokens:
        tokensPerDay === null ? null : { limit: tokensPerDay, remaining: left(tokensPerDay), resetSeconds: secondsToMidnight(this.#now()) },
    };
  }

  /** Adds to what a key has used today. */
  charge(id: string, tokens: number): void {
    this.#tokens.set(id, this.used(id) + tokens);
    this.#changed = true;
  }

  /** Tokens that a key has used today. */
  used(id: string): number {
    const today = dayOf(this.#now());
    if (today !== this.#day) {
      this.#day = today;
      this.#tokens.clear();
      this.#changed = true;
    }
    return this.#tokens.get(id) ?? 0;
  }

  /** Saves changed usage atomically. */
  save(): Promise<void> {
    const write = async (): Promise<void> => {
      if (this.#file === null || !this.#changed) return;
      this.#changed = false;
      const temporary = `${this.#file}.${randomBytes(4).toString("hex")}.new`;
      try {
        await writeFile(temporary, JSON.stringify({ day: this.#day, tokens: Object.fromEntries(this.#tokens) }), { mode: 0o600 });
        await rename(temporary, this.#file);
      } catch (error) {
        this.#changed = true;
        await rm(temporary, { force: true });
        throw error;
      }
    };
    this.#saving = this.#saving.catch(() => {}).then(write); // the previous caller sees the previous failure
    return this.#saving;
  }

  async close(): Promise<void> {
    if (this.#timer) clearInterval(this.#timer);
    await this.save().catch(this.#onSaveError);
  }

  #bucket(id: string, limit: number): Bucket {
    const at = this.#now();
    const bucket = this.#buckets.get(id) ?? { level: limit, at };
    bucket.level = Math.min(limit, bucket.level + (Math.max(0, at - bucket.at) * limit) / 60_000);
    bucket.at = at;
    this.#buckets.set(id, bucket);
    return bucket;
  }
}

async function readUsage(file: string, today: string): Promise<Map<string, number>> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === "ENOENT") return new Map();
    throw new Error(`${file}: can't be read (${(cause as Error).message})`, { cause });
  }
  try {
    const { day, tokens } = usageSchema.parse(JSON.parse(text));
    return new Map(day === today ? Object.entries(tokens) : []);
  } catch (cause) {
    throw new Error(`${file}: not a record of used tokens; delete it to reset today's budgets`, { cause });
  }
}

function dayOf(ms: number): string {
  return new Date(ms).toISOString().slice(0, 10);
}

function secondsToMidnight(ms: number): number {
  return 86_400 - (Math.floor(ms / 1000) % 86_400);
}
