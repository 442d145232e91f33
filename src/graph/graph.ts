/**
 * A graph is a list of op calls in execution order, with named outputs that a run can compute. Tracing a model's forward pass
 * appends to it; passes build a new graph from it. Nothing runs here; it holds no data and knows no backend.
 */
import type { Dtype } from "../tensor/dtype.ts";
import { type Dim, type Shape, sameShape, showShape } from "../tensor/shape.ts";
import type { Call, Op, OpTable, Params, Result, Sizes, Tensor } from "./call.ts";
import { sizesOf } from "./ops/views.ts";
import { OPS } from "./ops.ts";

/** Thrown when the inputs of an op do not agree; names the op and what it got. */
export class ShapeError extends TypeError {
  constructor(op: string, inputs: readonly Tensor[]) {
    super(`${op}: shapes do not agree: ${inputs.map(show).join(", ")}`);
    this.name = "ShapeError";
  }
}

export class Graph {
  readonly calls: Call[] = [];
  readonly values: Tensor[] = [];
  /** The values that a run can return, by name. */
  readonly outputs = new Map<string, Tensor>();
  readonly table: OpTable;
  #scope = "";

  /** @param table rows of the ops that may occur */
  constructor(table: OpTable = OPS) {
    this.table = table;
  }

  /** A graph with the same values and outputs but no calls, for a pass to fill. */
  branch(table: OpTable = this.table): Graph {
    const next = new Graph(table);
    for (const t of this.values) next.values.push(t);
    for (const [name, t] of this.outputs) next.outputs.set(name, t);
    return next;
  }

  weight(name: string, shape: Shape, dtype: Dtype): Tensor {
    return this.#value({ kind: "weight", name, shape, dtype });
  }

  /** Memory that outlives a run, such as a KV cache or a trained parameter. */
  state(name: string, shape: Shape, dtype: Dtype): Tensor {
    return this.#value({ kind: "state", name, shape, dtype });
  }

  input(name: string, shape: Shape, dtype: "f32" | "i32"): Tensor {
    return this.#value({ kind: "input", name, shape, dtype });
  }

  /** Makes a computed value available to runs under this name. */
  output(name: string, value: Tensor): void {
    if (value.kind !== "computed") throw new Error(`internal: the output ${name} is not a computed value`);
    for (const [other, t] of this.outputs)
      if (t === value || other === name) throw new Error(`internal: the output ${name} would be a second name or value of '${other}'`);
    this.outputs.set(name, value);
  }

  /** Assigns the calls that `trace` appends to `scope`. */
  within<T>(scope: string, trace: () => T): T {
    const outer = this.#scope;
    this.#scope = scope;
    try {
      return trace();
    } finally {
      this.#scope = outer;
    }
  }

  /**
   * Appends a call; throws a ShapeError if the inputs do not agree.
   * @param outputs existing values for the call to compute, when a pass replaces other calls with it; default: new values
   */
  call(op: string, inputs: readonly (Tensor | undefined)[], params: Params = {}, sizes: Sizes = {}, outputs?: readonly Tensor[]): Tensor[] {
    const row = this.row(op);
    const given = inputs.filter((t) => t !== undefined);
    const results = resultsOf(op, row, given, params, sizes);
    const made = outputs ? fitted(op, results, outputs) : results.map((r) => this.#value({ kind: "computed", ...r }));
    const call: Call = { op, inputs: given, outputs: made, params, sizes, scope: this.#scope, effects: effectsOf(row, given) };
    SOUND.add(call);
    this.push(call);
    return made as Tensor[];
  }

  /** Appends a call of another graph. */
  push(call: Call): void {
    this.calls.push(call);
  }

  row(op: string): Op {
    if (!Object.hasOwn(this.table, op)) throw new Error(`internal: there is no op '${op}'`);
    return this.table[op];
  }

  #value(value: Omit<Tensor, "id">): Tensor {
    const tensor = { id: this.values.length, ...value };
    this.values.push(tensor);
    return tensor;
  }

  #one(op: string, inputs: readonly (Tensor | undefined)[], params?: Params, sizes?: Sizes): Tensor {
    return this.call(op, inputs, params, sizes)[0];
  }

  // The ops that models are traced with; each is described in its row of the op table (graph/ops/).

