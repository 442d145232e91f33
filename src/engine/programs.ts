/** The planned programs of one model: traced and planned when first needed, for a few sizes, then reused. */
import type { Backend, Program, State, Weights } from "../backend/backend.ts";
import { Graph, type KvCache, kvShapes, type Tensor } from "../graph/graph.ts";
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops.ts";
import { type Plan, plan } from "../graph/plan.ts";
import { type ErnieConfig, isMoeLayer } from "../model/config.ts";
import { bindWeights, type Forward, forward } from "../model/ernie.ts";
import type { Dtype, KvDtype } from "../tensor/dtype.ts";
import { symbol } from "../tensor/shape.ts";
import { BLOCK_TOKENS } from "./blocks.ts";

/** What a program hands over, in this order. */
export type Purpose =
  /** Sampled tokens; the `top` likeliest, where it is not 0; experts and weights of each mixture layer. */
  | { readonly kind: "sample"; readonly top: number; readonly routing: boolean }
  /** Logits, hidden states before each layer and after the final norm, logits, experts and weights of each mixture layer. */
  | { readonly kind: "inspect"; readonly logits: boolean; readonly hiddenStates: boolean; readonly routing: boolean }
  /** The hidden states after the final norm. */
  | { readonly kind: "hidden" };

/** A program, and the plan that it runs. */
export interface Prepared {
  readonly program: Program;
  readonly plan: Plan;
}

export interface KvLayout {
  readonly dtype: KvDtype;
  readonly blocks: number;
}

const UNBOUNDED = 2 ** 31 - 1; // sizes that take no arena memory

export class Programs {
  readonly config: ErnieConfig;
  /** Indices of the layers that are mixtures. */
  readonly mixtures: readonly number[];
  /** Words of a mask over the vocabulary. */
  readonly maskWords: number;
  readonly #dtypeOf: (parameter: string) => Dtype;
  readonly #backend: Backend;
  readonly #weights: Weights;
  readonly #kv: KvLayout;
  readonly #states = new Map<string, State>();
  readonly #prepared = new Map<string, Prepared>();

