/** The programs of one model: traced once, prepared for a few sizes on first use, then reused. */
import { type Backend, BLOCK_TOKENS, type Program, type State, type Weights } from "../backend/backend.ts";
import { Graph, type KvCache, type Tensor } from "../graph/graph.ts";
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops/sampling.ts";
import { adaptedRows, type Branches, type Linear, linear } from "../model/linear.ts";
import type { Bind, Model } from "../model/model.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { type SymbolValues, symbol } from "../tensor/shape.ts";

/** A step's possible outputs, by name; shapes are in terms of its rows and picked rows (`outs`). */
export const OUTPUTS = {
  /** [outs] i32, `NONE_LEFT` or `NOT_FINITE` where no token could be chosen; and its log-probability, [outs]. */
  token: "token",
  logprob: "logprob",
  /** The likeliest tokens, best first: [outs, top] i32, [outs, top]. */
  topTokens: "topTokens",
  topLogprobs: "topLogprobs",
  /** [outs, vocab], or [outs, classes]. */
  logits: "logits",
  /** [rows, hidden] before layer i; for i = layers, after the final norm. */
  hidden: (i: number) => `hidden.${i}`,
  /** Of a mixture layer: [rows, experts], [rows, chosen] i32, [rows, chosen]. */
  routing: (layer: number) => ({
    logits: `routing.${layer}.logits`,
    experts: `routing.${layer}.experts`,
    weights: `routing.${layer}.weights`,
  }),
} as const;

/** Ends the keys of programs for steps with adapters. */
const ADAPTED = ":adapted";

export interface KvLayout {
  readonly dtype: KvDtype;
  readonly blocks: number;
}

export class Programs {
  readonly model: Model;
  /** Words of a mask over the vocabulary. */
  readonly maskWords: number;
  readonly #backend: Backend;
  readonly #weights: Weights;
  readonly #graph: Graph;
  readonly #trace: (model: Model) => Graph;
  readonly #own = new Map<string, State>();
  readonly #states: ReadonlyMap<string, State>;
  readonly #prepared = new Map<string, { readonly program: Program; readonly rows: number }>();
  /** The same for steps in which some rows have an adapter. */
  #adapted: { readonly graph: Graph; readonly states: ReadonlyMap<string, State> } | null = null;