  embed = (ids: Tensor, table: Tensor) => this.#one("embed", [ids, table]);
  rmsNorm = (x: Tensor, weight: Tensor, eps: number) => this.#one("rmsNorm", [x, weight], { eps });
  linear = (x: Tensor, weight: Tensor, bias?: Tensor) => this.#one("linear", [x, weight, bias]);
  linearT = (x: Tensor, weight: Tensor) => this.#one("linearT", [x, weight]);
  groupedLinear = (x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, slots: number, bias?: Tensor) =>
    this.#one("groupedLinear", [x, weight, order, offsets, bias], { slots });
  add = (a: Tensor, b: Tensor) => this.#one("add", [a, b]);
  scale = (x: Tensor, by: number) => this.#one("scale", [x], { by });
  mul = (a: Tensor, b: Tensor) => this.#one("mul", [a, b]);
  softplus = (x: Tensor) => this.#one("softplus", [x]);
  scaleColumns = (x: Tensor, by: Tensor, bias?: Tensor) => this.#one("scaleColumns", [x, by, bias]);
  inverseNorms = (weight: Tensor, a: Tensor, b: Tensor, scale: number) => this.#one("inverseNorms", [weight, a, b], { scale });
  scatterRows = (x: Tensor, index: Tensor, rows: Dim) => this.#one("scatterRows", [x, index], {}, { rows });
  siluMul = (gate: Tensor, up: Tensor) => this.#one("siluMul", [gate, up]);
  dropout = (x: Tensor, seed: Tensor, p: number, stream: number) => this.#one("dropout", [x, seed], { p, stream });
  angles = (positions: Tensor, dim: number, theta: number) => this.#one("angles", [positions], { dim, theta });
  rope = (x: Tensor, angles: Tensor) => this.#one("rope", [x, angles]);
  gather = (x: Tensor, index: Tensor) => this.#one("gather", [x, index]);
  replaceRows = (x: Tensor, by: Tensor, index: Tensor) => this.#one("replaceRows", [x, by, index]);
  addRows = (x: Tensor, by: Tensor, index: Tensor) => this.#one("addRows", [x, by, index]);
  reshape = (x: Tensor, shape: Shape) => this.#one("reshape", [x], {}, sizesOf(shape));
  slice = (x: Tensor, axis: number, start: number, count: Dim) => this.#one("slice", [x], { axis, start }, { count });
  transpose = (x: Tensor, a: number, b: number) => this.#one("transpose", [x], { a, b });
  dot = (a: Tensor, b: Tensor) => this.#one("dot", [a, b]);

  attention = (q: Tensor, k: Tensor, v: Tensor, segments: Tensor, dim: number, causal = true) => {
    const [y, logsumexp] = this.call("attention", [q, k, v, segments], { dim, causal: Number(causal), pairs: 0 });
    return { y, logsumexp };
  };
  cacheWrite = (k: Tensor, v: Tensor, cache: KvCache, segments: Tensor, pages: Tensor): void => {
    this.call("cacheWrite", [k, v, cache.keys, cache.values, segments, pages]);
  };
  cacheRead = (half: Tensor, segments: Tensor, pages: Tensor, context: Dim) =>
    this.#one("cacheRead", [half, segments, pages], {}, { context });

  route = (x: Tensor, gate: Tensor, bias: Tensor, k: number, normMin: number) => {
    const [logits, experts, weights] = this.call("route", [x, gate, bias], { k, normMin });
    return { logits, experts, weights };
  };
  group = (experts: Tensor, count: number) => {
    const [order, offsets] = this.call("group", [experts], { count });
    return { order, offsets };
  };
  adaptedSlots = (experts: Tensor, rows: Tensor, ids: Tensor, count: number) => {
    const [keys, slots] = this.call("adaptedSlots", [experts, rows, ids], { count });
    return { keys, slots };
  };
  routerLoad = (logits: Tensor, k: number) => {
    const [load, probability, z] = this.call("routerLoad", [logits], { k });
    return { load, probability, z };
  };
  combine = (slots: Tensor, weights: Tensor) => this.#one("combine", [slots, weights]);

