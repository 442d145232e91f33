/** Every field of config.json: what is read, what stands in for what is not there, what is refused. */
import { describe, expect, test } from "vitest";
import { ConfigError, isMoeLayer, readConfig, readIds } from "../../src/model/config.ts";
import { parameters } from "../../src/model/ernie.ts";

const DENSE = {
  architectures: ["Ernie4_5ForCausalLM"],
  vocab_size: 100,
  hidden_size: 48,
  intermediate_size: 96,
  num_hidden_layers: 3,
  num_attention_heads: 4,
};
const MOE = {
  ...DENSE,
  architectures: ["Ernie4_5_MoeForCausalLM"],
  num_hidden_layers: 6,
  moe_num_experts: 8,
  moe_k: 2,
  moe_intermediate_size: 24,
};

describe("what is read", () => {
  test("a dense model, with defaults", () => {
    expect(readConfig(DENSE)).toEqual({
      architecture: "Ernie4_5ForCausalLM",
      vocabSize: 100,
      hiddenSize: 48,
      intermediateSize: 96,
      layers: 3,
      heads: 4,
      kvHeads: 2,
      headDim: 128,
      maxPositions: 131072,
      normEps: 1e-5,
      ropeTheta: 500000,
      tied: true,
      useBias: false,
      moe: null,
      classifier: null,
      eosTokenIds: [2],
      bosTokenId: null,
      padTokenId: null,
    });
  });

  test("a mixture, with defaults", () => {
    const { moe } = readConfig({ ...DENSE, architectures: ["Ernie4_5_MoeForCausalLM"] });
    expect(moe).toEqual({ experts: 64, chosen: 6, width: 1536, sharedExperts: 2, normMin: 1e-12, startLayer: 1, endLayer: 2, interval: 1 });
  });

  test("everything said", () => {
    const said = readConfig({
      ...MOE,
      num_key_value_heads: 2,
      head_dim: 20,
      max_position_embeddings: 777,
      rms_norm_eps: 1e-6,
      rope_theta: 10000,
      tie_word_embeddings: false,
      use_bias: true,
      moe_num_shared_experts: 0,
      moe_norm_min: 0.45,
      moe_layer_start_index: 2,
      moe_layer_end_index: 4,
      moe_layer_interval: 2,
      eos_token_id: [2, 5],
      bos_token_id: 1,
      pad_token_id: 0,
    });
    expect(said).toMatchObject({
      kvHeads: 2,
      headDim: 20,
      maxPositions: 777,
      normEps: 1e-6,
      ropeTheta: 10000,
      tied: false,
      useBias: true,
      eosTokenIds: [2, 5],
      bosTokenId: 1,
      padTokenId: 0,
    });
    expect(said.moe).toEqual({
      experts: 8,
      chosen: 2,
      width: 24,
      sharedExperts: 0,
      normMin: 0.45,
      startLayer: 2,
      endLayer: 4,
      interval: 2,
    });
  });

  test("null is as if it were not there", () => {
    const nulls = { rope_parameters: null, rope_scaling: null, eos_token_id: null, use_bias: null };
    expect(readConfig({ ...DENSE, ...nulls })).toEqual(readConfig(DENSE));
  });

  // As in transformers' config classes: the dense one has 2 key heads of width 128, the mixture 4 of hidden / heads.
  test.each([
    [DENSE, {}, 2, 128],
    [DENSE, { num_key_value_heads: null, head_dim: null }, 4, 12],
    [MOE, {}, 4, 12],
    [MOE, { num_attention_heads: 8, num_key_value_heads: null }, 8, 6],
    [MOE, { num_attention_heads: 8 }, 4, 6],
    [MOE, { head_dim: 20 }, 4, 20],
  ])("key heads and head width: %o %o", (base, fields, kvHeads, headDim) => {
    expect(readConfig({ ...base, ...fields })).toMatchObject({ kvHeads, headDim });
  });

  test.each([
    [{ rope_theta: 10000 }, 10000],
    [{ rope_parameters: { rope_theta: 20000, rope_type: "default" } }, 20000],
    [{ rope_parameters: { rope_theta: 20000 }, rope_theta: 10000 }, 20000],
    [{ rope_parameters: { rope_type: "default" }, rope_theta: 10000 }, 10000],
    [{ rope_scaling: null, rope_theta: 10000.5 }, 10000.5],
    [{ rope_scaling: { type: "default" } }, 500000],
    [{}, 500000],
  ])("the base of RoPE: %o", (fields, theta) => {
    expect(readConfig({ ...DENSE, ...fields }).ropeTheta).toBe(theta);
  });

  test("the architecture by model_type where architectures is not there", () => {
    const { architectures: _, ...bare } = MOE;
    expect(readConfig({ ...bare, model_type: "ernie4_5_moe" }).architecture).toBe("Ernie4_5_MoeForCausalLM");
    expect(readConfig({ ...bare, model_type: "ernie4_5" }).architecture).toBe("Ernie4_5ForCausalLM");
    expect(readConfig({ ...bare, model_type: "ernie4_5" }).moe).toBeNull();
  });
});

