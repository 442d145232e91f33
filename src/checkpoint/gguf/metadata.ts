/**
 * Converts GGUF's key-values of an ERNIE-4.5 model to `config.json` and `generation_config.json`, and back. Where the file's
 * tensors are more reliable than its keys (expert width, vocabulary size), they are used instead. Reads no file.
 */
import { CheckpointError } from "../error.ts";
import type { GgufHead, GgufValue } from "./header.ts";

type Json = Readonly<Record<string, unknown>>;

const ARCHITECTURES: Readonly<Record<string, { readonly name: string; readonly type: string }>> = {
  ernie4_5: { name: "Ernie4_5ForCausalLM", type: "ernie4_5" },
  "ernie4_5-moe": { name: "Ernie4_5_MoeForCausalLM", type: "ernie4_5_moe" },
};
/** Token ids by their config name; the misspelling in the last key is GGUF's own. */
const IDS = {
  bos_token_id: "tokenizer.ggml.bos_token_id",
  pad_token_id: "tokenizer.ggml.padding_token_id",
  unk_token_id: "tokenizer.ggml.unknown_token_id",
  cls_token_id: "tokenizer.ggml.cls_token_id",
  mask_token_id: "tokenizer.ggml.mask_token_id",
  sep_token_id: "tokenizer.ggml.seperator_token_id",
} as const;
/** Tokens that end an answer: GGUF has one of each kind. */
const ENDS = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] as const;
const SAMPLING = {
  temperature: "general.sampling.temp",
  top_k: "general.sampling.top_k",
  top_p: "general.sampling.top_p",
  min_p: "general.sampling.min_p",
  repetition_penalty: "general.sampling.penalty_repeat",
} as const;

/** `config.json` of the model in a GGUF file. Throws CheckpointError for other architectures and for features that ERNIE-4.5 lacks. */
export function configOf(file: string, { values, tensors }: GgufHead): Record<string, unknown> {
  const named = values.get("general.architecture");
  const architecture = typeof named === "string" && Object.hasOwn(ARCHITECTURES, named) ? ARCHITECTURES[named] : undefined;
  if (!architecture) {
    const known = Object.keys(ARCHITECTURES).join(" and ");
    throw new CheckpointError(
      file,
      `general.architecture is ${named === undefined ? "missing" : JSON.stringify(named)}; ${known} are read`,
    );
  }
  if (Number(values.get("split.count") ?? 1) > 1)
    throw new CheckpointError(file, "one part of a model that is split into several files; join them with llama-gguf-split");
  const at = (key: string): GgufValue | undefined => values.get(`${named}.${key}`);
  const number = (key: string): number => {
    const value = at(key);
    if (typeof value !== "number")
      throw new CheckpointError(file, `${named}.${key} is ${value === undefined ? "missing" : "not a number"}`);
    return value;
  };
  const rows = (name: string, fallback = 0): number => tensors.get(name)?.shape.at(-2) ?? fallback;

  const heads = number("attention.head_count");
  const width = number("embedding_length");
  const headDim = at("attention.key_length") ?? at("rope.dimension_count") ?? width / heads;
  for (const key of ["attention.value_length", "rope.dimension_count"])
    if ((at(key) ?? headDim) !== headDim)
      throw new CheckpointError(file, `${named}.${key} is ${at(key)}, not the head width ${headDim}, which ERNIE-4.5 has throughout`);
  const scaling = at("rope.scaling.type");
  if (scaling !== undefined && scaling !== "none")
    throw new CheckpointError(file, `RoPE scaling ${JSON.stringify(scaling)} is not supported`);
  const gating = at("expert_gating_func") ?? 1;
  if (gating !== 1 && gating !== 0)
    throw new CheckpointError(file, `${named}.expert_gating_func is ${gating}; ERNIE-4.5 routes by softmax (1)`);

  const config: Record<string, unknown> = {
    architectures: [architecture.name],
    model_type: architecture.type,
    vocab_size: rows("token_embd.weight", Number(at("vocab_size") ?? 0)),
    hidden_size: width,
    intermediate_size: number("feed_forward_length"),
    num_hidden_layers: number("block_count"),
    num_attention_heads: heads,
    num_key_value_heads: at("attention.head_count_kv") ?? heads,
    head_dim: headDim,
    hidden_act: "silu",
    max_position_embeddings: number("context_length"),
    rms_norm_eps: real(number("attention.layer_norm_rms_epsilon")),
    rope_theta: real(Number(at("rope.freq_base") ?? 10000)),
    tie_word_embeddings: !tensors.has("output.weight"),
    use_bias: tensors.has("blk.0.attn_q.bias"),
  };
  for (const [name, key] of Object.entries(IDS)) if (values.has(key)) config[name] = values.get(key);
  config["eos_token_id"] = values.get(ENDS[0]) ?? 2;
  if (architecture.type !== "ernie4_5_moe") return config;

  const expertWidth = at("expert_feed_forward_length") ?? firstRows(tensors, "ffn_gate_exps.weight");
  const shared = firstRows(tensors, "ffn_gate_shexp.weight");
  if (typeof expertWidth !== "number" || expertWidth < 1 || shared % expertWidth !== 0)
    throw new CheckpointError(file, `shared experts are ${shared} wide, which is not a multiple of the ${expertWidth} of one expert`);
  return {
    ...config,
    moe_num_experts: number("expert_count"),
    moe_k: number("expert_used_count"),
    moe_intermediate_size: expertWidth,
    moe_num_shared_experts: shared / expertWidth,
    moe_layer_start_index: at("leading_dense_block_count") ?? 0,
    moe_layer_end_index: -1,
    moe_layer_interval: at("interleave_moe_layer_step") ?? 1,
  };
}

