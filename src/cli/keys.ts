/** `mixtape keys`: creates, lists and revokes API keys of `mixtape serve`. Knows no server. */
import { type Command, InvalidArgumentError } from "commander";
import { nearest } from "../tokenizer/nearest.ts";
import { UsageError } from "./failure.ts";
import { examples, whole } from "./options.ts";
import { displayWidth, excerpt, padEnd } from "./terminal.ts";

interface CreateFlags {
  readonly name: string;
  readonly expires?: string;
  readonly model?: readonly string[];
  readonly requestsPerMinute?: number;
  readonly tokensPerDay?: number;
}

export function addKeys(program: Command): void {
  const keys = program
    .command("keys")
    .description("Create, list and revoke the API keys of 'mixtape serve'. Only hashes are stored.")
    .argument("[command...]")
    .usage("[command] [options]")
    .action(([name]: readonly string[]) => {
      if (name === undefined) return keys.outputHelp();
      const found = keys.commands.find((each) => each.name() === nearest(name, ["create", "list", "revoke"]));
      throw new UsageError(
        `unknown command 'keys ${name}'${found ? ` (Did you mean ${found.name()}?)` : ": it must be create, list or revoke"}`,
      );
    });
  keys
    .command("create")
    .description("Create a key and print it. It cannot be shown again.")
    .argument("<file>", "the key file; created if it does not exist")
    .requiredOption("--name <name>", "name of its owner")
    .option("--expires <when>", "expiry: a date like 2027-01-31, or a time from now like 90d or 12h", expiry)
    .option("--model <name>", "allow only this model (repeatable; default: all)", (v: string, all: string[] = []) => [...all, v])
    .option("--requests-per-minute <n>", "limit of requests per minute", whole(1))
    .option("--tokens-per-day <n>", "limit of tokens per day (UTC), prompts and answers together", whole(1))
    .addHelpText("after", examples(["mixtape keys create keys.json --name alice --tokens-per-day 1000000", "a key with a budget"]))
    .action(create);
  keys.command("list").description("List the keys without their secrets.").argument("<file>", "the key file").action(list);
  keys
    .command("revoke")
    .description("Revoke a key. Servers that see the changed file reject it within seconds.")
    .argument("<file>", "the key file")
    .argument("<id|name>", "as 'mixtape keys list' shows it")
    .action(revoke);
}

async function create(file: string, flags: CreateFlags): Promise<void> {
  const { createKey } = await import("../server/access/keys.ts");
  const { secret, key } = await createKey(file, {
    name: flags.name,
    expires: flags.expires ?? null,
    models: flags.model ? [...flags.model] : null,
    requestsPerMinute: flags.requestsPerMinute ?? null,
    tokensPerDay: flags.tokensPerDay ?? null,
  });
  process.stdout.write(`${secret}\n`);
  process.stderr.write(`key ${key.id} of ${key.name}; it is not shown again\n`);
}

async function list(file: string): Promise<void> {
  const { readKeys, refusal } = await import("../server/access/keys.ts");
  const rows = (await readKeys(file)).map((k) => [
    k.id,
    excerpt(k.name, 40),
    refusal(k) ?? "valid",
    k.expires?.slice(0, 10) ?? "never",
    k.models?.join(",") ?? "all",
    k.requestsPerMinute === null ? "no limit" : `${k.requestsPerMinute}/min`,
    k.tokensPerDay === null ? "no limit" : `${k.tokensPerDay}/day`,
  ]);
  const table = [["id", "name", "state", "expires", "models", "requests", "tokens"], ...rows];
  const widths = table[0].map((_, c) => Math.max(...table.map((row) => displayWidth(row[c]))));
  for (const row of table)
    process.stdout.write(
      `${row
        .map((cell, c) => padEnd(cell, widths[c]))
        .join("  ")
        .trimEnd()}\n`,
    );
}

async function revoke(file: string, idOrName: string): Promise<void> {
  const { revokeKey } = await import("../server/access/keys.ts");
  for (const key of await revokeKey(file, idOrName)) process.stdout.write(`revoked ${key.id} of ${key.name}\n`);
  process.stderr.write(
    `${file} is written; a server that reads this very file rejects the key within seconds. If it can't read the file, its /ready says so\n`,
  );
}

/** Parses an expiry: a date, or a time from now. */
function expiry(text: string): string {
  const [, amount, unit] = /^(\d{1,5})([hd])$/.exec(text) ?? [];
  const fromNow = Date.now() + Number(amount) * (unit === "h" ? 3_600_000 : 86_400_000);
  const at = amount !== undefined ? fromNow : /^\d{4}-\d\d-\d\d/.test(text) ? Date.parse(text) : Number.NaN;
  if (Number.isNaN(at)) throw new InvalidArgumentError("It must be a date like 2027-01-31, or a time from now like 90d or 12h.");
  if (at <= Date.now()) throw new InvalidArgumentError("It is in the past.");
  return new Date(at).toISOString();
}
