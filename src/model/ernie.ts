/**
 * ERNIE-4.5, dense and mixture of experts: its parameters and its forward pass. Computes nothing: tracing `forward` gives a
 * graph that any backend can run.
 */

import type { Adaptable } from "../checkpoint/adapter.ts";
import type { LowRank } from "../checkpoint/lora.ts";
import type { Graph, Tensor } from "../graph/graph.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { type AttentionWeights, attention } from "./attention.ts";
import { type ErnieConfig, isMoeLayer, moeLayers } from "./config.ts";
import { contentKeys } from "./content.ts";
import { adaptedRows, type Branches, type Embedding, embedded, type Linear } from "./linear.ts";
import type { BranchPart, Forward, Model, ModelParameter, Step } from "./model.ts";
import { type MlpWeights, type MoeWeights, mlp, moe, type Routing } from "./moe.ts";

const EMBEDDING = "model.embed_tokens.weight";
/** Modules of which transformers ties the matrices where a config says so. */
const [EMBED, HEAD] = ["model.embed_tokens", "lm_head"];

/** Low-rank adapters for a model's matrices, as `adaptersOf` and `adaptersIn` make them from PEFT's configs and folders. */
export interface Adapters {
  /** The adapter of a module, by its name: `model.layers.3.self_attn.q_proj`, `model.layers.3.mlp.experts.gate_proj` (all experts). */
  at(module: Adaptable): LowRank | null;
  /** How many adapters are stacked; each row of a step has one of them, or none. Default: one adapter, which all rows have. */
  readonly stack?: number;
}

/** Builds the model that a config describes. @param adapters default: none */
export function ernie(config: ErnieConfig, adapters: Adapters | null = null): Model {
  return {
    vocabSize: config.vocabSize,
    classes: config.classifier?.labels.length ?? null,
    hiddenSize: config.hiddenSize,
    maxPositions: config.maxPositions,
    layers: config.layers,
    positionAxes: 1,
    cache: { heads: config.kvHeads, width: config.headDim },
    mixtures: { layers: moeLayers(config), experts: config.moe?.experts ?? 0, chosen: config.moe?.chosen ?? 0 },
    embedding: EMBEDDING,
    parameters: parameters(config, adapters),
    forward: (g, bind, step) => forward(g, config, visitParameters(config, adapters, bind), step, adapters?.stack ?? 0),
    stacked: ({ count, rank, modules }) =>
      ernie(config, { stack: count, at: ({ name }) => (modules.has(name) ? { rank, scale: 1, dropout: 0 } : null) }),
    cacheKey: contentKeys,
  };
}

/**
 * The format of a parameter in a model whose matrices are in `wanted`. In an int4 model the embedding and the head stay int8:
 * they are 1 % of the 21B model, and rounding them to 4 bits costs almost as much perplexity as all experts (docs/LOG.md).
 */
export function parameterDtype<D extends Dtype>({ name, kind }: ModelParameter, wanted: D): D | "f32" | "int8" {
  if (kind !== "matrix") return "f32";
  return wanted === "int4" && /^(model\.embed_tokens|lm_head)\./.test(name) ? "int8" : wanted;
}

/** Every parameter of the model and its adapters, named as in the checkpoints on the hub. */
export function parameters(config: ErnieConfig, adapters: Adapters | null = null): ModelParameter[] {
  const all: ModelParameter[] = [];
  visitParameters(config, adapters, (p) => {
    all.push(p);
    return null;
  });
  return all;
}

interface LayerWeights<T> {
  readonly inputNorm: T;
  readonly attention: AttentionWeights<T>;
  readonly postNorm: T;
  readonly mlp: MlpWeights<T> | null;
  readonly moe: MoeWeights<T> | null;
}

interface ErnieWeights<T = Tensor> {
  readonly embed: Embedding<T>;
  readonly layers: readonly LayerWeights<T>[];
  readonly norm: T;
  readonly head: Linear<T>;
}

function forward(g: Graph, config: ErnieConfig, w: ErnieWeights, step: Step, stack: number): Forward {
  const { seed, adapted } = step;
  const branches: Branches = { seed, ...(adapted && stack > 0 ? { adapted: adaptedRows(g, stack, adapted.rows, adapted.ids) } : {}) };
  const angles = g.angles(step.positions, config.headDim, config.ropeTheta);
  const routing: (Routing & { layer: number })[] = [];
  const hiddenStates: Tensor[] = [];
  let x = embedded(g, step.ids, w.embed, branches, adapted?.tokens); // [rows, hidden]
  if (step.embeddings) x = g.replaceRows(x, step.embeddings.values, step.embeddings.rows);
  w.layers.forEach((layer, i) => {
    g.within(`layers.${i}`, () => {
      hiddenStates.push(x);
      const normed = g.rmsNorm(x, layer.inputNorm, config.normEps);
      const h = g.add(
        x,
        attention(g, normed, layer.attention, angles, { segments: step.segments, cache: step.cache, ...branches }, step.cache?.layers[i]),
      );
      const y = g.rmsNorm(h, layer.postNorm, config.normEps);
      if (layer.moe) {
        const mixture = moe(g, y, layer.moe, branches);
        routing.push({ layer: i, ...mixture.routing });
        x = g.add(h, mixture.y);
      } else {
        x = g.add(h, mlp(g, y, layer.mlp as MlpWeights, branches));
      }
    });
  });
  hiddenStates.push(g.rmsNorm(x, w.norm, config.normEps));
  return { hiddenStates, routing, head: w.head, branches };
}

