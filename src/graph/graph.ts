/**
 * A graph is a list of op calls in execution order. Tracing a model's forward appends to it; nothing runs, and it holds
 * no data and knows no backend.
 */
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { type Dim, type Shape, showShape } from "../tensor/shape.ts";
import { OPS, type OpName, type Params } from "./ops.ts";

/**
 * Where a value's memory comes from: computed by a call, bound once when the program is prepared (`weight`, `state`), or
 * handed over with each run (`input`).
 */
export type Kind = "computed" | "weight" | "state" | "input";

/** A value of a graph. Holds no data: `id` indexes the graph's values. */
export interface Tensor {
  readonly id: number;
  readonly kind: Kind;
  /** The name that a weight, state or input is bound by. */
  readonly name?: string;
  readonly dtype: Dtype;
  readonly shape: Shape;
}

export interface Call {
  readonly op: OpName;
  readonly inputs: readonly Tensor[];
  readonly outputs: readonly Tensor[];
  readonly params: Params;
}

/** Two tensors do not fit together; says which op saw what. */
export class ShapeError extends TypeError {
  constructor(op: string, inputs: readonly Tensor[]) {
    super(`${op}: shapes do not agree: ${inputs.map((t) => `${t.dtype}${showShape(t.shape)}`).join(", ")}`);
    this.name = "ShapeError";
  }
}

export class Graph {
  readonly calls: Call[] = [];
  readonly values: Tensor[] = [];
  readonly #casts = new Map<string, Tensor>();

  weight(name: string, shape: Shape, dtype: Dtype): Tensor {
    return this.#value({ kind: "weight", name, shape, dtype });
  }

  /** Memory that outlives a run, such as a KV cache. */
  state(name: string, shape: Shape, dtype: Dtype): Tensor {
    return this.#value({ kind: "state", name, shape, dtype });
  }

  input(name: string, shape: Shape, dtype: "f32" | "i32"): Tensor {
    return this.#value({ kind: "input", name, shape, dtype });
  }

  /** Appends a call; throws ShapeError where the inputs do not agree. */
  call(op: OpName, inputs: readonly Tensor[], params: Params = {}): Tensor[] {
    const rule = OPS[op];
    for (const name of rule.params) if (params[name] === undefined) throw new Error(`internal: ${op} needs the parameter '${name}'`);
    const results = rule.outputs(inputs, params);
    if (!results) throw new ShapeError(op, inputs);
    const outputs = results.map(({ shape, dtype }) => this.#value({ kind: "computed", shape, dtype }));
    this.calls.push({ op, inputs, outputs, params });
    return outputs;
  }

  #value(value: Omit<Tensor, "id">): Tensor {
    const tensor = { id: this.values.length, ...value };
    this.values.push(tensor);
    return tensor;
  }

