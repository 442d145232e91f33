/** `mixtape bench`: measures a model's speed and compares it with the machine's limits and with another model. Holds no model itself. */
import { writeFile } from "node:fs/promises";
import { cpus, totalmem } from "node:os";
import { type Command, InvalidArgumentError, Option } from "commander";
import { KV_CACHE_DTYPES, type KvCacheDtype } from "../api/kv.ts";
import { onInterrupt } from "./failure.ts";
import { addModelOptions, DTYPES, examples, loadOptions, type ModelFlags, whole } from "./options.ts";
import type { Setting } from "./subject.ts";
import { notice } from "./terminal.ts";

interface BenchFlags extends ModelFlags {
  readonly promptLengths: readonly number[];
  readonly contexts: readonly number[];
  readonly newTokens: number;
  readonly repeat: number;
  readonly compare?: string;
  readonly compareThreads?: number;
  readonly compareDtype?: string;
  readonly compareKvCacheDtype?: KvCacheDtype;
  readonly profile?: boolean;
  readonly json?: boolean;
  readonly svg?: string;
}

export function addBench(program: Command): void {
  const command = program
    .command("bench")
    .description("Measure a model's speed, load time and memory, and compare them with the machine's limits.")
    .optionsGroup("Options:")
    .option("--prompt-lengths <list>", "prompt lengths in tokens, like 128,512", lengths, [128, 512])
    .option("--contexts <list>", "context lengths at which generation is timed, like 16,1024", lengths, [16, 1024])
    .option("--new-tokens <n>", "number of tokens to generate", whole(1), 32)
    .option("--repeat <n>", "number of rounds; results are medians", whole(1), 5)
    .option("--profile", "report time by op and the speed of reading weights")
    .option("--json", "print JSON")
    .option("--svg <file>", "write a plot")
    .optionsGroup("Compare with, taking turns in every round:")
    .option("--compare <folder|id>", "another model")
    .option("--compare-threads <n>", "another number of threads", whole(1))
    .addOption(new Option("--compare-dtype <format>", "another weight format").choices(DTYPES))
    .addOption(new Option("--compare-kv-cache-dtype <format>", "another KV cache format").choices(KV_CACHE_DTYPES));
  addModelOptions(command)
    .addHelpText(
      "after",
      examples(
        ["mixtape bench", "the bundled model"],
        ["mixtape bench -m ./my-model-int4 --profile", "where the time goes"],
        ["mixtape bench -m ./my-model --compare ./my-model-int8 --svg speed.svg", "two models, and a plot"],
        ["mixtape bench --threads 1 --compare-threads 2", "does a second thread help?"],
        ['mixtape bench --json | jq ".models[0].generation"', "for scripts"],
      ),
    )
    .action(bench);
}

async function bench(flags: BenchFlags): Promise<void> {
  const [{ findFolder }, { measureInTurns }, { compare, report }] = await Promise.all([
    import("./models.ts"),
    import("./rounds.ts"),
    import("./report.ts"),
  ]);
  const interrupt = onInterrupt();
  const status = statusLine();
  try {
    const { signal } = interrupt;
    const { model } = flags;
    const options = loadOptions(flags);
    const folder = await findFolder(model, flags, { signal });
    const settings: Setting[] = [{ model, folder, options }];
    const { compareThreads, compareDtype, compareKvCacheDtype } = flags;
    if ([flags.compare, compareThreads, compareDtype, compareKvCacheDtype].some((flag) => flag !== undefined))
      settings.push({
        model: flags.compare ?? model,
        folder: flags.compare === undefined ? folder : await findFolder(flags.compare, flags, { signal }),
        options: {
          ...options,
          dtype: compareDtype ?? options.dtype,
          threads: compareThreads ?? options.threads,
          kv_cache_dtype: compareKvCacheDtype ?? options.kv_cache_dtype,
        },
      });
    const schedule = { ...flags, profile: flags.profile === true };
    const models = await measureInTurns(settings, schedule, signal, {
      onStep: status.show,
      onCut: (message) => {
        status.clear();
        notice(`mixtape: ${message}`);
      },
    });
    status.clear();
    const machine = { cpu: cpus()[0]?.model.trim() ?? "unknown", cores: cpus().length, memory_bytes: totalmem() };
    const comparison = models.length > 1 ? compare(models[0], models[1]) : undefined;
    const result = { machine, rounds: flags.repeat, models, ...(comparison ? { comparison } : {}) };
    process.stdout.write(flags.json ? `${JSON.stringify(result, null, 2)}\n` : report(result));
    if (flags.svg !== undefined) {
      const { speedSvg } = await import("./plot.ts");
      await writeFile(flags.svg, speedSvg(result));
      notice(`wrote ${flags.svg}`);
    }
  } finally {
    status.clear();
    interrupt.release();
  }
}

/** Shows the current activity in one line that is overwritten; does nothing without a terminal. */
function statusLine(): { show(what: string): void; clear(): void } {
  const write = (text: string) => {
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[2K${text}`);
  };
  return { show: write, clear: () => write("") };
}

/** Parses lengths: `128,512`. */
function lengths(text: string): number[] {
  const parse = whole(1);
  const all = text.split(",").map((part) => {
    try {
      return parse(part.trim());
    } catch {
      throw new InvalidArgumentError(`'${part}' is not a whole number of at least 1; it must be like 128,512.`);
    }
  });
  return [...new Set(all)];
}
