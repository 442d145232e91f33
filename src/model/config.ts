/** An ERNIE-4.5 model's `config.json`, validated and with transformers' defaults filled in. Knows no weights. */

export interface ErnieConfig {
  readonly architecture: "Ernie4_5_MoeForCausalLM" | "Ernie4_5ForCausalLM";
  readonly vocabSize: number;
  readonly hiddenSize: number;
  /** Width of the MLP in dense layers. */
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly maxPositions: number;
  readonly normEps: number;
  readonly ropeTheta: number;
  readonly tied: boolean;
  readonly useBias: boolean;
  /** Null for a dense model. */
  readonly moe: MoeConfig | null;
  /** Null for a model that predicts tokens; a classifier has a head `score` in place of the one over the vocabulary. */
  readonly classifier: ClassifierConfig | null;
  /** Ids that end a text; generation_config.json may override them. */
  readonly eosTokenIds: readonly number[];
  readonly bosTokenId: number | null;
  readonly padTokenId: number | null;
}

/** What the labels of a classifier's examples are: one class, any number of classes, or numbers. */
export const PROBLEMS = ["single_label_classification", "multi_label_classification", "regression"] as const;
export type Problem = (typeof PROBLEMS)[number];

export interface ClassifierConfig {
  /** Names of the classes, in the order of the head's rows. */
  readonly labels: readonly string[];
  /** Null: not said, so by the number of classes, as in transformers. */
  readonly problem: Problem | null;
  /** Whether the head has a bias; transformers' has none. Not in config.json: it follows from the tensors. */
  readonly bias: boolean;
}

export interface MoeConfig {
  readonly experts: number;
  /** Experts chosen for each token. */
  readonly chosen: number;
  /** Width of one expert. */
  readonly width: number;
  readonly sharedExperts: number;
  readonly normMin: number;
  readonly startLayer: number;
  /** Inclusive. */
  readonly endLayer: number;
  readonly interval: number;
}

/** Thrown when `config.json` describes a model that cannot be run; the message names the field and the reason. */
export class ConfigError extends Error {
  override name = "ConfigError";
}

const ARCHITECTURES = ["Ernie4_5_MoeForCausalLM", "Ernie4_5ForCausalLM"] as const;
/** Names that the hub's checkpoints had before transformers took the models in. */
const EARLIER: Readonly<Record<string, ErnieConfig["architecture"]>> = {
  Ernie4_5_ForCausalLM: "Ernie4_5ForCausalLM",
  Ernie4_5_MoEForCausalLM: "Ernie4_5_MoeForCausalLM",
  Ernie4_5MoeForCausalLM: "Ernie4_5_MoeForCausalLM",
};
/** Ends the names of classifiers' architectures; what comes before is as in those that predict tokens. */
const CLASSIFIER = /ForSequenceClassification$/;
const BY_MODEL_TYPE: Record<string, ErnieConfig["architecture"]> = {
  ernie4_5_moe: "Ernie4_5_MoeForCausalLM",
  ernie4_5: "Ernie4_5ForCausalLM",
};

/**
 * The largest value of each size: several times what the largest published models have, and what the kernels are built for.
 * Everything that is allocated or repeated by a config's numbers is bounded by these.
 */
const MOST = {
  vocab_size: 2 ** 22,
  hidden_size: 2 ** 17,
  intermediate_size: 2 ** 20,
  num_hidden_layers: 4096,
  num_attention_heads: 4096,
  num_key_value_heads: 4096,
  /** Positions are turned into angles in float32, which counts exactly up to here. */
  max_position_embeddings: 2 ** 24,
  moe_num_experts: 4096,
  moe_k: 4096,
  moe_intermediate_size: 2 ** 20,
  moe_num_shared_experts: 4096,
  moe_layer_start_index: 4096,
  moe_layer_end_index: 4096,
  moe_layer_interval: 4096,
} as const;
const MOST_HEAD_DIM = 512;
/** The most numbers in one matrix. */
const MOST_NUMBERS = 2 ** 32;
/** The largest value of a fraction, which is added to or divides numbers around 1. */
const MOST_REAL = 1;
const MOST_IDS = 1024;
export const MOST_LABELS = 65_536;
const LONGEST_LABEL = 1000;

