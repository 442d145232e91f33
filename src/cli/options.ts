/** Options shared by several commands: strict parsing, and conversion to the library's options. Knows no command. */
import { randomInt } from "node:crypto";
import { type Command, InvalidArgumentError, Option } from "commander";
import { COUNTS } from "../api/defaults.ts";
import { DEVICES, isDevice } from "../api/device.ts";
import type { GenerationOptions } from "../api/generation.ts";
import { KV_CACHE_DTYPES, type KvCacheDtype } from "../api/kv.ts";
import type { LoadOptions } from "../api/load.ts";
import { RESIDENCES, type Residence } from "../api/residence.ts";
import { BIAS_RANGE, inRange, RANGES, type Range, rangeText } from "../engine/sampling.ts";
import { displayWidth, padEnd } from "./terminal.ts";

/** Which model to use and how to run it. */
export interface ModelFlags extends HubFlags {
  readonly model: string;
  readonly dtype?: string;
  readonly threads?: number;
  readonly device?: string;
  readonly kvCacheDtype?: KvCacheDtype;
  readonly kvCacheTokens?: number;
  readonly chunkSize?: number;
  readonly weights?: Residence;
  readonly adapter?: readonly AdapterFlag[];
  /** Whether the model was named, by the flag or MIXTAPE_MODEL. */
  readonly modelGiven?: boolean;
}

/** One `--adapter`. */
export interface AdapterFlag {
  readonly folder: string;
  readonly weight: number;
}

/** Where model files come from. */
export interface HubFlags {
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** How to choose tokens and when to stop. */
export interface SamplingFlags {
  readonly maxNewTokens?: number;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly presencePenalty?: number;
  readonly frequencyPenalty?: number;
  readonly noRepeatNgramSize?: number;
  readonly seed?: number;
  readonly greedy?: boolean;
  readonly stop?: readonly string[];
  readonly logitBias?: ReadonlyMap<number, number>;
}

export const DTYPES = ["auto", "fp32", "fp16", "bf16", "fp8", "int8", "int4"] as const;
const SAMPLERS = ["temperature", "topK", "topP", "minP", "seed"] as const;

/** Adds the hub options. */
export function addHubOptions(command: Command): Command {
  return command
    .optionsGroup("Hub options:")
    .option("--revision <name>", "branch, tag or commit on the hub (default: main)")
    .option("--cache-dir <folder>", "download folder (default: the Hugging Face cache)")
    .option("--offline", "use only files on this machine");
}

/** Adds `-m`. */
export function addModelOption(command: Command): Command {
  return command
    .optionsGroup("Model options:")
    .addOption(
      new Option("-m, --model <folder|id>", "a folder, a hub id, or 'default' for the bundled model")
        .env("MIXTAPE_MODEL")
        .default("default"),
    );
}

/** Adds the model options. */
export function addModelOptions(command: Command): Command {
  addModelOption(command)
    .addOption(new Option("--dtype <format>", "weight format in memory").choices(DTYPES).default("auto"))
    .option("--threads <n>", "compute threads (default: one per physical core)", whole(1))
    .addOption(deviceOption().default("auto"));
  command
    .addOption(new Option("--kv-cache-dtype <format>", "KV cache format (default: depends on the weights)").choices(KV_CACHE_DTYPES))
    .option("--kv-cache-tokens <n>", "capacity of the KV cache (default: depends on free memory)", whole(1))
    .option("--chunk-size <n>", "most prompt tokens per step (default: 512, on a GPU 8192)", whole(1))
    .addOption(residenceOption());
  return addHubOptions(command);
}

/** `--device`; without it, `auto`. */
export function deviceOption(): Option {
  return new Option("--device <name>", "where to compute: auto (a GPU if one works and has room), cpu, cuda, cuda:1, reference").argParser(
    (name) => {
      if (!isDevice(name)) throw new InvalidArgumentError(`Known are ${DEVICES}.`);
      return name;
    },
  );
}

/** Adds `--adapter`. */
export function addAdapterOption(command: Command): Command {
  return command
    .optionsGroup("Model options:")
    .option(
      "--adapter <folder|id[=weight]>",
      "LoRA adapter in PEFT's format, a folder or a hub id (user/repo, user/repo@revision), at its own strength or multiplied by weight (repeatable: they add up); without -m, on the base that it names",
      collectAdapter,
    )
    .hook("preAction", (_, action) => {
      action.setOptionValue("modelGiven", action.getOptionValueSource("model") !== "default");
    });
}

/** Where weights are kept; without it, `auto`. */
export function residenceOption(): Option {
  return new Option(
    "--weights <where>",
    "resident: in huge pages before the model is ready; mapped: in the file's pages, which processes share; auto: mapped at first, moved while it answers",
  ).choices(RESIDENCES);
}

/** The library's options for loading a model. */
export function loadOptions(flags: ModelFlags): LoadOptions {
  const { dtype, threads, device, kvCacheDtype, kvCacheTokens, chunkSize, weights } = flags;
  return { dtype, threads, device, kv_cache_dtype: kvCacheDtype, kv_cache_tokens: kvCacheTokens, chunk_size: chunkSize, weights };
}

/** Adds the sampling options. Defaults come from the model's generation_config.json. */
export function addSamplingOptions(command: Command): Command {
  const noRepeat = new Option("--no-repeat-ngram-size <n>", "never repeat a sequence of n tokens; 0: off").argParser(
    within(RANGES.no_repeat_ngram_size),
  );
  noRepeat.negate = false; // otherwise `--no-` would negate an option --repeat-ngram-size
  return command
    .optionsGroup("Sampling options (defaults: the model's generation_config.json):")
    .option("--max-new-tokens <n>", "longest answer in tokens", within(COUNTS.max_new_tokens))
    .option("--temperature <x>", "below 1 sharpens, above 1 flattens, 0 is greedy", within(RANGES.temperature))
    .option("--top-k <n>", "sample from the n likeliest tokens; 0: all", within(RANGES.top_k))
    .option("--top-p <x>", "sample from the likeliest tokens whose probabilities add up to this", within(RANGES.top_p))
    .option("--min-p <x>", "sample from tokens at least this fraction as likely as the likeliest", within(RANGES.min_p))
    .option("--repetition-penalty <x>", "above 1: avoid tokens that have occurred, prompt included", within(RANGES.repetition_penalty))
    .option("--presence-penalty <x>", "above 0: avoid tokens that have occurred in the answer", within(RANGES.presence_penalty))
    .option(
      "--frequency-penalty <x>",
      "above 0: avoid tokens the more often they have occurred in the answer",
      within(RANGES.frequency_penalty),
    )
    .addOption(noRepeat)
    .option("--seed <n>", "make sampling repeatable", within(RANGES.seed))
    .addOption(new Option("--greedy", "always take the likeliest token").conflicts([...SAMPLERS]))
    .option("--stop <text>", "end the answer before this text (repeatable)", collectText)
    .option("--logit-bias <id=value>", "add to a token's logit, -inf forbids it (repeatable)", collectBias);
}

/** The library's generation options. A seed is always set, so that every answer can be reproduced. */
export function generationOptions(flags: SamplingFlags): GenerationOptions & { readonly seed: number } {
  const samples = SAMPLERS.some((key) => flags[key] !== undefined);
  const chosen: GenerationOptions = {
    max_new_tokens: flags.maxNewTokens,
    do_sample: flags.greedy ? false : samples ? true : undefined,
    temperature: flags.temperature,
    top_k: flags.topK,
    top_p: flags.topP,
    min_p: flags.minP,
    repetition_penalty: flags.repetitionPenalty,
    presence_penalty: flags.presencePenalty,
    frequency_penalty: flags.frequencyPenalty,
    no_repeat_ngram_size: flags.noRepeatNgramSize,
    stop_strings: flags.stop,
    logit_bias: flags.logitBias,
  };
  const given = Object.fromEntries(Object.entries(chosen).filter(([, value]) => value !== undefined)) as GenerationOptions;
  return { ...given, seed: flags.seed ?? randomInt(2 ** 47) };
}

/** Parses a whole number, strictly. */
export function whole(least: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\+?\d+$/.test(text) || !Number.isSafeInteger(value) || value < least)
      throw new InvalidArgumentError(`It must be a whole number of at least ${least}.`);
    return value;
  };
}

