/** The interface of a model for an engine or trainer: its parameters, its forward pass, and the keys of the prefix cache. */
import type { Parameter } from "../checkpoint/names.ts";
import type { Graph, KvCache, Tensor } from "../graph/graph.ts";
import type { Dim } from "../tensor/shape.ts";
import type { Content } from "./content.ts";
import type { Branches, Linear } from "./linear.ts";
import type { Routing } from "./moe.ts";

/** A parameter; `kind` says whether it may be in half precision or int8, must stay float32, or belongs to an adapter. */
export interface ModelParameter extends Parameter {
  readonly kind: "matrix" | "float32" | "adapter";
  /** Of an adapter's parameter: the module beside which it is, and its part in the branch. */
  readonly branch?: BranchPart;
}

/** A parameter's part in an adapter's branch: the first matrix, the second, or the lengths of DoRA. */
export interface BranchPart {
  /** `model.layers.3.self_attn.q_proj`, `model.layers.3.mlp.experts.gate_proj` (all experts), `model.embed_tokens`, `lm_head`. */
  readonly module: string;
  readonly part: "a" | "b" | "magnitude";
  /** Whether the last axis counts the rank: of every second matrix, and of an embedding's first one, a table with a row for each token. */
  readonly rankLast: boolean;
}

/** Adds a parameter to the graph: as a weight, or as a state if it is trained. */
export type Bind = (parameter: ModelParameter) => Tensor;

/** The inputs of a step's forward pass; sizes are symbolic. */
export interface Step {
  /** [rows] */
  readonly ids: Tensor;
  /** [rows], or [axes, rows] if positions have several axes. */
  readonly positions: Tensor;
  /** [sequences, 3]: first row, number of rows, position of the first row. */
  readonly segments: Tensor;
  /** Holds keys and values between steps; null: each sequence is complete in itself, as in training. */
  readonly cache: StepCache | null;
  /** Embeddings that replace those of the ids, [n, hidden], and the rows that they replace, [n]. */
  readonly embeddings?: { readonly values: Tensor; readonly rows: Tensor };
  /**
   * For a model with a stack of adapters: the rows that have one, [adapted] i32, and which, [adapted, 1] i32. Without it no row has one.
   * `tokens` [adapted] i32: their rows in the stacked tables of embeddings' adapters, which is the adapter times the vocabulary, plus the id.
   */
  readonly adapted?: { readonly rows: Tensor; readonly ids: Tensor; readonly tokens: Tensor };
  /** [2] i32: the seed of dropout. Without it nothing is dropped. */
  readonly seed?: Tensor;
}

export interface StepCache {
  /** [sequences, pages]: each sequence's blocks in order. */
  readonly pages: Tensor;
  /** The total length of all sequences, this step's rows included. */
  readonly context: Dim;
  readonly layers: readonly KvCache[];
}

export interface Forward {
  /** [rows, hidden] before each layer, then after the final norm. */
  readonly hiddenStates: readonly Tensor[];
  /** One per mixture layer. */
  readonly routing: readonly (Routing & { readonly layer: number })[];
  /** Turns final hidden states into logits: of the vocabulary, or of a classifier's classes. */
  readonly head: Linear;
  /** What the step says to the head's branch, where its rows are all rows of the step. */
  readonly branches: Branches;
}

/** Room for several adapters beside a model's matrices, so that each row of a step can have another one. */
export interface Stack {
  /** How many adapters there is room for. */
  readonly count: number;
  /** The rank that all matrices have room for; smaller ones are padded with zeros. */
  readonly rank: number;
  /** Modules that have an adapter's branch, by name: `model.layers.3.self_attn.q_proj`. */
  readonly modules: ReadonlySet<string>;
}

export interface Model {
  readonly vocabSize: number;
  /** How many classes a classifier tells apart; null: the model predicts tokens. */
  readonly classes: number | null;
  readonly hiddenSize: number;
  readonly maxPositions: number;
  readonly layers: number;
  /** Numbers per position: 1 for text. */
  readonly positionAxes: number;
  /** Shape of each layer's keys and values. */
  readonly cache: { readonly heads: number; readonly width: number };
  readonly mixtures: {
    /** Indices of the mixture-of-experts layers. */
    readonly layers: readonly number[];
    readonly experts: number;
    /** Experts chosen per row. */
    readonly chosen: number;
  };
  /** Name of the embedding table. */
  readonly embedding: string;
  /** Every parameter, adapters included. */
  readonly parameters: readonly ModelParameter[];
  /** Traces one step; scopes are `layers.0`, `layers.1`, ... */
  forward(g: Graph, bind: Bind, step: Step): Forward;
  /** The same model with a stack of adapters: parameters of kind `adapter`, [count, rank, in] and [count, out, rank], or [count * experts, ...]. */
  stacked(stack: Stack): Model;
  /** A number for each token: sequences that share a prefix of these numbers share its keys and values. */
  cacheKey(content: Content): readonly number[];
}
