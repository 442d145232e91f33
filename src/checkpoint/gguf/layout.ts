/**
 * Names of ERNIE-4.5's tensors in GGUF files and in the hub's checkpoints. Experts are one tensor [E, …] in GGUF and one each on
 * the hub. Nothing is permuted: for this architecture llama.cpp rotates adjacent pairs, as the model does. Knows no file.
 */

/** The hub's name of a GGUF tensor. */
export interface HubName {
  /** For stacked experts with `{e}` in place of the expert's number. */
  readonly name: string;
  readonly stacked: boolean;
}

const LAYER: Readonly<Record<string, string>> = {
  attn_norm: "input_layernorm",
  ffn_norm: "post_attention_layernorm",
  attn_q: "self_attn.q_proj",
  attn_k: "self_attn.k_proj",
  attn_v: "self_attn.v_proj",
  attn_output: "self_attn.o_proj",
  ffn_gate: "mlp.gate_proj",
  ffn_up: "mlp.up_proj",
  ffn_down: "mlp.down_proj",
  ffn_gate_inp: "mlp.gate",
  ffn_gate_shexp: "mlp.shared_experts.gate_proj",
  ffn_up_shexp: "mlp.shared_experts.up_proj",
  ffn_down_shexp: "mlp.shared_experts.down_proj",
  ffn_gate_exps: "mlp.experts.{e}.gate_proj",
  ffn_up_exps: "mlp.experts.{e}.up_proj",
  ffn_down_exps: "mlp.experts.{e}.down_proj",
};
const TOP: Readonly<Record<string, string>> = { token_embd: "model.embed_tokens", output_norm: "model.norm", output: "lm_head" };
const BIAS = { gguf: "exp_probs_b.bias", hub: "mlp.moe_statics.e_score_correction_bias" };

const LAYER_BACK = new Map(Object.entries(LAYER).map(([gguf, hub]) => [hub.replace(".{e}", ""), gguf]));
const TOP_BACK = new Map(Object.entries(TOP).map(([gguf, hub]) => [hub, gguf]));

/** The hub's name of a GGUF tensor; undefined if the model has no such tensor. */
export function hubName(gguf: string): HubName | undefined {
  const [, layer, tail = ""] = /^blk\.(\d+)\.(.+)$/.exec(gguf) ?? [];
  const [, stem = "", kind] = /^(\w+)\.(weight|bias)$/.exec(layer === undefined ? gguf : tail) ?? [];
  if (layer === undefined) return Object.hasOwn(TOP, stem) ? { name: `${TOP[stem]}.${kind}`, stacked: false } : undefined;
  if (tail === BIAS.gguf) return { name: `model.layers.${layer}.${BIAS.hub}`, stacked: false };
  if (!Object.hasOwn(LAYER, stem)) return undefined;
  return { name: `model.layers.${layer}.${LAYER[stem]}.${kind}`, stacked: LAYER[stem].includes("{e}") };
}

/** GGUF's name of a parameter (for stacked experts without their number); undefined if GGUF has none. */
export function ggufName(hub: string): string | undefined {
  const [, stem = "", kind] = /^(.+)\.(weight|bias)$/.exec(hub) ?? [];
  const top = TOP_BACK.get(stem);
  if (top !== undefined) return `${top}.${kind}`;
  const [, layer, tail] = /^model\.layers\.(\d+)\.(.+)$/.exec(hub) ?? [];
  if (layer === undefined || tail === undefined) return undefined;
  if (tail === BIAS.hub) return `blk.${layer}.${BIAS.gguf}`;
  const own = LAYER_BACK.get(tail.slice(0, tail.lastIndexOf(".")));
  return own === undefined ? undefined : `blk.${layer}.${own}.${kind}`;
}
