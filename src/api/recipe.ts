/** The configuration of a training run: its fields, files and overrides, and their checks. Starts nothing. */
import { readFile } from "node:fs/promises";
import { parse as parseYaml, YAMLParseError } from "yaml";
import { z } from "zod";
import { ADAPTER_DEFAULTS } from "../checkpoint/lora.ts";
import { suggestion } from "../tokenizer/nearest.ts";
import { ARGUMENT_NAMES, type TrainingArguments, trainingArguments } from "../train/arguments.ts";
import { dataOptions } from "../train/data/options.ts";

/** A configuration that cannot be used; the message is one line with the field, what was seen and what is allowed. */
export class RecipeError extends RangeError {
  override readonly name = "RecipeError";
}

const files = z.union([z.string().min(1), z.array(z.string().min(1)).min(1)]);
const selection = z.strictObject({
  layers: z
    .union([z.string().min(1), z.number().transform(String), z.array(z.int().min(0))])
    .optional()
    .describe("layers that are trained: 20-27, or a list; those below stay frozen. Default: all"),
  modules: z
    .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
    .optional()
    .describe("of method full: parts of modules' names (self_attn, mlp.experts), or a regular expression. Default: all"),
  experts: z
    .union([
      z.literal("all"),
      z.strictObject({ top_by_routing_load: z.int().min(1).describe("the experts of each layer that the training data uses most") }),
      z.record(z.string().regex(/^\d+$/, "must be a layer's number"), z.array(z.int().min(0)).min(1)),
    ])
    .optional()
    .describe("routed experts that are trained: all, {layer: [numbers]}, or {top_by_routing_load: n}. Default: all"),
  freeze_layers: z
    .union([z.string().min(1), z.number().transform(String), z.array(z.int().min(0))])
    .optional()
    .describe("of the model's own numbers: layers that stay frozen, 0-5; with layer 0 the embeddings too. Default: none"),
  freeze_modules: z
    .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
    .optional()
    .describe("of the model's own numbers: modules that stay frozen, as modules: mlp.experts. Default: none"),
});

/** What methods that say how the model is trained, not which part of it, train. */
const TUNINGS = ["lora", "full", "experts"] as const;
export type Tuning = (typeof TUNINGS)[number];

const recipe = z.strictObject({
  model: z.string().min(1).default("default").describe("a folder, a hub id, or default, the bundled model"),
  dtype: z.enum(["auto", "fp32", "fp16", "bf16", "int8", "int4"]).default("auto").describe("format of the weights that stay frozen"),
  device: z.enum(["auto", "cpu", "reference"]).default("auto").describe("where to compute"),
  threads: z.int().min(1).max(1024).optional().describe("compute threads; default: one per physical core"),
  method: z
    .enum([...TUNINGS, "classification", "dpo"])
    .default("lora")
    .describe("adapters, the model's own numbers, or those of routed experts alone; a classifier's head; preferences"),
  tuning: z.enum(TUNINGS).optional().describe("what classification and dpo train; a classifier's head always. Default: lora"),
  beta: z.number().gt(0).optional().describe("of dpo: how closely the model stays with the one before. Default: 0.1"),
  label_smoothing: z
    .number()
    .min(0)
    .lt(0.5)
    .optional()
    .describe("of dpo: the share of preferences that are the wrong way round. Default: 0"),
  adapter: z.string().min(1).optional().describe("of method lora: a folder of adapters to go on from; default: new ones"),
  target_modules: z
    .union([z.string().min(1), z.array(z.string().min(1)).min(1)])
    .optional()
    .describe("of method lora: all-linear, names, or a regular expression; the same as lora.target_modules"),
  lora: z
    .partialRecord(z.enum(Object.keys(ADAPTER_DEFAULTS) as [string, ...string[]]), z.unknown())
    .default({})
    .describe("fields of PEFT's LoraConfig: r, lora_alpha, lora_dropout, use_rslora, rank_pattern, ..."),
  train: selection.default({}).describe("which layers, modules and experts are trained"),
  dataset: files.describe("files, folders or patterns of training data"),
  eval_dataset: files.optional().describe("the same for evaluation"),
  validation_fraction: z.number().gt(0).lt(1).optional().describe("this share of the training rows is for evaluation instead"),
  data: dataOptions.prefault({}).describe("how the data is read"),
});