/** Throws a ConfigError on an unknown architecture (and lists the supported ones), a missing or invalid value, or an unsupported feature. */
export function readConfig(raw: Record<string, unknown>): ErnieConfig {
  const architecture = readArchitecture(raw);
  const whole = (name: string, fallback?: number, least = 1): number => {
    const v = raw[name] ?? fallback;
    if (typeof v !== "number" || !Number.isInteger(v) || v < least)
      throw new ConfigError(`config.json: ${name} is ${show(raw[name])}, not a whole number of at least ${least}`);
    const most = Object.hasOwn(MOST, name) ? MOST[name as keyof typeof MOST] : 2 ** 31 - 1;
    if (v > most) throw new ConfigError(`config.json: ${name} is ${v}; at most ${most} is supported`);
    return v;
  };
  const real = (name: string, fallback: number): number => {
    const v = raw[name] ?? fallback;
    if (typeof v !== "number" || !(v >= 0 && v <= MOST_REAL))
      throw new ConfigError(`config.json: ${name} is ${show(raw[name])}, not a number from 0 to ${MOST_REAL}`);
    return v;
  };
  const flag = (name: string, fallback: boolean): boolean => {
    const v = raw[name] ?? fallback;
    if (typeof v !== "boolean") throw new ConfigError(`config.json: ${name} is ${show(v)}, not true or false`);
    return v;
  };

  const act = raw["hidden_act"] ?? "silu";
  if (act !== "silu")
    throw new ConfigError(`config.json: hidden_act is ${show(act)}; ERNIE-4.5 uses "silu", and nothing else is supported`);
  const hiddenSize = whole("hidden_size");
  const heads = whole("num_attention_heads");
  // A missing key means transformers' default for the architecture; null means "as many as query heads" or "hidden / heads".
  const dense = architecture === "Ernie4_5ForCausalLM";
  const kvHeads = raw["num_key_value_heads"] === undefined ? (dense ? 2 : 4) : whole("num_key_value_heads", heads);
  if (heads % kvHeads)
    throw new ConfigError(`config.json: num_attention_heads (${heads}) is not a multiple of num_key_value_heads (${kvHeads})`);
  const derived = raw["head_dim"] === null || (raw["head_dim"] === undefined && !dense);
  if (derived && hiddenSize % heads)
    throw new ConfigError(
      `config.json: hidden_size (${hiddenSize}) is not a multiple of num_attention_heads (${heads}) and head_dim is not given`,
    );
  const headDim = whole("head_dim", derived ? hiddenSize / heads : 128);
  if (headDim % 2 || headDim > MOST_HEAD_DIM)
    throw new ConfigError(`config.json: a head width of ${headDim} is not supported; it must be even and at most ${MOST_HEAD_DIM}`);
  const layers = whole("num_hidden_layers");
  const vocabSize = whole("vocab_size");
  const intermediateSize = whole("intermediate_size");
  const moe = architecture === "Ernie4_5_MoeForCausalLM" ? readMoe(whole, real, layers) : null;
  const rows = Math.max(vocabSize, intermediateSize, heads * headDim, moe ? moe.width * Math.max(1, moe.sharedExperts) : 0);
  if (rows * hiddenSize > MOST_NUMBERS)
    throw new ConfigError(
      `config.json: a matrix of ${rows} by ${hiddenSize} (hidden_size) has more than ${MOST_NUMBERS} numbers, the most supported`,
    );

  return {
    architecture,
    vocabSize,
    hiddenSize,
    intermediateSize,
    layers,
    heads,
    kvHeads,
    headDim,
    maxPositions: whole("max_position_embeddings", 131072),
    normEps: real("rms_norm_eps", 1e-5),
    ropeTheta: readRope(raw),
    tied: flag("tie_word_embeddings", true),
    useBias: flag("use_bias", false),
    moe,
    classifier: namedArchitectures(raw).some((name) => CLASSIFIER.test(name)) ? readClassifier(raw) : null,
    eosTokenIds: readIds(raw["eos_token_id"] ?? 2, "eos_token_id"),
    bosTokenId: raw["bos_token_id"] == null ? null : whole("bos_token_id", undefined, 0),
    padTokenId: raw["pad_token_id"] == null ? null : whole("pad_token_id", undefined, 0),
  };
}

/** Whether layer `i` (counted from 0) is a mixture of experts. */
export function isMoeLayer(config: ErnieConfig, i: number): boolean {
  const { moe } = config;
  return moe !== null && (i + 1) % moe.interval === 0 && i >= moe.startLayer && i <= moe.endLayer;
}

/** Indices of the mixture-of-experts layers. */
export function moeLayers(config: ErnieConfig): number[] {
  return Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i));
}

/** Reads a token id or a list of them, such as `eos_token_id`. */
export function readIds(value: unknown, name: string): number[] {
  const ids = (Array.isArray(value) ? value : [value]).map((id) => (typeof id === "bigint" ? Number(id) : id));
  if (ids.length > MOST_IDS) throw new ConfigError(`${name} is a list of ${ids.length} ids; at most ${MOST_IDS} are supported`);
  if (!ids.every((id) => Number.isInteger(id) && id >= 0 && id < 2 ** 31))
    throw new ConfigError(`${name} is ${show(value)}, not a token id or a list of them`);
  return ids;
}

/**
 * What a config says about classes: `id2label`, without it `num_labels`, without both transformers' two; and `problem_type`. Throws
 * ConfigError. @param source names them in errors
 */