  /** The loss of each row. */
  crossEntropy = (x: Tensor, head: Tensor, labels: Tensor, chunk: number, bias?: Tensor) =>
    this.#one("crossEntropy", [x, head, labels, bias], { chunk });
  adaptedCrossEntropy = (x: Tensor, head: Tensor, labels: Tensor, branch: { low: Tensor; up: Tensor }, chunk: number, bias?: Tensor) =>
    this.#one("adaptedCrossEntropy", [x, head, labels, branch.low, branch.up, bias], { chunk });

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
  sample = (logits: Tensor, processed: Tensor, sampling: SamplingInputs) => {
    const [ids, logprobs] = this.call("sample", [logits, processed, sampling.floats, sampling.ints]);
    return { ids, logprobs };
  };
  topLogprobs = (logits: Tensor, top: Dim) => {
    const [ids, logprobs] = this.call("topLogprobs", [logits], {}, { top });
    return { ids, logprobs };
  };
}

export type { Tensor } from "./call.ts";

/** A layer's cache: two states [blocks, tokens per block, kv heads, head width]. Backends choose their memory layout. */
export interface KvCache {
  readonly keys: Tensor;
  readonly values: Tensor;
}

/** The sampling controls, one row per output row; columns as in `ops/sampling.ts`. */
export interface SamplingInputs {
  readonly floats: Tensor;
  readonly ints: Tensor;
  readonly history: Tensor;
  readonly biasIds: Tensor;
  readonly biasValues: Tensor;
  /** [masks, words]: bit masks of the allowed ids. */
  readonly masks: Tensor;
}

/** `f32[rows,64]`. */
export function show(t: Pick<Tensor, "dtype" | "shape">): string {
  return `${t.dtype}${showShape(t.shape)}`;
}

function resultsOf(op: string, row: Op, inputs: readonly Tensor[], params: Params, sizes: Sizes): readonly Result[] {
  for (const name of row.params ?? []) if (params[name] === undefined) throw new Error(`internal: ${op} needs the parameter '${name}'`);
  const results = row.outputs(inputs, params, sizes);
  if (!results) throw new ShapeError(op, inputs);
  return results;
}

function effectsOf({ writes = [] }: Op, inputs: readonly Tensor[]): Call["effects"] {
  if (writes.length === 0 && !inputs.some((t) => t.kind === "state")) return NONE;
  const written = writes.map((i) => inputs[i]);
  return { reads: inputs.filter((t) => t.kind === "state"), writes: written };
}

const NONE: Call["effects"] = { reads: [], writes: [] };

/** Returns `outputs`; throws unless they match the op's results. */
function fitted(op: string, results: readonly Result[], outputs: readonly Tensor[]): readonly Tensor[] {
  const agree =
    results.length === outputs.length && results.every((r, i) => r.dtype === outputs[i].dtype && sameShape(r.shape, outputs[i].shape));
  if (!agree) throw new Error(`internal: ${op} computes ${results.map(show).join(", ")}, not ${outputs.map(show).join(", ")}`);
  return outputs;
}

/** Calls whose shapes were checked on creation. */
const SOUND = new WeakSet<Call>();

/**
 * Checks the graph that a pass built, and returns it. Throws an `internal:` error that names `pass` and the call if a value is used
 * before it is computed, is computed twice or never, or has a shape that its call does not give.
 */
export function checked(graph: Graph, pass: string): Graph {
  const known = new Uint8Array(graph.values.length); // by value id
  for (const t of graph.values) if (t.kind !== "computed") known[t.id] = 1;
  for (const call of graph.calls) {
    const { op, inputs, outputs, params, sizes, scope } = call;
    const at = () => `internal: ${pass}: ${op}${scope ? ` of ${scope}` : ""}`;
    for (const t of inputs) if (!known[t.id]) throw new Error(`${at()} uses the value ${t.id} (${show(t)}) before it is computed`);
    if (!SOUND.has(call)) {
      try {
        fitted(op, resultsOf(op, graph.row(op), inputs, params, sizes), outputs);
      } catch (error) {
        throw new Error(`${at()}: ${(error as Error).message.replace(/^internal: /, "")}`);
      }
    }
    for (const t of outputs) {
      if (known[t.id]) throw new Error(`${at()} computes the value ${t.id} (${show(t)}) again`);
      known[t.id] = 1;
    }
  }
  for (const [name, t] of graph.outputs)
    if (!known[t.id]) throw new Error(`internal: ${pass}: nothing computes the output '${name}' (${show(t)})`);
  return graph;
}
