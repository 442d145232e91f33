/**
 * The configuration of low-rank adapters as PEFT writes it (`adapter_config.json`): its fields, which modules it selects, and each
 * one's rank and scale. Reads no tensors and knows no model.
 */
import { CheckpointError } from "./error.ts";

/** The fields of PEFT's `LoraConfig` that change what is computed, with PEFT's names. */
export interface AdapterConfig {
  /** Rank of the adapters. Default 8. */
  readonly r: number;
  /** The branch is scaled by lora_alpha / r. Default 8. */
  readonly lora_alpha: number;
  /** Probability of dropping an input to the branch in training. Default 0. */
  readonly lora_dropout: number;
  /**
   * Names of modules, matched whole or as the last parts of a name; or a regular expression for whole names; or `all-linear`: every
   * matrix but the embedding and the head, routed experts included; these two can be named, embed_tokens and lm_head. Null: none but
   * `target_parameters`.
   */
  readonly target_modules: readonly string[] | string | null;
  /** As `target_modules`; modules left out. */
  readonly exclude_modules: readonly string[] | string | null;
  /** Parameters that are no module of their own in transformers 5: `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`. */
  readonly target_parameters: readonly string[];
  /** Only these layers, if `target_modules` is a list. Null: all. */
  readonly layers_to_transform: readonly number[] | null;
  /** The names before a layer's number, as regular expressions. Null: any. */
  readonly layers_pattern: readonly string[] | null;
  /** Ranks and alphas of modules that differ: a name, its last parts or a regular expression for them, and the number. */
  readonly rank_pattern: Readonly<Record<string, number>>;
  readonly alpha_pattern: Readonly<Record<string, number>>;
  /** Scale by lora_alpha / sqrt(r) (https://arxiv.org/abs/2312.03732). Default false. */
  readonly use_rslora: boolean;
  /** Train direction and magnitude apart (https://arxiv.org/abs/2402.09353). Default false. */
  readonly use_dora: boolean;
  /** Modules trained and saved whole, such as a classifier's `score`. */
  readonly modules_to_save: readonly string[];
  /** `CAUSAL_LM`, `SEQ_CLS`; for other libraries. */
  readonly task_type: string | null;
  readonly base_model_name_or_path: string | null;
  /** How new adapters begin: true: A uniform, B zero; `gaussian`: A normal; false: both as true, B not zero. */
  readonly init_lora_weights: boolean | string;
}

/** What a module's adapter is; the branch is scale * B(A(x)). */
export interface LowRank {
  readonly rank: number;
  readonly scale: number;
  /** Probability of dropping an input to the branch in training. */
  readonly dropout: number;
  /** Whether the adapted matrix's rows have learnt lengths (DoRA). Default false. */
  readonly decomposed?: boolean;
}

export const ADAPTER_DEFAULTS: AdapterConfig = {
  r: 8,
  lora_alpha: 8,
  lora_dropout: 0,
  target_modules: null,
  exclude_modules: null,
  target_parameters: [],
  layers_to_transform: null,
  layers_pattern: null,
  rank_pattern: {},
  alpha_pattern: {},
  use_rslora: false,
  use_dora: false,
  modules_to_save: [],
  task_type: null,
  base_model_name_or_path: null,
  init_lora_weights: true,
};

/** Fields of PEFT that are allowed with any value: they change nothing once an adapter exists. */
const WITHOUT_EFFECT = new Set([
  "peft_type",
  "peft_version",
  "auto_mapping",
  "inference_mode",
  "revision",
  "megatron_config",
  "megatron_core",
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
  "qalora_group_size",
  "runtime_config",
  "ensure_weight_tying",
]);
/** Beginnings that leave the base model's weights as they are. */
const BEGINNINGS = new Set<unknown>([true, false, "gaussian", "eva", "orthogonal", null]);

/**
 * Reads the fields of an adapter_config.json or of a caller's options; those that are absent have PEFT's defaults.
 * @param source what is named in errors: the file, or `LoraConfig`
 * @throws CheckpointError for a value out of range, and for a field that is set and not supported, by name
 */