export function readClassifier(raw: Readonly<Record<string, unknown>>, source = "config.json: "): ClassifierConfig {
  const { id2label, num_labels: count, problem_type: problem } = raw;
  if (problem != null && !PROBLEMS.some((each) => each === problem))
    throw new ConfigError(`${source}problem_type is ${show(problem)}; it must be ${PROBLEMS.join(", ")}`);
  return { labels: readLabels(source, id2label, count), problem: (problem as Problem | undefined) ?? null, bias: false };
}

function readLabels(source: string, id2label: unknown, count: unknown = 2): string[] {
  if (id2label == null) {
    if (!Number.isInteger(count) || Number(count) < 1 || Number(count) > MOST_LABELS)
      throw new ConfigError(`${source}num_labels is ${show(count)}, not a whole number from 1 to ${MOST_LABELS}`);
    return Array.from({ length: Number(count) }, (_, i) => `LABEL_${i}`);
  }
  const entries = typeof id2label === "object" ? Object.entries(id2label) : [];
  if (entries.length === 0 || entries.length > MOST_LABELS)
    throw new ConfigError(`${source}id2label is ${show(id2label)}, not an object of 1 to ${MOST_LABELS} names by number`);
  return Array.from({ length: entries.length }, (_, i) => {
    const label = (id2label as Record<string, unknown>)[i];
    if (typeof label !== "string" || label.length > LONGEST_LABEL)
      throw new ConfigError(
        `${source}id2label has ${entries.length} entries, and that of ${i} is ${show(label)}; there must be a name for each number from 0 on`,
      );
    return label;
  });
}

function namedArchitectures(raw: Record<string, unknown>): string[] {
  if (!Array.isArray(raw["architectures"])) return [];
  return raw["architectures"].slice(0, 10).map((a) => (typeof a === "string" ? a : show(a)));
}

function readArchitecture(raw: Record<string, unknown>): ErnieConfig["architecture"] {
  const own = namedArchitectures(raw);
  const named = own.map((name) => name.replace(CLASSIFIER, "ForCausalLM"));
  const known = ARCHITECTURES.find((a) => named.includes(a)) ?? named.flatMap((a) => (Object.hasOwn(EARLIER, a) ? EARLIER[a] : []))[0];
  if (known) return known;
  const type = raw["model_type"];
  const byType = typeof type === "string" && Object.hasOwn(BY_MODEL_TYPE, type) ? BY_MODEL_TYPE[type] : undefined;
  if (byType && named.length === 0) return byType;
  const seen = own.length ? shortened(own.join(", ")) : show(type);
  throw new ConfigError(
    `config.json: the architecture ${seen} is not supported; supported are ${ARCHITECTURES.join(", ")}, and classifiers of both (ForSequenceClassification)`,
  );
}

function readRope(raw: Record<string, unknown>): number {
  const rope = (raw["rope_parameters"] ?? raw["rope_scaling"] ?? {}) as Record<string, unknown>;
  if (typeof rope !== "object" || Array.isArray(rope))
    throw new ConfigError(`config.json: rope_parameters is ${show(rope)}, not an object`);
  const type = rope["rope_type"] ?? rope["type"] ?? "default";
  if (type !== "default") throw new ConfigError(`config.json: the RoPE type ${show(type)} is not supported; ERNIE-4.5 uses "default"`);
  if ((rope["partial_rotary_factor"] ?? raw["partial_rotary_factor"] ?? 1) !== 1)
    throw new ConfigError("config.json: a partial_rotary_factor other than 1 is not supported");
  const theta = rope["rope_theta"] ?? raw["rope_theta"] ?? 500000;
  if (typeof theta !== "number" || !(theta >= 1 && theta <= 1e12))
    throw new ConfigError(`config.json: rope_theta is ${show(theta)}, not a number from 1 to 1e12`);
  return theta;
}

type ReadNumber = (name: string, fallback: number, least?: number) => number;

function readMoe(whole: ReadNumber, real: ReadNumber, layers: number): MoeConfig {
  const experts = whole("moe_num_experts", 64);
  const chosen = whole("moe_k", 6);
  if (chosen > experts) throw new ConfigError(`config.json: moe_k (${chosen}) is more than moe_num_experts (${experts})`);
  const endLayer = whole("moe_layer_end_index", -1, -1);
  return {
    experts,
    chosen,
    width: whole("moe_intermediate_size", 1536),
    sharedExperts: whole("moe_num_shared_experts", 2, 0),
    normMin: real("moe_norm_min", 1e-12),
    startLayer: whole("moe_layer_start_index", 1, 0),
    endLayer: endLayer === -1 ? layers - 1 : endLayer,
    interval: whole("moe_layer_interval", 1),
  };
}

export function show(value: unknown): string {
  return value === undefined ? "missing" : shortened(value === Number.POSITIVE_INFINITY ? "infinite" : JSON.stringify(value));
}

function shortened(text: string): string {
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}