export type Recipe = z.output<typeof recipe> & { readonly args: TrainingArguments };

/** Which part of the model is trained. */
export function tuningOf({ method, tuning }: Pick<Recipe, "method" | "tuning">): Tuning {
  return method === "classification" || method === "dpo" ? (tuning ?? "lora") : method;
}

/** Names that a configuration can have at its top level. */
const TOP = [...Object.keys(recipe.shape), ...ARGUMENT_NAMES];

/** Each field with its description, for help and documentation. */
export function recipeFields(): { readonly name: string; readonly description: string }[] {
  return Object.entries(recipe.shape).map(([name, field]) => ({ name, description: field.description ?? "" }));
}

/**
 * Checks a configuration: the fields above, and beside them all of `TrainingArguments`.
 * @throws RecipeError for a field that is unknown, with the nearest name, out of range, or in contradiction to another
 */
export function parseRecipe(raw: Readonly<Record<string, unknown>>, source = "config"): Recipe {
  const own = Object.fromEntries(Object.entries(raw).filter(([name]) => !(ARGUMENT_NAMES as readonly string[]).includes(name)));
  const args = Object.fromEntries(Object.entries(raw).filter(([name]) => (ARGUMENT_NAMES as readonly string[]).includes(name)));
  const read = recipe.safeParse(own);
  if (!read.success) throw new RecipeError(`${source}: ${read.error.issues.map(describe).join("; ")}`);
  const found = read.data;
  const fail = (what: string) => new RecipeError(`${source}: ${what}`);
  if (found.eval_dataset !== undefined && found.validation_fraction !== undefined)
    throw fail("eval_dataset and validation_fraction both say what to evaluate on; give one");
  const tuning = tuningOf(found);
  const named = tuning === found.method ? `method ${tuning}` : `tuning ${tuning}`;
  if (found.tuning !== undefined && tuning === found.method) throw fail(`tuning has no effect with method ${found.method}, which says it`);
  const ofDpo = (["beta", "label_smoothing"] as const).find((name) => found[name] !== undefined);
  if (ofDpo !== undefined && found.method !== "dpo") throw fail(`${ofDpo} has no effect with method ${found.method}`);
  const idle =
    tuning === "lora"
      ? (["modules", "freeze_layers", "freeze_modules"] as const)
          .filter((name) => found.train[name] !== undefined)
          .map((name) => `train.${name}`)
      : ["adapter", "target_modules", ...(Object.keys(found.lora).length > 0 ? ["lora"] : [])].filter((name) => own[name] !== undefined);
  if (idle.length > 0)
    throw fail(`${idle[0]} has no effect with ${named}${tuning === "lora" ? "; give target_modules and train.layers" : ""}`);
  if (Number(args.router_bias_update_rate ?? 0) > 0 && tuning === "lora")
    throw fail(
      "router_bias_update_rate has no effect with adapters, under which the model's own numbers stay as they are; give tuning or method full",
    );
  if (found.target_modules !== undefined && found.lora.target_modules !== undefined)
    throw fail("target_modules and lora.target_modules say the same thing; give one");
  if (found.adapter !== undefined && (found.target_modules !== undefined || Object.keys(found.lora).length > 0))
    throw fail("an adapter to go on from has its own configuration: leave out lora and target_modules");
  const twice = ["seed", "shuffle", "max_length"].find((name) => Object.hasOwn((own.data as object | undefined) ?? {}, name));
  if (twice !== undefined) throw fail(`data.${twice} is given as ${twice}, beside data`);
  try {
    const hasEvaluation = found.eval_dataset !== undefined || found.validation_fraction !== undefined;
    const filled = { report_to: ["jsonl", "tensorboard"], logging_steps: 10, ...args } as Partial<TrainingArguments>;
    return { ...found, args: trainingArguments(filled, hasEvaluation) };
  } catch (cause) {
    throw new RecipeError(`${source}: ${(cause as Error).message.replace(/^args:? /, "")}`, { cause });
  }
}

