/** Shapes of published ERNIE-4.5 models, for measuring speed with random weights instead of a download. */

const SHARED = {
  hidden_act: "silu",
  max_position_embeddings: 131072,
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  tie_word_embeddings: true,
  use_bias: false,
  vocab_size: 103424,
  bos_token_id: 1,
  eos_token_id: 2,
  pad_token_id: 0,
  head_dim: 128,
};

/** The published `config.json` of each. */
export const PRESETS: Readonly<Record<string, Readonly<Record<string, unknown>>>> = {
  "21b-a3b": {
    ...SHARED,
    architectures: ["Ernie4_5_MoeForCausalLM"],
    model_type: "ernie4_5_moe",
    hidden_size: 2560,
    intermediate_size: 12288,
    num_hidden_layers: 28,
    num_attention_heads: 20,
    num_key_value_heads: 4,
    moe_intermediate_size: 1536,
    moe_k: 6,
    moe_num_experts: 64,
    moe_num_shared_experts: 2,
    moe_layer_start_index: 1,
    moe_layer_end_index: 27,
    moe_layer_interval: 1,
    moe_norm_min: 1e-12,
  },
  "0.3b": {
    ...SHARED,
    architectures: ["Ernie4_5ForCausalLM"],
    model_type: "ernie4_5",
    hidden_size: 1024,
    intermediate_size: 3072,
    num_hidden_layers: 18,
    num_attention_heads: 16,
    num_key_value_heads: 2,
  },
};