  #one(op: OpName, inputs: readonly (Tensor | undefined)[], params?: Params): Tensor {
    return this.call(
      op,
      inputs.filter((t) => t !== undefined),
      params,
    )[0];
  }

  /** Rows of `table` [n, width] chosen by `ids` [rows]. */
  embed = (ids: Tensor, table: Tensor) => this.#one("embed", [ids, table]);
  /** `x / sqrt(mean(x^2) + eps) * weight` over the last axis (https://arxiv.org/abs/1910.07467). */
  rmsNorm = (x: Tensor, weight: Tensor, eps: number) => this.#one("rmsNorm", [x, weight], { eps });
  /** `x . weight^T (+ bias)`: [rows, k], [n, k] to [rows, n]. */
  linear = (x: Tensor, weight: Tensor, bias?: Tensor) => this.#one("linear", [this.#activations(x, weight), weight, bias]);
  /**
   * Each expert slot times the matrix of its expert: x [rows, k] with `slots` slots a row, weight [experts, n, k],
   * order and offsets from `group`, to [slots * rows, n] in slot order (not in the order of the experts).
   */
  groupedLinear = (x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, slots: number, bias?: Tensor) =>
    this.#one("groupedLinear", [this.#activations(x, weight), weight, order, offsets, bias], { slots });
  /** `silu(x . gate^T) * (x . up^T)` in one pass (https://arxiv.org/abs/2002.05202): x [rows, k], gate and up [n, k] to [rows, n]. */
  gatedLinear = (x: Tensor, gate: Tensor, up: Tensor) => this.#one("gatedLinear", [this.#activations(x, gate), gate, up]);
  /** The same of each expert slot with the matrices of its expert, as `groupedLinear`. */
  groupedGatedLinear = (x: Tensor, gate: Tensor, up: Tensor, order: Tensor, offsets: Tensor, slots: number) =>
    this.#one("groupedGatedLinear", [this.#activations(x, gate), gate, up, order, offsets], { slots });
  add = (a: Tensor, b: Tensor) => this.#one("add", [a, b]);
  /** `silu(gate) * up` (https://arxiv.org/abs/2002.05202). */
  siluMul = (gate: Tensor, up: Tensor) => this.#one("siluMul", [gate, up]);
  /** Cosine and sine of `position * theta^(-2i/dim)` for each pair i, side by side: [rows] to [rows, dim]. */
  angles = (positions: Tensor, dim: number, theta: number) => this.#one("angles", [positions], { dim, theta });
  /** Turns adjacent pairs of each head by `angles` (https://arxiv.org/abs/2104.09864). */
  rope = (x: Tensor, angles: Tensor) => this.#one("rope", [x, angles]);
  /** Stores the keys and values of this step's rows in their pages of the cache. */
  cacheWrite = (k: Tensor, v: Tensor, cache: KvCache, segments: Tensor, pages: Tensor): void => {
    this.call("cacheWrite", [k, v, cache.keys, cache.values, segments, pages]);
  };
  /** Causal attention of q [rows, heads * dim] over the cached positions up to each row's own. */
  attention = (q: Tensor, cache: KvCache, segments: Tensor, pages: Tensor) =>
    this.#one("attention", [q, cache.keys, cache.values, segments, pages]);
  /** The router: probabilities, then the `k` best by probability plus bias; weights sum to one, never divided by less than `normMin`. */
  route = (x: Tensor, gate: Tensor, bias: Tensor, k: number, normMin: number) => {
    const [logits, experts, weights] = this.call("route", [x, gate, bias], { k, normMin });
    return { logits, experts, weights };
  };
  /** Sorts expert slots by expert: `order` lists slots, those of expert e from offsets[e] to offsets[e + 1]. */
  group = (experts: Tensor, count: number) => {
    const [order, offsets] = this.call("group", [experts], { count });
    return { order, offsets };
  };
  /** Sums each row's expert slots times their weights: [k * rows, n], [rows, k] to [rows, n]. */
  combine = (slots: Tensor, weights: Tensor) => this.#one("combine", [slots, weights]);
  /** Rows of x chosen by `index`. */
  gather = (x: Tensor, index: Tensor) => this.#one("gather", [x, index]);
  /** Applies each row's logits processors; see `engine/sampling.ts` for the columns of the controls. */
  processLogits = (logits: Tensor, sampling: SamplingInputs) =>
    this.#one("processLogits", [
      logits,
      sampling.floats,
      sampling.ints,
      sampling.history,
      sampling.biasIds,
      sampling.biasValues,
      sampling.masks,
    ]);
  /**
   * Chooses a token a row, greedily or at random, and gives its log-probability by the unprocessed logits. Where all of a row's
   * tokens are ruled out, the token is -1.
   */
  sample = (logits: Tensor, processed: Tensor, sampling: SamplingInputs) => {
    const [ids, logprobs] = this.call("sample", [logits, processed, sampling.floats, sampling.ints]);
    return { ids, logprobs };
  };
  /** The `k` likeliest tokens of each row, best first, the lower id first among equals: ids and log-probabilities, [rows, k] each. */
  topLogprobs = (logits: Tensor, k: number) => {
    const [ids, logprobs] = this.call("topLogprobs", [logits], { k });
    return { ids, logprobs };
  };

  /** x in the format that products with `weight` are made in: each conversion is made once, however many weights use it. */
  #activations(x: Tensor, weight: Tensor): Tensor {
    const op = weight.dtype === "bf16" ? "toBf16Pair" : weight.dtype === "int8" || weight.dtype === "int4" ? "toInt8" : null;
    if (!op || x.dtype !== "f32") return x;
    const key = `${op}:${x.id}`;
    const made = this.#casts.get(key) ?? this.#one(op, [x]);
    this.#casts.set(key, made);
    return made;
  }
}

export interface KvCache {
  /** [blocks, kv heads, head width, block tokens]: transposed, so that scores of neighbouring tokens lie side by side; of int8kv as `values`. */
  readonly keys: Tensor;
  /** [blocks, kv heads, block tokens, head width] */
  readonly values: Tensor;
}

/** The controls of sampling, one row an output row; columns as in `ops.ts`. */
export interface SamplingInputs {
  readonly floats: Tensor;
  readonly ints: Tensor;
  readonly history: Tensor;
  readonly biasIds: Tensor;
  readonly biasValues: Tensor;
  /** [masks, words]: bits of the ids that are allowed. */
  readonly masks: Tensor;
}

/** Shapes of a cache of so many blocks. */
export function kvShapes(
  dtype: KvDtype,
  blocks: number,
  heads: number,
  width: number,
  tokens: number,
): { keys: number[]; values: number[] } {
  const values = [blocks, heads, tokens, width];
  return { keys: dtype === "int8kv" ? values : [blocks, heads, width, tokens], values };
}

export type { Dim };