describe("which layers are mixtures", () => {
  const layersOf = (fields: object) => {
    const config = readConfig({ ...MOE, ...fields });
    return Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i));
  };
  test.each([
    [{}, [1, 2, 3, 4, 5]],
    [{ moe_layer_end_index: -1 }, [1, 2, 3, 4, 5]],
    [{ moe_layer_start_index: 0 }, [0, 1, 2, 3, 4, 5]],
    [{ moe_layer_start_index: 2, moe_layer_end_index: 4 }, [2, 3, 4]],
    [{ moe_layer_interval: 2 }, [1, 3, 5]],
    [{ moe_layer_interval: 3, moe_layer_start_index: 0 }, [2, 5]],
    [{ moe_layer_start_index: 3, moe_layer_end_index: 3 }, [3]],
    [{ moe_layer_start_index: 5, moe_layer_end_index: 2 }, []],
    [{ moe_layer_end_index: 99 }, [1, 2, 3, 4, 5]],
  ])("%o", (fields, layers) => {
    expect(layersOf(fields)).toEqual(layers);
  });

  test("none in a dense model", () => {
    const dense = readConfig({ ...DENSE, moe_num_experts: 8 });
    expect([0, 1, 2].filter((i) => isMoeLayer(dense, i))).toEqual([]);
  });
});

describe("which parameters a model has", () => {
  const all = (fields: object) => new Map(parameters(readConfig({ ...MOE, ...fields })).map((p) => [p.name, p]));
  const at = "model.layers.1";

  test("shapes, of an explicit head_dim and fewer key heads", () => {
    const p = all({ head_dim: 20, num_key_value_heads: 2 });
    expect(p.get(`${at}.self_attn.q_proj.weight`)?.shape).toEqual([80, 48]);
    expect(p.get(`${at}.self_attn.k_proj.weight`)?.shape).toEqual([40, 48]);
    expect(p.get(`${at}.self_attn.o_proj.weight`)?.shape).toEqual([48, 80]);
    expect(p.get("model.layers.0.mlp.gate_proj.weight")?.shape).toEqual([96, 48]);
    expect(p.get(`${at}.mlp.experts.gate_proj.weight`)).toMatchObject({ shape: [8, 24, 48], experts: 8 });
    expect(p.get(`${at}.mlp.experts.down_proj.weight`)?.shape).toEqual([8, 48, 24]);
    expect(p.get(`${at}.mlp.shared_experts.gate_proj.weight`)?.shape).toEqual([48, 48]);
    expect(p.get(`${at}.mlp.moe_statics.e_score_correction_bias`)?.shape).toEqual([1, 8]);
  });

  test("tied: no head of its own; not tied: one", () => {
    expect(all({}).has("lm_head.weight")).toBe(false);
    expect(all({ tie_word_embeddings: false }).get("lm_head.weight")?.shape).toEqual([100, 48]);
  });

  test("use_bias: every projection but the experts', and the mixture's head", () => {
    const biases = (fields: object) => [...all(fields).keys()].filter((name) => name.endsWith(".bias"));
    expect(biases({})).toEqual([]);
    const names = biases({ use_bias: true });
    for (const name of ["self_attn.q_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj"])
      expect(names).toContain(`${at}.${name}.bias`);
    expect(names).toContain("model.layers.0.mlp.down_proj.bias");
    expect(names).toContain("lm_head.bias");
    expect(biases({ use_bias: true, architectures: ["Ernie4_5ForCausalLM"] })).not.toContain("lm_head.bias");
  });

  test("no shared experts: none", () => {
    expect([...all({ moe_num_shared_experts: 0 }).keys()].filter((name) => name.includes("shared_experts"))).toEqual([]);
  });

  test("float32 always: norms, router, correction bias; and nothing else", () => {
    const kinds = [...all({ use_bias: true }).values()].filter((p) => p.kind === "float32").map((p) => p.name);
    for (const name of kinds)
      expect(name).toMatch(/norm\.weight$|layernorm\.weight$|\.mlp\.gate\.weight$|e_score_correction_bias$|\.bias$/);
    expect(kinds).toContain(`${at}.mlp.gate.weight`);
    expect(kinds).toContain("model.norm.weight");
  });
});

