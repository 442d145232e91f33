/**
 * ERNIE-4.5, dense and mixture of experts: which weights it has and how a step's forward is written. It only describes:
 * tracing `forward` gives a graph that any backend can run.
 */
import type { Parameter } from "../checkpoint/names.ts";
import type { Graph, KvCache, Tensor } from "../graph/graph.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { type AttentionWeights, attention, type Step } from "./attention.ts";
import { type ErnieConfig, isMoeLayer } from "./config.ts";
import { type Linear, linear } from "./linear.ts";
import { type MlpWeights, type MoeWeights, mlp, moe, type Routing } from "./moe.ts";

/** A parameter, and whether it may be in half precision or int8, or must stay float32. */
export interface ErnieParameter extends Parameter {
  readonly kind: "matrix" | "float32";
}

/**
 * The format of a parameter in a model whose matrices are `wanted`. The embedding and the head stay int8 in an int4 model:
 * they are 1 % of the 21B, and rounding them to 4 bits costs almost as much perplexity as all experts (docs/LOG.md).
 */
export function parameterDtype<D extends Dtype>({ name, kind }: ErnieParameter, wanted: D): D | "f32" | "int8" {
  if (kind === "float32") return "f32";
  return wanted === "int4" && /^(model\.embed_tokens|lm_head)\./.test(name) ? "int8" : wanted;
}

/** Every parameter of the model, by the names of the hub's checkpoints. */
export function parameters(config: ErnieConfig): ErnieParameter[] {
  const all: ErnieParameter[] = [];
  visitParameters(config, (p) => {
    all.push(p);
    return null;
  });
  return all;
}

interface LayerWeights {
  readonly inputNorm: Tensor;
  readonly attention: AttentionWeights;
  readonly postNorm: Tensor;
  readonly mlp: MlpWeights | null;
  readonly moe: MoeWeights | null;
}

export interface ErnieWeights {
  readonly embed: Tensor;
  readonly layers: readonly LayerWeights[];
  readonly norm: Tensor;
  readonly head: Linear;
}

/** The model's weights as values of `g`; `dtypeOf` says in which format each is loaded. */
export function bindWeights(g: Graph, config: ErnieConfig, dtypeOf: (parameter: string) => Dtype): ErnieWeights {
  return visitParameters(config, ({ name, shape }) => {
    // The correction bias is stored as [1, experts]; programs read it as a vector.
    return g.weight(name, shape[0] === 1 && name.endsWith("e_score_correction_bias") ? shape.slice(1) : shape, dtypeOf(name));
  });
}

/** What a step's forward gives; `rows` and `outs` are symbolic. */
export interface Forward {
  /** [outs, vocab]: of the picked rows only. */
  readonly logits: Tensor;
  /** [rows, hidden] before each layer, then after the final norm. */
  readonly hiddenStates: readonly Tensor[];
  /** Of each mixture layer. */
  readonly routing: readonly (Routing & { readonly layer: number })[];
}

export interface StepInputs {
  /** [rows] */
  readonly ids: Tensor;
  /** [rows] */
  readonly positions: Tensor;
  readonly segments: Tensor;
  readonly pages: Tensor;
  /** [outs]: the rows whose logits are wanted. */
  readonly picked: Tensor;
}

/** Traces one step: `inputs` say which tokens stand where, `caches` has one entry a layer. */
export function forward(g: Graph, config: ErnieConfig, w: ErnieWeights, inputs: StepInputs, caches: readonly KvCache[]): Forward {
  const step: Step = {
    angles: g.angles(inputs.positions, config.headDim, config.ropeTheta),
    segments: inputs.segments,
    pages: inputs.pages,
  };
  const routing: (Routing & { layer: number })[] = [];
  const hiddenStates: Tensor[] = [];
  let x = g.embed(inputs.ids, w.embed); // [rows, hidden]
  w.layers.forEach((layer, i) => {
    hiddenStates.push(x);
    const h = g.add(x, attention(g, g.rmsNorm(x, layer.inputNorm, config.normEps), layer.attention, caches[i], step));
    const y = g.rmsNorm(h, layer.postNorm, config.normEps);
    if (layer.moe) {
      const mixture = moe(g, y, layer.moe);
      routing.push({ layer: i, ...mixture.routing });
      x = g.add(h, mixture.y);
    } else {
      x = g.add(h, mlp(g, y, layer.mlp as MlpWeights));
    }
  });
  const last = g.rmsNorm(x, w.norm, config.normEps);
  hiddenStates.push(last);
  return { logits: linear(g, g.gather(last, inputs.picked), w.head), hiddenStates, routing };
}

