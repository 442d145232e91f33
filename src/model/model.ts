/** What an engine or a trainer asks of a model: its parameters, its forward pass, and what tells two beginnings apart. */
import type { Parameter } from "../checkpoint/names.ts";
import type { Graph, KvCache, Tensor } from "../graph/graph.ts";
import type { Dim } from "../tensor/shape.ts";
import type { Content } from "./content.ts";
import type { Linear } from "./linear.ts";
import type { Routing } from "./moe.ts";

/** A parameter, and whether it may be in half precision or int8, must stay float32, or belongs to an adapter. */
export interface ModelParameter extends Parameter {
  readonly kind: "matrix" | "float32" | "adapter";
}

/** Puts a parameter into the graph: as a weight, or as a state where it is trained. */
export type Bind = (parameter: ModelParameter) => Tensor;

/** What a step's forward is given; sizes are symbolic. */
export interface Step {
  /** [rows] */
  readonly ids: Tensor;
  /** [rows], or [axes, rows] where a position has several. */
  readonly positions: Tensor;
  /** [sequences, 3]: first row, rows, position of the first row. */
  readonly segments: Tensor;
  /** Where keys and values are kept between steps; null: each sequence is whole, as in training. */
  readonly cache: StepCache | null;
  /** Rows that come in place of their ids' embeddings: [n, hidden], and their rows, [n]. */
  readonly embeddings?: { readonly values: Tensor; readonly rows: Tensor };
  /** [2] i32: what dropout draws from. Without it nothing is dropped. */
  readonly seed?: Tensor;
}

export interface StepCache {
  /** [sequences, pages]: the blocks of each sequence in order. */
  readonly pages: Tensor;
  /** Positions of all sequences together, this step's included. */
  readonly context: Dim;
  readonly layers: readonly KvCache[];
}

export interface Forward {
  /** [rows, hidden] before each layer, then after the final norm. */
  readonly hiddenStates: readonly Tensor[];
  /** Of each mixture layer. */
  readonly routing: readonly (Routing & { readonly layer: number })[];
  /** Turns final hidden states into logits. */
  readonly head: Linear;
}

export interface Model {
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly maxPositions: number;
  readonly layers: number;
  /** Numbers that a position has: 1 for text. */
  readonly positionAxes: number;
  /** Of each layer's keys and values. */
  readonly cache: { readonly heads: number; readonly width: number };
  readonly mixtures: {
    /** Indices of the layers that are mixtures of experts. */
    readonly layers: readonly number[];
    readonly experts: number;
    /** Experts chosen for each row. */
    readonly chosen: number;
  };
  /** Name of the embedding table. */
  readonly embedding: string;
  /** Every parameter, adapters included. */
  readonly parameters: readonly ModelParameter[];
  /** Traces one step; scopes are `layers.0`, `layers.1`, ... */
  forward(g: Graph, bind: Bind, step: Step): Forward;
  /** A number for each token: two sequences that begin with the same numbers have the same keys and values there. */
  cacheKey(content: Content): readonly number[];
}