/** A configuration file, not yet checked: JSON for names ending in .json, else YAML. */
export async function readRecipe(file: string): Promise<Record<string, unknown>> {
  let value: unknown;
  try {
    const text = await readFile(file, "utf8");
    value = file.endsWith(".json") ? JSON.parse(text) : parseYaml(text);
  } catch (cause) {
    const at = cause instanceof YAMLParseError && cause.linePos ? `, line ${cause.linePos[0].line}` : "";
    const absent = (cause as NodeJS.ErrnoException).code === "ENOENT";
    throw new RecipeError(`${file}${at}: ${absent ? "there is no such file" : (cause as Error).message.split("\n")[0]}`, { cause });
  }
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new RecipeError(`${file}: must be an object of fields, like {dataset: rows.jsonl}`);
  return value as Record<string, unknown>;
}

/**
 * Puts `--name value` and `--name=value` over a configuration: `--learning_rate 1e-4`, `--lora.r 8`, `--train.layers 20-27`. Values are
 * YAML: numbers, true, lists like [a, b]; null takes a field out.
 * @param others options that are no fields, for suggestions
 * @throws RecipeError for an unknown name, with the nearest one, and for a flag without a value
 */
export function override(
  raw: Readonly<Record<string, unknown>>,
  flags: readonly string[],
  others: readonly string[] = [],
): Record<string, unknown> {
  const next = structuredClone(raw) as Record<string, unknown>;
  for (let i = 0; i < flags.length; i++) {
    const [, path, inline] = /^--([\w.-]+)(?:=(.*))?$/s.exec(flags[i]) ?? [];
    if (path === undefined) throw new RecipeError(`'${flags[i]}' is no option; fields of the configuration are given as --name value`);
    const names = path.replaceAll("-", "_").split(".");
    if (!TOP.includes(names[0]))
      throw new RecipeError(
        `there is no option --${path}${suggestion(names[0], [...TOP, ...others]) || "; 'mixtape train --help' lists the fields"}`,
      );
    const text = inline ?? flags[++i];
    if (text === undefined) throw new RecipeError(`--${path} needs a value`);
    let at = next;
    for (const name of names.slice(0, -1)) {
      const inner = at[name] ?? {};
      if (typeof inner !== "object" || Array.isArray(inner))
        throw new RecipeError(`--${path}: ${name} is ${JSON.stringify(inner)}, not an object`);
      at[name] = inner;
      at = inner as Record<string, unknown>;
    }
    const value = parsed(text, path);
    if (value === null) delete at[names.at(-1) as string];
    else at[names.at(-1) as string] = value;
  }
  return next;
}

function parsed(text: string, path: string): unknown {
  try {
    const value: unknown = parseYaml(text);
    return /^\d+-\d+$/.test(text) ? text : value;
  } catch (cause) {
    throw new RecipeError(`--${path}: '${text.slice(0, 60)}' is not a YAML value`, { cause });
  }
}

function describe(issue: z.core.$ZodIssue): string {
  const path = issue.path.map(String).join(".");
  if (issue.code !== "unrecognized_keys") return `${path}: ${issue.message}`;
  const known =
    issue.path.length === 0
      ? TOP
      : issue.path[0] === "data"
        ? Object.keys(dataOptions.shape)
        : issue.path[0] === "lora"
          ? Object.keys(ADAPTER_DEFAULTS)
          : Object.keys(selection.shape);
  return issue.keys
    .map((key) => `there is no field '${[...issue.path, key].join(".")}'${suggestion(key, known) || `; there are ${known.join(", ")}`}`)
    .join("; ");
}