/** Calls `visit` for each parameter and puts what it returns in the parameter's place. The one list of names and shapes. */
function visitParameters<T>(config: ErnieConfig, visit: (p: ErnieParameter) => T): Weights<T> {
  const { hiddenSize: hidden, headDim, heads, kvHeads, moe: m } = config;
  const float32 = (name: string, ...shape: number[]) => visit({ name, shape, kind: "float32" });
  const matrix = (name: string, out: number, into: number) => ({
    weight: visit({ name: `${name}.weight`, shape: [out, into], kind: "matrix" }),
    ...(config.useBias ? { bias: float32(`${name}.bias`, out) } : {}),
  });
  const feedForward = (prefix: string, width: number) => ({
    gate: matrix(`${prefix}.gate_proj`, width, hidden),
    up: matrix(`${prefix}.up_proj`, width, hidden),
    down: matrix(`${prefix}.down_proj`, hidden, width),
  });
  const stacked = (name: string, count: number, out: number, into: number) =>
    visit({ name: `${name}.weight`, shape: [count, out, into], experts: count, kind: "matrix" });

  const embed = visit({ name: "model.embed_tokens.weight", shape: [config.vocabSize, hidden], kind: "matrix" });
  const layers = Array.from({ length: config.layers }, (_, i) => {
    const at = `model.layers.${i}`;
    const mixture = m && isMoeLayer(config, i) ? m : null;
    return {
      inputNorm: float32(`${at}.input_layernorm.weight`, hidden),
      attention: {
        q: matrix(`${at}.self_attn.q_proj`, heads * headDim, hidden),
        k: matrix(`${at}.self_attn.k_proj`, kvHeads * headDim, hidden),
        v: matrix(`${at}.self_attn.v_proj`, kvHeads * headDim, hidden),
        o: matrix(`${at}.self_attn.o_proj`, hidden, heads * headDim),
      },
      postNorm: float32(`${at}.post_attention_layernorm.weight`, hidden),
      mlp: mixture ? null : feedForward(`${at}.mlp`, config.intermediateSize),
      moe: mixture && {
        router: float32(`${at}.mlp.gate.weight`, mixture.experts, hidden),
        bias: float32(`${at}.mlp.moe_statics.e_score_correction_bias`, 1, mixture.experts),
        experts: {
          gate: stacked(`${at}.mlp.experts.gate_proj`, mixture.experts, mixture.width, hidden),
          up: stacked(`${at}.mlp.experts.up_proj`, mixture.experts, mixture.width, hidden),
          down: stacked(`${at}.mlp.experts.down_proj`, mixture.experts, hidden, mixture.width),
        },
        shared: mixture.sharedExperts ? feedForward(`${at}.mlp.shared_experts`, mixture.width * mixture.sharedExperts) : null,
        chosen: mixture.chosen,
        normMin: mixture.normMin,
      },
    };
  });
  const norm = float32("model.norm.weight", hidden);
  const head = {
    weight: config.tied ? embed : visit({ name: "lm_head.weight", shape: [config.vocabSize, hidden], kind: "matrix" }),
    // As in transformers: only the mixture's head has a bias, even where it shares the embedding's weights.
    ...(config.useBias && m ? { bias: float32("lm_head.bias", config.vocabSize) } : {}),
  };
  return { embed, layers, norm, head };
}

/** `ErnieWeights` with T in place of each tensor. */
type Weights<T> = { readonly [K in keyof ErnieWeights]: Replace<ErnieWeights[K], T> };
type Replace<V, T> = V extends Tensor
  ? T
  : V extends number | string | null | undefined
    ? V
    : { readonly [K in keyof V]: Replace<V[K], T> };