  constructor(config: ErnieConfig, dtypeOf: (parameter: string) => Dtype, backend: Backend, weights: Weights, kv: KvLayout) {
    this.config = config;
    this.mixtures = Array.from({ length: config.layers }, (_, i) => i).filter((i) => isMoeLayer(config, i));
    this.maskWords = Math.ceil(config.vocabSize / 32);
    this.#dtypeOf = dtypeOf;
    this.#backend = backend;
    this.#weights = weights;
    this.#kv = kv;
    for (let i = 0; i < config.layers; i++)
      for (const [kind, shape] of Object.entries(this.#kvShapes)) this.#states.set(`${kind}.${i}`, backend.state(kv.dtype, shape));
  }

  /** A program with room for `rows` rows; made once for each power of two. */
  for(purpose: Purpose, rows: number): Prepared {
    const capacity = capacityFor(rows);
    const key = `${Object.values(purpose).join()}:${capacity}`;
    const made = this.#prepared.get(key) ?? this.#prepare(purpose, capacity);
    this.#prepared.set(key, made);
    return made;
  }

  get #kvShapes() {
    return kvShapes(this.#kv.dtype, this.#kv.blocks, this.config.kvHeads, this.config.headDim, BLOCK_TOKENS);
  }

  #prepare(purpose: Purpose, rows: number): Prepared {
    const { config } = this;
    const g = new Graph();
    const weights = bindWeights(g, config, this.#dtypeOf);
    const inputs = {
      ids: g.input("ids", [symbol("rows")], "i32"),
      positions: g.input("positions", [symbol("rows")], "i32"),
      segments: g.input("segments", [symbol("sequences"), 3], "i32"),
      pages: g.input("pages", [symbol("sequences"), symbol("pages")], "i32"),
      picked: g.input("picked", [symbol("outs")], "i32"),
    };
    const shapes = this.#kvShapes;
    const caches = Array.from(
      { length: config.layers },
      (_, i): KvCache => ({
        keys: g.state(`keys.${i}`, shapes.keys, this.#kv.dtype),
        values: g.state(`values.${i}`, shapes.values, this.#kv.dtype),
      }),
    );
    const traced = forward(g, config, weights, inputs, caches);
    const outputs = this.#outputs(g, traced, purpose);
    const capacity = { rows, outs: rows, sequences: UNBOUNDED, pages: UNBOUNDED, history: UNBOUNDED, biases: UNBOUNDED, masks: UNBOUNDED };
    const planned = plan(g, outputs, capacity);
    return { program: this.#backend.prepare(planned, this.#weights, this.#states), plan: planned };
  }

  #outputs(g: Graph, { logits, hiddenStates, routing }: Forward, purpose: Purpose): Tensor[] {
    switch (purpose.kind) {
      case "sample": {
        const top = purpose.top > 0 ? Object.values(g.topLogprobs(logits, purpose.top)) : [];
        return [...this.#sampled(g, logits), ...top, ...(purpose.routing ? routing.flatMap((r) => [r.experts, r.weights]) : [])];
      }
      case "inspect":
        return [
          ...(purpose.logits ? [logits] : []),
          ...(purpose.hiddenStates ? hiddenStates : []),
          ...(purpose.routing ? routing.flatMap((r) => [r.logits, r.experts, r.weights]) : []),
        ];
      case "hidden":
        return hiddenStates.slice(-1);
      default:
        return purpose satisfies never;
    }
  }

  #sampled(g: Graph, logits: Tensor): Tensor[] {
    const sampling = {
      floats: g.input("floats", [symbol("outs"), SAMPLING_FLOATS.length], "f32"),
      ints: g.input("ints", [symbol("outs"), SAMPLING_INTS.length], "i32"),
      history: g.input("history", [symbol("history")], "i32"),
      biasIds: g.input("biasIds", [symbol("biases")], "i32"),
      biasValues: g.input("biasValues", [symbol("biases")], "f32"),
      masks: g.input("masks", [symbol("masks"), this.maskWords], "i32"),
    };
    const { ids, logprobs } = g.sample(logits, g.processLogits(logits, sampling), sampling);
    return [ids, logprobs];
  }

  /** The weights that each op reads, by name, in a program that was prepared. Empty before the first. */
  weightsByOp(): Map<string, ReadonlySet<string>> {
    const byOp = new Map<string, Set<string>>();
    for (const { plan } of this.#prepared.values())
      for (const { op, inputs } of plan.graph.calls)
        for (const { kind, name } of inputs)
          if (kind === "weight" && name !== undefined) byOp.set(op, (byOp.get(op) ?? new Set()).add(name));
    return byOp;
  }

  /** Seconds by op, of everything that ran; with `rows`, of the programs alone that steps of so many rows run. */
  profile(rows?: number): Map<string, { readonly seconds: number; readonly calls: number }> {
    const byOp = new Map<string, { seconds: number; calls: number }>();
    for (const { program, plan } of this.#prepared.values()) {
      if (rows !== undefined && plan.capacity["rows"] !== capacityFor(rows)) continue;
      const seconds = program.seconds();
      plan.graph.calls.forEach(({ op }, i) => {
        const sum = byOp.get(op) ?? { seconds: 0, calls: 0 };
        byOp.set(op, { seconds: sum.seconds + seconds[i], calls: sum.calls + 1 });
      });
    }
    return byOp;
  }

  dispose(): void {
    for (const { program } of this.#prepared.values()) program.dispose();
    this.#prepared.clear();
    for (const state of this.#states.values()) state.dispose();
    this.#states.clear();
  }
}

function capacityFor(rows: number): number {
  return 2 ** Math.ceil(Math.log2(rows));
}
