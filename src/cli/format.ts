/** `--schema` and `--regex`: the format an answer must have. Checked before anything is loaded. Knows no model. */
import { readFile } from "node:fs/promises";
import type { Command } from "commander";
import { Option } from "commander";
import type { ResponseFormatOption } from "../chat/format.ts";
import { UsageError } from "./failure.ts";

export interface FormatFlags {
  readonly schema?: string;
  readonly regex?: string;
}

export function addFormatOptions(command: Command): Command {
  return command
    .addOption(new Option("--schema <file>", "JSON schema that the answer satisfies, from a file").conflicts("regex"))
    .option("--regex <pattern>", "regular expression that the whole answer matches");
}

/** The library's option; undefined for free text. Throws UsageError that names the file and where in it what is wrong. */
export async function readFormatFlags({ schema: file, regex }: FormatFlags): Promise<ResponseFormatOption | undefined> {
  if (file === undefined && regex === undefined) return undefined;
  const [{ readFormat }, { checkShape }] = await Promise.all([import("../chat/format.ts"), import("../grammar/grammars.ts")]);
  const option: ResponseFormatOption =
    file === undefined ? { type: "regex", pattern: regex ?? "" } : { type: "json_schema", json_schema: { schema: await readSchema(file) } };
  const source = file ?? "--regex";
  try {
    const format = readFormat(option);
    if (format.kind !== "text") checkShape(format, source);
  } catch (cause) {
    throw new UsageError(`${source}: ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
  return option;
}

async function readSchema(file: string): Promise<Readonly<Record<string, unknown>>> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (cause) {
    throw new UsageError(`${file}: cannot be read (${cause instanceof Error ? cause.message : String(cause)})`, { cause });
  }
  let value: unknown;
  try {
    value = JSON.parse(text.replace(/^\ufeff/, ""));
  } catch (cause) {
    throw new UsageError(`${file}: broken JSON (${cause instanceof Error ? cause.message : String(cause)})`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new UsageError(`${file}: not a JSON schema: it must be an object like {"type": "object", "properties": {…}}`);
  return value as Record<string, unknown>;
}