/** `generation_config.json` of the model in a GGUF file. */
export function generationOf({ values }: GgufHead): Record<string, unknown> {
  const ends = ENDS.flatMap((key) => values.get(key) ?? []);
  const generation: Record<string, unknown> = { eos_token_id: ends.length === 1 ? ends[0] : [...new Set(ends)] };
  if (ends.length === 0) generation["eos_token_id"] = 2;
  for (const name of ["bos_token_id", "pad_token_id"] as const) if (values.has(IDS[name])) generation[name] = values.get(IDS[name]);
  for (const [name, key] of Object.entries(SAMPLING)) {
    const value = values.get(key);
    if (typeof value === "number") generation[name] = real(value);
  }
  if ("temperature" in generation || "top_p" in generation) generation["do_sample"] = true;
  return generation;
}

/** The dimensions of a model that the keys describe. */
export interface ModelShape {
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly maxPositions: number;
  readonly normEps: number;
  readonly ropeTheta: number;
  readonly moe: {
    readonly experts: number;
    readonly chosen: number;
    readonly width: number;
    readonly sharedExperts: number;
    readonly startLayer: number;
    readonly interval: number;
  } | null;
}

/** A key, its type in the file, and its value. */
export type GgufEntry =
  | readonly [key: string, type: "u32" | "f32", value: number]
  | readonly [key: string, type: "string", value: string]
  | readonly [key: string, type: "bool", value: boolean]
  | readonly [key: string, type: "strings", value: readonly string[]]
  | readonly [key: string, type: "f32s" | "i32s", value: ArrayLike<number>];

/** The key-values of a model: its dimensions, end tokens and sampling defaults. */
export function metadataOf(model: ModelShape, config: Json, generation: Json): GgufEntry[] {
  const { moe } = model;
  const prefix = moe ? "ernie4_5-moe" : "ernie4_5";
  const entries: GgufEntry[] = [
    ["general.architecture", "string", prefix],
    [`${prefix}.block_count`, "u32", model.layers],
    [`${prefix}.context_length`, "u32", model.maxPositions],
    [`${prefix}.embedding_length`, "u32", model.hiddenSize],
    [`${prefix}.feed_forward_length`, "u32", model.intermediateSize],
    [`${prefix}.attention.head_count`, "u32", model.heads],
    [`${prefix}.attention.head_count_kv`, "u32", model.kvHeads],
    [`${prefix}.attention.key_length`, "u32", model.headDim],
    [`${prefix}.attention.value_length`, "u32", model.headDim],
    [`${prefix}.attention.layer_norm_rms_epsilon`, "f32", model.normEps],
    [`${prefix}.rope.freq_base`, "f32", model.ropeTheta],
    [`${prefix}.rope.dimension_count`, "u32", model.headDim],
    [`${prefix}.vocab_size`, "u32", model.vocabSize],
  ];
  if (moe) {
    entries.push(
      [`${prefix}.expert_count`, "u32", moe.experts],
      [`${prefix}.expert_used_count`, "u32", moe.chosen],
      [`${prefix}.expert_feed_forward_length`, "u32", moe.width],
      [`${prefix}.expert_shared_count`, "u32", moe.sharedExperts],
      [`${prefix}.expert_shared_feed_forward_length`, "u32", moe.sharedExperts * moe.width],
      [`${prefix}.leading_dense_block_count`, "u32", moe.startLayer],
      [`${prefix}.interleave_moe_layer_step`, "u32", moe.interval],
    );
  }
  const ends = [generation["eos_token_id"] ?? config["eos_token_id"] ?? 2].flat();
  ENDS.forEach((key, i) => {
    if (typeof ends[i] === "number") entries.push([key, "u32", ends[i]]);
  });
  for (const [name, key] of Object.entries(IDS)) {
    const id = config[name] ?? generation[name];
    if (typeof id === "number") entries.push([key, "u32", id]);
  }
  for (const [name, key] of Object.entries(SAMPLING)) {
    const value = generation[name];
    if (typeof value === "number") entries.push([key, name === "top_k" ? "u32" : "f32", value]);
  }
  return entries;
}

/** Rows of the first tensor of this kind in any layer; 0 if there is none. */
function firstRows(tensors: GgufHead["tensors"], tail: string): number {
  for (const { name, shape } of tensors.values()) if (name.startsWith("blk.") && name.endsWith(`.${tail}`)) return shape.at(-2) ?? 0;
  return 0;
}

/** The shortest decimal that rounds to the same float32: 1e-5 instead of 9.999999747378752e-6. */
function real(x: number): number {
  for (let digits = 1; digits < 10; digits++) {
    const short = Number(x.toPrecision(digits));
    if (Math.fround(short) === Math.fround(x)) return short;
  }
  return x;
}