  /** @param parameters states that are parameters of the model; they stay when this is disposed of */
  constructor(
    model: Model,
    dtypeOf: (parameter: string) => Dtype,
    backend: Backend,
    weights: Weights,
    kv: KvLayout,
    parameters: ReadonlyMap<string, State> = new Map(),
  ) {
    this.model = model;
    this.maskWords = Math.ceil(model.vocabSize / 32);
    this.#backend = backend;
    this.#weights = weights;
    this.#trace = (model) => trace(model, dtypeOf, kv, parameters);
    this.#graph = this.#trace(model);
    try {
      for (const t of this.#graph.values)
        if (t.kind === "state" && !parameters.has(t.name as string))
          this.#own.set(t.name as string, backend.state(t.dtype, t.shape.map(Number)));
    } catch (error) {
      for (const state of this.#own.values()) state.dispose(); // a cache that does not fit gives back its first half
      throw error;
    }
    this.#states = new Map([...parameters, ...this.#own]);
  }

  /**
   * A program with room for these rows and picked rows. Prepared once per power of two of rows and power of 16 of picked rows.
   * @param adapted some rows have an adapter
   */
  for(rows: number, outs: number, adapted = false): Program {
    const most = powerOfTwo(rows);
    const capacity = { rows: most, outs: Math.min(most, 16 ** Math.max(1, Math.ceil(Math.log2(outs) / 4))) };
    const key = `${capacity.rows}:${capacity.outs}${adapted ? ADAPTED : ""}`;
    const made = this.#prepared.get(key) ?? { program: this.#prepare(capacity, adapted), rows: capacity.rows };
    this.#prepared.set(key, made);
    return made.program;
  }

  #prepare(capacity: SymbolValues, adapted: boolean): Program {
    if (!adapted) return this.#backend.prepare(this.#graph, capacity, this.#weights, this.#states);
    if (!this.#adapted) throw new Error("internal: a step has adapters, and none is loaded");
    const { graph, states } = this.#adapted;
    return this.#backend.prepare(
      graph,
      { ...capacity, adapted: capacity["rows"], adaptedOuts: capacity["outs"] },
      this.#weights,
      new Map([...this.#states, ...states]),
    );
  }

  /** Takes the memory of a stack of adapters, in place of an earlier one. @param model as `model`, with the stack's parameters */
  adapt(model: Model, states: ReadonlyMap<string, State>): void {
    for (const [key, { program }] of this.#prepared) {
      if (!key.endsWith(ADAPTED)) continue;
      program.dispose();
      this.#prepared.delete(key);
    }
    this.#adapted = { graph: this.#trace(model), states };
  }

  /** The names of the weights that each op reads in the prepared programs. Empty before the first. */
  weightsByOp(): Map<string, ReadonlySet<string>> {
    const byOp = new Map<string, Set<string>>();
    for (const { program } of this.#prepared.values())
      for (const { op, inputs } of program.calls)
        for (const { kind, name } of inputs)
          if (kind === "weight" && name !== undefined) byOp.set(op, (byOp.get(op) ?? new Set()).add(name));
    return byOp;
  }

  /** Seconds by op over all runs; with `rows`, only of the programs that steps of this many rows use. */
  profile(rows?: number): Map<string, { readonly seconds: number; readonly calls: number }> {
    const byOp = new Map<string, { seconds: number; calls: number }>();
    for (const { program, rows: capacity } of this.#prepared.values()) {
      if (rows !== undefined && capacity !== powerOfTwo(rows)) continue;
      const seconds = program.seconds();
      program.calls.forEach(({ op }, i) => {
        const sum = byOp.get(op) ?? { seconds: 0, calls: 0 };
        byOp.set(op, { seconds: sum.seconds + seconds[i], calls: sum.calls + 1 });
      });
    }
    return byOp;
  }

  dispose(): void {
    for (const { program } of this.#prepared.values()) program.dispose();
    this.#prepared.clear();
    for (const state of this.#own.values()) state.dispose();
    this.#own.clear();
  }
}

/** Traces everything that a step can compute; runs skip the outputs they do not ask for. */
function trace(model: Model, dtypeOf: (parameter: string) => Dtype, kv: KvLayout, parameters: ReadonlyMap<string, State>): Graph {
  const g = new Graph();
  const { heads, width } = model.cache;
  const half = (name: string) => g.state(name, [kv.blocks, BLOCK_TOKENS, heads, width], kv.dtype);
  const layers = Array.from({ length: model.layers }, (_, i): KvCache => ({ keys: half(`keys.${i}`), values: half(`values.${i}`) }));
  const rows = symbol("rows");
  const stacked = model.parameters.some((p) => p.kind === "adapter" && !parameters.has(p.name));
  const bind: Bind = ({ name, shape, kind }) =>
    kind === "adapter" || parameters.has(name) ? g.state(name, shape, "f32") : g.weight(name, shape, dtypeOf(name));
  const traced = model.forward(g, bind, {
    ids: g.input("ids", [rows], "i32"),
    positions: g.input("positions", model.positionAxes === 1 ? [rows] : [model.positionAxes, rows], "i32"),
    segments: g.input("segments", [symbol("sequences"), 3], "i32"),
    cache: { pages: g.input("pages", [symbol("sequences"), symbol("pages")], "i32"), context: symbol("context"), layers },
    embeddings: {
      values: g.input("embeddings", [symbol("embedded"), model.hiddenSize], "f32"),
      rows: g.input("embeddedRows", [symbol("embedded")], "i32"),
    },
    ...(stacked
      ? {
          adapted: {
            rows: g.input("adaptedRows", [symbol("adapted")], "i32"),
            ids: g.input("adapterIds", [symbol("adapted"), 1], "i32"),
            tokens: g.input("adaptedTokens", [symbol("adapted")], "i32"),
          },
        }
      : {}),
  });
  const last = traced.hiddenStates[traced.hiddenStates.length - 1];
  const picked = g.gather(last, g.input("picked", [symbol("outs")], "i32"));
  const logits = linear(g, picked, traced.head, traced.head.adapter && stacked ? pickedRows(g, traced.head.adapter) : {});
  g.output(OUTPUTS.logits, logits);
  traced.hiddenStates.forEach((t, i) => {
    g.output(OUTPUTS.hidden(i), t);
  });
  for (const { layer, ...values } of traced.routing)
    for (const which of ["logits", "experts", "weights"] as const) g.output(OUTPUTS.routing(layer)[which], values[which]);
  if (model.classes === null) traceSampling(g, logits);
  return g;
}

/** Of the picked rows, those that have an adapter of a stack. */
function pickedRows(g: Graph, { a }: NonNullable<Linear["adapter"]>): Branches {
  const adapted = symbol("adaptedOuts");
  const rows = g.input("adaptedPicked", [adapted], "i32");
  return { adapted: adaptedRows(g, Number(a.shape[0]), rows, g.input("pickedAdapters", [adapted, 1], "i32")) };
}

function traceSampling(g: Graph, logits: Tensor): void {
  const outs = symbol("outs");
  const sampling = {
    floats: g.input("floats", [outs, SAMPLING_FLOATS.length], "f32"),
    ints: g.input("ints", [outs, SAMPLING_INTS.length], "i32"),
    history: g.input("history", [symbol("history")], "i32"),
    biasIds: g.input("biasIds", [symbol("biases")], "i32"),
    biasValues: g.input("biasValues", [symbol("biases")], "f32"),
    masks: g.input("masks", [symbol("masks"), Math.ceil(Number(logits.shape[1]) / 32)], "i32"),
  };
  const { ids, logprobs } = g.sample(logits, g.processLogits(logits, sampling), sampling);
  const top = g.topLogprobs(logits, symbol("top"));
  g.output(OUTPUTS.token, ids);
  g.output(OUTPUTS.logprob, logprobs);
  g.output(OUTPUTS.topTokens, top.ids);
  g.output(OUTPUTS.topLogprobs, top.logprobs);
}

function powerOfTwo(n: number): number {
  return 2 ** Math.ceil(Math.log2(n));
}
