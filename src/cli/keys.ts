/** `mixtape keys`: makes, lists and revokes the keys of `mixtape serve`. */
import { type Command, InvalidArgumentError } from "commander";
import { examples, whole } from "./options.ts";
import { padEnd } from "./terminal.ts";

interface CreateFlags {
  readonly name: string;
  readonly expires?: string;
  readonly model?: readonly string[];
  readonly requestsPerMinute?: number;
  readonly tokensPerDay?: number;
}

export function addKeys(program: Command): void {
  const keys = program.command("keys").description("Make, list and revoke the API keys of 'mixtape serve'. Only their hashes are stored.");
  keys
    .command("create")
    .description("Make a key, and print it: this once.")
    .argument("<file>", "the key file; it is made if it is not there")
    .requiredOption("--name <name>", "whose it is")
    .option("--expires <date>", "when it stops being valid, like 2027-01-31", parseDate)
    .option("--model <name>", "only this model (repeatable; default: all)", (v: string, all: string[] = []) => [...all, v])
    .option("--requests-per-minute <n>", "how often it may ask", whole(1))
    .option("--tokens-per-day <n>", "prompts and answers together, a day in UTC", whole(1))
    .addHelpText("after", examples(["mixtape keys create keys.json --name alice --tokens-per-day 1000000", "a key with a budget"]))
    .action(create);
  keys.command("list").description("List the keys, without the keys themselves.").argument("<file>", "the key file").action(list);
  keys
    .command("revoke")
    .description("Revoke a key. Running servers refuse it within a second.")
    .argument("<file>", "the key file")
    .argument("<id|name>", "as 'mixtape keys list' shows it")
    .action(revoke);
}

async function create(file: string, flags: CreateFlags): Promise<void> {
  const { createKey } = await import("../server/keys.ts");
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
  const { readKeys } = await import("../server/keys.ts");
  const rows = (await readKeys(file)).map((k) => [
    k.id,
    k.name,
    k.revoked ? "revoked" : k.expires && Date.parse(k.expires) < Date.now() ? "expired" : "valid",
    k.expires?.slice(0, 10) ?? "never",
    k.models?.join(",") ?? "all",
    k.requestsPerMinute === null ? "no limit" : `${k.requestsPerMinute}/min`,
    k.tokensPerDay === null ? "no limit" : `${k.tokensPerDay}/day`,
  ]);
  const table = [["id", "name", "state", "expires", "models", "requests", "tokens"], ...rows];
  const widths = table[0].map((_, c) => Math.max(...table.map((row) => row[c].length)));
  for (const row of table)
    process.stdout.write(
      `${row
        .map((cell, c) => padEnd(cell, widths[c]))
        .join("  ")
        .trimEnd()}\n`,
    );
}

async function revoke(file: string, idOrName: string): Promise<void> {
  const { revokeKey } = await import("../server/keys.ts");
  for (const key of await revokeKey(file, idOrName)) process.stdout.write(`revoked ${key.id} of ${key.name}\n`);
}

function parseDate(text: string): string {
  const date = new Date(text);
  if (Number.isNaN(date.getTime())) throw new InvalidArgumentError("It must be a date like 2027-01-31.");
  return date.toISOString();
}