describe("what is refused", () => {
  test.each<[object, RegExp]>([
    [{ vocab_size: undefined }, /^config\.json: vocab_size is missing, not a whole number of at least 1$/],
    [{ hidden_size: 0 }, /hidden_size is 0/],
    [{ hidden_size: 48.5 }, /hidden_size is 48\.5/],
    [{ num_hidden_layers: "3" }, /num_hidden_layers is "3"/],
    [{ intermediate_size: null }, /intermediate_size is null/],
    [
      { num_attention_heads: 5, num_key_value_heads: 5 },
      /hidden_size \(48\) is not a multiple of num_attention_heads \(5\) and head_dim is not given/,
    ],
    [{ num_key_value_heads: 3 }, /num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)/],
    [{ head_dim: 7 }, /a head width of 7 is not supported/],
    [{ head_dim: 1024 }, /a head width of 1024 is not supported/],
    [{ hidden_act: "gelu" }, /hidden_act is "gelu"/],
    [{ rms_norm_eps: -1 }, /rms_norm_eps is -1/],
    [{ tie_word_embeddings: "yes" }, /tie_word_embeddings is "yes", not true or false/],
    [{ use_bias: 1 }, /use_bias is 1, not true or false/],
    [{ rope_theta: 0 }, /rope_theta is 0/],
    [{ rope_theta: "1e6" }, /rope_theta is "1e6"/],
    [{ rope_scaling: { type: "linear", factor: 2 } }, /the RoPE type "linear" is not supported/],
    [{ rope_parameters: { rope_type: "llama3" } }, /the RoPE type "llama3" is not supported/],
    [{ rope_parameters: "default" }, /rope_parameters is "default", not an object/],
    [{ partial_rotary_factor: 0.5 }, /partial_rotary_factor/],
    [{ moe_k: 9 }, /moe_k \(9\) is more than moe_num_experts \(8\)/],
    [{ moe_k: 0 }, /moe_k is 0/],
    [{ moe_layer_interval: 0 }, /moe_layer_interval is 0/],
    [{ moe_layer_end_index: -2 }, /moe_layer_end_index is -2/],
    [{ moe_layer_start_index: -1 }, /moe_layer_start_index is -1/],
    [{ moe_num_shared_experts: -1 }, /moe_num_shared_experts is -1/],
    [{ moe_norm_min: "0" }, /moe_norm_min is "0"/],
    [{ eos_token_id: "</s>" }, /eos_token_id is "<\/s>", not a token id or a list of them/],
    [{ eos_token_id: [2, null] }, /eos_token_id is \[2,null\]/],
    [{ bos_token_id: -1 }, /bos_token_id is -1/],
    [
      { architectures: ["Qwen3MoeForCausalLM"] },
      /Qwen3MoeForCausalLM is not supported; supported are Ernie4_5_MoeForCausalLM, Ernie4_5ForCausalLM/,
    ],
    [{ architectures: undefined, model_type: "llama" }, /the architecture "llama" is not supported; supported are/],
    [{ architectures: undefined }, /the architecture missing is not supported/],
    [{ architectures: ["LlamaForCausalLM"], model_type: "ernie4_5" }, /LlamaForCausalLM is not supported/],
  ])("%o", (fields, message) => {
    const read = () => readConfig({ ...MOE, ...fields });
    expect(read).toThrow(ConfigError);
    expect(read).toThrow(message);
  });

  test("ids that are none", () => {
    expect(readIds(7, "x")).toEqual([7]);
    expect(readIds([7, 8], "x")).toEqual([7, 8]);
    expect(() => readIds("7", "x")).toThrow('x is "7", not a token id or a list of them');
  });
});