/** Calls `visit` for each parameter and puts its result in that parameter's place. The only list of names and shapes. */
function visitParameters<T>(config: ErnieConfig, adapters: Adapters | null, visit: (p: ModelParameter) => T): ErnieWeights<T> {
  const { hiddenSize: hidden, headDim, heads, kvHeads, moe: m } = config;
  const float32 = (name: string, ...shape: number[]) => visit({ name, shape, kind: "float32" });
  let stream = 0;
  /** The adapter of one matrix, or of each expert's; its parameters are named as in PEFT. */
  const adapter = (module: string, out: number, into: number, experts?: number) => {
    const lowRank = adapters?.at({ name: module, experts });
    if (!lowRank) return {};
    const { rank, scale, dropout, decomposed } = lowRank;
    const matrices = (adapters?.stack ?? 1) * (experts ?? 1);
    const stack = experts === undefined && adapters?.stack === undefined ? [] : [matrices];
    const low = (part: BranchPart["part"], name: string, ...shape: number[]) =>
      visit({
        name: `${module}.${name}`,
        shape: [...stack, ...shape],
        ...(experts ? { experts } : {}),
        kind: "adapter",
        branch: { module, part, rankLast: part === "b" },
      });
    const [a, b] = [low("a", "lora_A.weight", rank, into), low("b", "lora_B.weight", out, rank)];
    const magnitude = decomposed && low("magnitude", "lora_magnitude_vector", out);
    return { adapter: { a, b, ...(magnitude ? { magnitude } : {}), scale, dropout, stream: stream++ } };
  };
  const matrix = (name: string, out: number, into: number) => ({
    weight: visit({ name: `${name}.weight`, shape: [out, into], kind: "matrix" }),
    ...(config.useBias ? { bias: float32(`${name}.bias`, out) } : {}),
    ...adapter(name, out, into),
  });
  const feedForward = (prefix: string, width: number) => ({
    gate: matrix(`${prefix}.gate_proj`, width, hidden),
    up: matrix(`${prefix}.up_proj`, width, hidden),
    down: matrix(`${prefix}.down_proj`, hidden, width),
  });
  const stacked = (name: string, count: number, out: number, into: number) => ({
    weight: visit({ name: `${name}.weight`, shape: [count, out, into], experts: count, kind: "matrix" }),
    ...adapter(name, out, into, count),
  });

  /** Throws for an adapter with learnt lengths: neither the loss nor the table computes those. */
  const plain = (module: string) => {
    const lowRank = adapters?.at({ name: module });
    if (lowRank?.decomposed) throw new RangeError(`use_dora: ${module} has no magnitudes; leave it out, or use LoRA without use_dora`);
    return lowRank;
  };
  const table = visit({ name: EMBEDDING, shape: [config.vocabSize, hidden], kind: "matrix" });
  /** An embedding's adapter, named as in PEFT; A is a table here, with a row for each token, and its transpose in files. */
  const tableAdapter = () => {
    const lowRank = plain(EMBED);
    if (!lowRank) return {};
    const { rank, scale } = lowRank;
    const count = adapters?.stack;
    const low = (part: "a" | "b", name: string, shape: number[]) =>
      visit({ name: `${EMBED}.${name}`, shape, kind: "adapter", branch: { module: EMBED, part, rankLast: true } });
    const a = low("a", "lora_embedding_A", [(count ?? 1) * config.vocabSize, rank]);
    return { adapter: { a, b: low("b", "lora_embedding_B", [...(count === undefined ? [] : [count]), hidden, rank]), scale } };
  };
  const embed: Embedding<T> = { table, ...tableAdapter() };
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
        router: {
          weight: float32(`${at}.mlp.gate.weight`, mixture.experts, hidden),
          // The router takes a whole matrix, so rows of one step cannot have different ones.
          ...(adapters?.stack === undefined ? adapter(`${at}.mlp.gate`, mixture.experts, hidden) : {}),
        },
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
  const { classifier } = config;
  if (classifier) {
    const classes = classifier.labels.length;
    const score = {
      weight: float32("score.weight", classes, hidden),
      ...(classifier.bias ? { bias: float32("score.bias", classes) } : {}),
    };
    return { embed, layers, norm, head: score };
  }
  plain(HEAD);
  const head = {
    weight: config.tied ? table : visit({ name: `${HEAD}.weight`, shape: [config.vocabSize, hidden], kind: "matrix" }),
    // As in transformers: only a mixture's head has a bias, even if it shares the embedding's weights.
    ...(config.useBias && m ? { bias: float32(`${HEAD}.bias`, config.vocabSize) } : {}),
    ...adapter(HEAD, config.vocabSize, hidden),
  };
  return { embed, layers, norm, head };
}
