/** `mixtape ls`, `show` and `rm`: the models and adapters on this machine. Loads no model and asks no hub. */
import { createInterface } from "node:readline/promises";
import type { Command } from "commander";
import type { Item } from "../api/inventory.ts";
import { UsageError } from "./failure.ts";
import { examples } from "./options.ts";
import { colours, counted, displayWidth, formatBytes, padEnd } from "./terminal.ts";

interface Flags {
  readonly cacheDir?: string;
  readonly json?: boolean;
  readonly yes?: boolean;
}

export function addInventory(program: Command): void {
  const cache = ["--cache-dir <folder>", "the download folder (default: the Hugging Face cache)"] as const;
  program
    .command("ls")
    .description("List the models and adapters on this machine: bundled, downloaded, and in folders.")
    .argument("[folders...]", "folders in which to look (default: the current one)")
    .option("--json", "print JSON")
    .option(...cache)
    .addHelpText(
      "after",
      examples(
        ["mixtape ls", "what is here"],
        ["mixtape ls runs ~/models", "what is in these folders"],
        ["mixtape ls --json | jq '.[].name'", "for scripts"],
      ),
    )
    .action(list);
  program
    .command("show")
    .description("Show a model or an adapter on this machine: its kind, format, base, revisions and files.")
    .argument("<name>", "a hub id, a folder, or default")
    .option("--json", "print JSON")
    .option(...cache)
    .addHelpText(
      "after",
      examples(
        ["mixtape show baidu/ERNIE-4.5-0.3B-PT", "a downloaded model"],
        ["mixtape show run/final --json", "an adapter, for scripts"],
      ),
    )
    .action(show);
  program
    .command("rm")
    .description("Delete a model or an adapter from this machine: of a downloaded one all revisions, else its folder.")
    .argument("<names...>", "as mixtape ls lists them")
    .option("-y, --yes", "do not ask")
    .option(...cache)
    .addHelpText("after", examples(["mixtape rm baidu/ERNIE-4.5-0.3B-PT", "asks first"], ["mixtape rm ./old-model --yes", "does not"]))
    .action(removeAll);
}

async function list(given: readonly string[], flags: Flags): Promise<void> {
  const { inventory } = await import("../api/inventory.ts");
  const { items, others } = await inventory({ folders: given.length > 0 ? given : ["."], cache_dir: flags.cacheDir });
  if (flags.json) {
    process.stdout.write(`${JSON.stringify(items, null, 2)}\n`);
    return;
  }
  const { dim } = colours(process.stdout);
  const rows = items.map((item) => [item.name, item.kind, item.format ?? "-", formatBytes(item.bytes), item.place]);
  const heads = ["name", "kind", "format", "size", "where"];
  const widths = heads.map((head, c) => Math.max(...[head, ...rows.map((row) => row[c])].map(displayWidth)));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, c) => padEnd(cell, widths[c]))
      .join("  ")
      .trimEnd();
  const notes = items.map(({ fault, base }) => (fault !== null ? `  ${fault}` : base !== null ? `  on ${base}` : ""));
  process.stdout.write(`${[dim(line(heads)), ...rows.map((row, i) => `${line(row)}${dim(notes[i])}`)].join("\n")}\n`);
  if (others > 0)
    process.stderr.write(`${dim(`${others} other ${others === 1 ? "repository" : "repositories"} in the cache: not for mixtape`)}\n`);
}

async function show(name: string, flags: Flags): Promise<void> {
  const { filesOf } = await import("../api/inventory.ts");
  const item = await found(name, flags);
  const files = await filesOf(item);
  if (flags.json) {
    process.stdout.write(`${JSON.stringify({ ...item, files }, null, 2)}\n`);
    return;
  }
  const { bold, dim } = colours(process.stdout);
  const revisions = Object.entries(item.revisions).map(([revision, commit]) => `${revision} ${dim(commit)}`);
  const facts: (readonly [string, string | null])[] = [
    ["kind", item.kind],
    ["format", item.format],
    ["size", formatBytes(item.bytes)],
    ["base", item.base],
    ["folder", item.folder],
    ["revisions", revisions.length > 0 ? revisions.join(", ") : null],
    ["fault", item.fault],
    ...files.map((file, i) => [i === 0 ? "files" : "", `${padEnd(formatBytes(file.bytes), 10)}${file.name}`] as const),
  ];
  const lines = facts.flatMap(([what, value]) => (value === null ? [] : [`  ${padEnd(what, 12)}${value}`]));
  process.stdout.write(`${[bold(item.name), ...lines].join("\n")}\n`);
  if (item.kind !== "adapter" && item.fault === null)
    process.stderr.write(`${dim(`sizes, parameters and defaults: mixtape info ${item.name}`)}\n`);
}

async function removeAll(names: readonly string[], flags: Flags): Promise<void> {
  const { remove } = await import("../api/inventory.ts");
  const items: Item[] = [];
  for (const name of new Set(names)) items.push(await found(name, flags)); // all are there before the first is deleted
  for (const item of items) {
    const what = `${item.name} (${formatBytes(item.bytes)}, ${item.place === "cache" ? `downloaded, ${counted(Math.max(1, Object.keys(item.revisions).length), "revision")}` : item.folder})`;
    if (!flags.yes && !(await agreed(`Delete ${what}?`))) {
      process.stderr.write(`kept ${item.name}\n`);
      continue;
    }
    await remove(item);
    process.stdout.write(`deleted ${what}\n`);
  }
}

async function found(name: string, { cacheDir }: Flags): Promise<Item> {
  const { findItem } = await import("../api/inventory.ts");
  const item = await findItem(name, { cache_dir: cacheDir });
  if (item) return item;
  throw new UsageError(`${name}: no model or adapter of this name is on this machine; mixtape ls lists those that are`);
}

/** Asks at the terminal. Throws UsageError where there is none. */
async function agreed(question: string): Promise<boolean> {
  if (!process.stdin.isTTY) throw new UsageError(`${question} There is no terminal to answer at; --yes deletes without asking`);
  const lines = createInterface({ input: process.stdin, output: process.stderr });
  try {
    return /^y(es)?$/i.test((await lines.question(`${question} [y/N] `)).trim());
  } finally {
    lines.close();
  }
}
