/** `mixtape keys`: makes, lists and revokes the API keys of a server, which reads the file again by itself. */
import { type Command, InvalidArgumentError } from "commander";
import type { ApiKey } from "../server/keys.ts";
import { UsageError } from "./failure.ts";
import { examples, whole } from "./options.ts";
import { displayWidth, excerpt, padEnd } from "./terminal.ts";

const FILE = ["--key-file <file>", "file of the keys", "keys.json"] as const;

interface CreateFlags {
  readonly keyFile: string;
  readonly expires?: string;
  readonly models?: readonly string[];
  readonly requestsPerMinute?: number;
  readonly tokensPerDay?: number;
  readonly json?: boolean;
}

export function addKeys(program: Command): void {
  const keys = program.command("keys").description("Make, list and revoke the API keys of a server.");
  keys
    .command("create")
    .description("Make a key and print it. It is shown this once: the file keeps its hash.")
    .argument("<name>", "whose key it is, or what for")
    .option(...FILE)
    .option("--expires <when>", "a date like 2027-01-31, or a time from now like 90d, 12h", expiry)
    .option("--models <names>", "models that it may use, like small,big (default: all)", nameList)
    .option("--requests-per-minute <n>", "rate limit", whole(1))
    .option("--tokens-per-day <n>", "budget of tokens, prompts and answers together, by the day in UTC", whole(1))
    .option("--json", "print the key with what is kept of it")
    .addHelpText(
      "after",
      examples(
        ["mixtape keys create alice", "a key without limits"],
        ["mixtape keys create ci --expires 90d --requests-per-minute 60 --tokens-per-day 1000000", "one with limits"],
      ),
    )
    .action(create);
  keys
    .command("list")
    .description("List the keys, without their texts.")
    .option(...FILE)
    .option("--json", "print them as JSON")
    .addHelpText("after", examples(["mixtape keys list", "all, revoked ones included"]))
    .action(list);
  keys
    .command("revoke")
    .description("Make a key invalid. A running server follows within a second or two.")
    .argument("<id>", "its id as listed, or its name where only one has it")
    .option(...FILE)
    .addHelpText("after", examples(["mixtape keys revoke key_0123456789ab", "by id"], ["mixtape keys revoke alice", "by name"]))
    .action(revoke);
}

async function create(name: string, flags: CreateFlags): Promise<void> {
  const { changeKeys, createKey } = await import("../server/keys.ts");
  if (name.trim() === "" || name.length > 200) throw new UsageError(`the name has ${name.length} characters; it must have 1 to 200`);
  const { secret, key } = createKey({
    name,
    expires: flags.expires ?? null,
    models: flags.models ? [...flags.models] : null,
    requestsPerMinute: flags.requestsPerMinute ?? null,
    tokensPerDay: flags.tokensPerDay ?? null,
  });
  await changeKeys(flags.keyFile, (keys) => [...keys, key]);
  process.stdout.write(flags.json ? `${JSON.stringify({ secret, ...withoutHash(key) })}\n` : `${secret}\n`);
  process.stderr.write(`mixtape: ${key.id} (${name}) is in ${flags.keyFile}; the key above is not shown again\n`);
}

async function list({ keyFile, json }: { readonly keyFile: string; readonly json?: boolean }): Promise<void> {
  const { readKeys, refusal } = await import("../server/keys.ts");
  const keys = await readKeys(keyFile);
  if (json) {
    process.stdout.write(`${JSON.stringify(keys.map(withoutHash), null, 2)}\n`);
    return;
  }
  const day = (moment: string | null) => moment?.slice(0, 10) ?? "never";
  const rows = [
    ["id", "name", "created", "expires", "state", "models", "requests/min", "tokens/day"],
    ...keys.map((k) => [
      k.id,
      excerpt(k.name, 40),
      day(k.created),
      day(k.expires),
      refusal(k) ?? "valid",
      k.models?.join(",") ?? "all",
      String(k.requestsPerMinute ?? "-"),
      String(k.tokensPerDay ?? "-"),
    ]),
  ];
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => displayWidth(row[column]))));
  for (const row of rows)
    process.stdout.write(
      `${row
        .map((cell, i) => padEnd(cell, widths[i]))
        .join("  ")
        .trimEnd()}\n`,
    );
}

async function revoke(wanted: string, { keyFile }: { readonly keyFile: string }): Promise<void> {
  const { changeKeys, readKeys } = await import("../server/keys.ts");
  await readKeys(keyFile); // a file that is not there is not made for this
  await changeKeys(keyFile, (keys) => {
    const found = keys.filter(({ id, name }) => id === wanted || name === wanted);
    const valid = found.filter(({ revoked }) => revoked === null);
    if (found.length === 0) throw new UsageError(`${keyFile} has no key with the id or name ${wanted}; 'mixtape keys list' lists them`);
    if (valid.length === 0) throw new UsageError(`${wanted} is revoked already`);
    if (valid.length > 1)
      throw new UsageError(`${valid.length} keys are named ${wanted}: ${valid.map(({ id }) => id).join(", ")}; revoke one by its id`);
    return keys.map((key) => (key === valid[0] ? { ...key, revoked: new Date().toISOString() } : key));
  });
  process.stderr.write(`mixtape: ${wanted} is revoked\n`);
}

function withoutHash({ hash: _, ...rest }: ApiKey): Omit<ApiKey, "hash"> {
  return rest;
}

/** Parses when a key ends: a date, a moment, or a time from now. */
function expiry(text: string): string {
  const [, amount, unit] = /^(\d{1,6})([hd])$/.exec(text) ?? [];
  const at =
    amount !== undefined
      ? Date.now() + Number(amount) * (unit === "h" ? 3_600_000 : 86_400_000)
      : /^\d{4}-\d\d-\d\d/.test(text)
        ? Date.parse(text)
        : Number.NaN;
  if (Number.isNaN(at)) throw new InvalidArgumentError("It must be a date like 2027-01-31, or a time from now like 90d or 12h.");
  if (at <= Date.now()) throw new InvalidArgumentError("It is over already.");
  return new Date(at).toISOString();
}

function nameList(text: string): readonly string[] {
  const names = text.split(",").map((name) => name.trim());
  if (names.includes("")) throw new InvalidArgumentError("It must be names with commas between them, like small,big.");
  return names;
}