export function parseAdapterConfig(value: unknown, source: string): AdapterConfig {
  const fail = (what: string) => new CheckpointError(source, what);
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw fail("is not a JSON object of PEFT's LoraConfig");
  const given = value as Record<string, unknown>;
  if (given.peft_type !== undefined && given.peft_type !== "LORA")
    throw fail(`peft_type is ${show(given.peft_type)}; only LORA is supported`);
  for (const [name, set] of Object.entries(given)) {
    if (Object.hasOwn(ADAPTER_DEFAULTS, name) || WITHOUT_EFFECT.has(name) || isEmpty(set)) continue;
    if (name === "bias" && set === "none") continue;
    throw fail(`${name} is ${show(set)}, which is not supported; supported are ${Object.keys(ADAPTER_DEFAULTS).join(", ")}`);
  }
  const field = <T>(name: keyof AdapterConfig, read: (raw: unknown) => T | undefined, expected: string): T => {
    const raw = given[name] ?? ADAPTER_DEFAULTS[name];
    const found = read(raw);
    if (found === undefined) throw fail(`${name} is ${show(raw)}; expected ${expected}`);
    return found;
  };
  const flag = (name: keyof AdapterConfig) => field(name, (raw) => (typeof raw === "boolean" ? raw : undefined), "true or false");
  const text = (name: keyof AdapterConfig) =>
    field(name, (raw) => (raw === null || typeof raw === "string" ? raw : undefined), "a string or null");
  const names = (name: keyof AdapterConfig) =>
    field(name, (raw) => (raw === null ? null : typeof raw === "string" ? raw : strings(raw)), "a list of names, a string, or null");
  const list = (name: keyof AdapterConfig) =>
    field(name, (raw) => (raw === null ? [] : typeof raw === "string" ? [raw] : strings(raw)), "a list of names");
  const pattern = (name: "rank_pattern" | "alpha_pattern", fits: (n: unknown) => boolean, expected: string) =>
    field(name, (raw) => numbers(raw, fits), `an object with ${expected} for each name`);
  const config: AdapterConfig = {
    r: field("r", (raw) => (isCount(raw) ? raw : undefined), "a whole number of at least 1"),
    lora_alpha: field("lora_alpha", (raw) => (isFactor(raw) ? raw : undefined), "a number"),
    lora_dropout: field("lora_dropout", (raw) => (isFactor(raw) && raw >= 0 && raw < 1 ? raw : undefined), "a number from 0 up to 1"),
    target_modules: names("target_modules"),
    exclude_modules: names("exclude_modules"),
    target_parameters: list("target_parameters"),
    layers_to_transform: field(
      "layers_to_transform",
      (raw) => (raw === null ? null : typeof raw === "number" ? [raw] : wholes(raw)),
      "a layer's number, a list of them, or null",
    ),
    layers_pattern: field(
      "layers_pattern",
      (raw) => (raw === null ? null : typeof raw === "string" ? [raw] : strings(raw)),
      "a name, a list of names, or null",
    ),
    rank_pattern: pattern("rank_pattern", isCount, "a whole number of at least 1"),
    alpha_pattern: pattern("alpha_pattern", isFactor, "a number"),
    use_rslora: flag("use_rslora"),
    use_dora: flag("use_dora"),
    modules_to_save: list("modules_to_save"),
    task_type: text("task_type"),
    base_model_name_or_path: text("base_model_name_or_path"),
    init_lora_weights: field(
      "init_lora_weights",
      (raw) => (BEGINNINGS.has(raw) ? ((raw as boolean | string | null) ?? true) : undefined),
      "true, false or 'gaussian': other beginnings change the base model's weights too",
    ),
  };
  for (const each of [
    config.target_modules,
    config.exclude_modules,
    ...Object.keys(config.rank_pattern),
    ...Object.keys(config.alpha_pattern),
  ])
    if (typeof each === "string") expression(each, fail);
  for (const each of config.layers_pattern ?? []) expression(each, fail);
  if (config.layers_to_transform && !Array.isArray(config.target_modules))
    throw fail("layers_to_transform needs target_modules to be a list of names; with a regular expression, name the layers in it");
  if (config.use_dora && config.target_parameters.length > 0)
    throw fail("use_dora does not work with target_parameters, as in PEFT; name modules: mlp.experts.gate_proj");
  if (given.ensure_weight_tying === true && TIED.some((name) => selects(config, name) || namesModule(config.modules_to_save, name)))
    throw fail(
      "ensure_weight_tying is true, which is not supported with embed_tokens or lm_head; leave it out: each has an adapter of its own",
    );
  if (config.layers_pattern && !config.layers_to_transform) throw fail("layers_pattern has no effect without layers_to_transform");
  return config;
}

/**
 * The adapter that a configuration gives to a module, by PEFT's rules; null: none.
 * @param module as in the hub's checkpoints, without `.weight`: `model.layers.3.mlp.experts.5.gate_proj`
 */