/** Parses a number of a range, strictly: no trailing text, and whole numbers as digits only. */
export function within(range: Range): (text: string) => number {
  return (text) => {
    const value = range.whole && !/^\+?\d+$/.test(text) ? Number.NaN : parseReal(text);
    if (!inRange(value, range)) throw new InvalidArgumentError(`It must be ${rangeText(range)}.`);
    return value;
  };
}

/** Parses token ids: `1,2,3` or `1 2 3`. */
export function tokenIds(text: string): number[] {
  const parts = text.split(/[\s,]+/).filter((part) => part !== "");
  const wrong = parts.find((part) => !/^\d+$/.test(part));
  if (wrong !== undefined) throw new InvalidArgumentError(`'${wrong}' is not a token id; it must be like 1,2,3.`);
  if (parts.length === 0) throw new InvalidArgumentError("The prompt is empty; it must be like 1,2,3.");
  return parts.map(Number);
}

/** The examples at the end of a command's help. */
export function examples(...rows: readonly (readonly [command: string, meaning: string])[]): string {
  const width = Math.max(...rows.map(([command]) => displayWidth(command)));
  return `\nExamples:\n${rows.map(([command, meaning]) => `  ${padEnd(command, width)}  ${meaning}`).join("\n")}\n`;
}

/** NaN for anything but a plain decimal number. */
function parseReal(text: string): number {
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : Number.NaN;
}

function collectText(text: string, before: readonly string[] = []): readonly string[] {
  if (text === "") throw new InvalidArgumentError("It must not be empty.");
  return [...before, text];
}

function collectAdapter(text: string, before: readonly AdapterFlag[] = []): readonly AdapterFlag[] {
  const [, folder = text, number] = /^(.+)=([^=/]*)$/.exec(text) ?? [];
  const weight = number === undefined ? 1 : parseReal(number);
  if (folder === "" || !Number.isFinite(weight)) throw new InvalidArgumentError("It must be a folder or a hub id, or like folder=0.5.");
  return [...before, { folder, weight }];
}

function collectBias(text: string, before: ReadonlyMap<number, number> = new Map()): ReadonlyMap<number, number> {
  const [, id, amount] = /^(\d+)=(.+)$/.exec(text) ?? [];
  if (id === undefined || amount === undefined) throw new InvalidArgumentError("It must be like 42=-1.5, or 42=-inf to forbid token 42.");
  const value = /^-inf(inity)?$/i.test(amount) ? Number.NEGATIVE_INFINITY : parseReal(amount);
  if (value !== Number.NEGATIVE_INFINITY && !inRange(value, BIAS_RANGE))
    throw new InvalidArgumentError(`The bias must be ${rangeText(BIAS_RANGE)}, or -inf to forbid the token.`);
  return new Map([...before, [Number(id), value]]);
}