export function adapterAt(config: AdapterConfig, module: string): LowRank | null {
  if (!selects(config, module)) return null;
  return lowRankAt(config, module);
}

/** Rank, scale and dropout of a module's adapter, whether or not the configuration selects the module. */
export function lowRankAt(config: AdapterConfig, module: string): LowRank {
  // PEFT matches patterns against the names that it adapts, which for fused experts are those of parameters.
  const name = parameterOf(config, module) ?? module;
  const rank = patternAt(config.rank_pattern, name) ?? config.r;
  const alpha = patternAt(config.alpha_pattern, name) ?? config.lora_alpha;
  return {
    rank,
    scale: alpha / (config.use_rslora ? Math.sqrt(rank) : rank),
    dropout: config.lora_dropout,
    ...(config.use_dora ? { decomposed: true } : {}),
  };
}

/** Whether names or a regular expression select a module, as in `target_modules`. */
export function namesModule(names: readonly string[] | string, module: string): boolean {
  if (typeof names === "string") return new RegExp(`^(?:${names})$`).test(module);
  return names.some((name) => module === name || module.endsWith(`.${name}`));
}

/** Modules that may share a matrix. */
const TIED = ["model.embed_tokens", "lm_head"];
const ALL_LINEAR = "all-linear";
const NO_LINEAR = /(^|\.)(lm_head|embed_tokens|score|mlp\.gate)$/;
const FUSED = /^(.*\.experts)\.\d+\.(gate|up|down)_proj$/;

function selects(config: AdapterConfig, module: string): boolean {
  const { target_modules: names, exclude_modules: excluded, layers_to_transform: layers } = config;
  if (excluded !== null && excluded.length > 0 && namesModule(excluded, module)) return false;
  if (config.modules_to_save.some((name) => new RegExp(`(^|^.*\\.)${name}($|\\..*)`).test(module))) return false;
  if (parameterOf(config, module) !== null) return true;
  if (names === null) return false;
  if (names === ALL_LINEAR) return !NO_LINEAR.test(module);
  if (!namesModule(names, module)) return false;
  if (typeof names === "string" || layers === null || layers.length === 0 || names.includes(module)) return true;
  const patterns = config.layers_pattern ?? ["[^.]*"];
  for (const pattern of patterns) {
    const layer = new RegExp(`^(?:.*?\\.)?${pattern}\\.(\\d+)\\.`).exec(module)?.[1];
    if (layer !== undefined) return layers.includes(Number(layer));
  }
  return false;
}

/** The fused parameter of `target_parameters` that a routed expert's matrix is a part of; null: none. */
function parameterOf({ target_parameters: targets }: AdapterConfig, module: string): string | null {
  const [, prefix, which] = FUSED.exec(module) ?? [];
  const parameter = prefix === undefined ? `${module}.weight` : `${prefix}.${which === "down" ? "down_proj" : "gate_up_proj"}`;
  return targets.some((t) => parameter === t || parameter.endsWith(`.${t}`)) ? parameter : null;
}

function patternAt(pattern: Readonly<Record<string, number>>, name: string): number | undefined {
  for (const [key, value] of Object.entries(pattern)) if (new RegExp(`^(.*\\.)?(${key})$`).test(name)) return value;
  return undefined;
}

function expression(text: string, fail: (what: string) => Error): void {
  if (text.length > 10_000) throw fail(`a regular expression of ${text.length} characters; at most 10000 are read`);
  try {
    new RegExp(text);
  } catch {
    throw fail(`'${text.slice(0, 100)}' is not a regular expression`);
  }
}

const isCount = (n: unknown): n is number => Number.isSafeInteger(n) && (n as number) >= 1;
const isFactor = (n: unknown): n is number => typeof n === "number" && Number.isFinite(n);
const strings = (value: unknown): string[] | undefined =>
  Array.isArray(value) && value.every((each) => typeof each === "string") ? value : undefined;
const wholes = (value: unknown): number[] | undefined =>
  Array.isArray(value) && value.every((each) => Number.isSafeInteger(each) && each >= 0) ? value : undefined;

function numbers(value: unknown, fits: (n: unknown) => boolean): Record<string, number> | undefined {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return undefined;
  return Object.values(value).every(fits) ? (value as Record<string, number>) : undefined;
}

/** Whether a field that PEFT writes is not in use. */
function isEmpty(value: unknown): boolean {
  return value === null || value === undefined || value === false || (typeof value === "object" && Object.keys(value).length === 0);
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "undefined";
  return text.length > 100 ? `${text.slice(0, 100)}...` : text;
}
