/**
 * Rounds a model's matrices to int4 by what they see: runs a text through the model, one layer at a time, and gives the native
 * rounding the inputs of each product. The next layer sees what the rounded layer computes. Products are read off the traced
 * graph, so this knows no model.
 */
import { open, rm } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { type Backend, BLOCK_TOKENS, type Numbers, type State, type WeightSource } from "../backend/backend.ts";
import { CPU_DEFAULTS } from "../backend/cpu.ts";
import { inputMoments, nativeBackend, roundStored } from "../backend/native.ts";
import { partName, type Slice, type Source } from "../checkpoint/names.ts";
import { cut } from "../graph/cut.ts";
import { Graph, type KvCache, type Tensor } from "../graph/graph.ts";
import type { Model } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { blockBytes } from "../tensor/quantized.ts";
import { elements, symbol } from "../tensor/shape.ts";
import { computedAs } from "../tensor/stored.ts";

/** The tokens whose worth of its layer's inputs is added to those that an expert sees, for experts that see few. */
const COMMON_TOKENS = 512;

/** A matrix that a layer multiplies by, or a stack of them. */
interface Product {
  readonly source: Source;
  readonly layer: number;
  /** [rows, k], or [slots, k] */
  readonly x: Tensor;
  /** Of a stack: which experts read which rows of x. */
  readonly routed: Routed | null;
}

interface Routed {
  /** [rows, chosen]: the expert of each slot, and the weight of its result. */
  readonly experts: Tensor;
  readonly weights: Tensor;
  /** How many slots read a row of x. */
  readonly slots: number;
}

/** Matrices that see the same inputs, and those inputs: rows of x, each with its share. No shares: all count the same. */
interface Job {
  readonly matrices: readonly { readonly source: Source; readonly part: number }[];
  readonly x: Float32Array;
  readonly k: number;
  readonly rows: Int32Array;
  readonly shares: Float32Array;
  readonly common: Float32Array | null;
}

interface Traced {
  readonly graph: Graph;
  /** Before each layer, then after the final norm. */
  readonly hidden: readonly Tensor[];
}

export interface CalibrationOptions {
  readonly model: Model;
  /** Where the parameters are stored, by name. */
  readonly sources: ReadonlyMap<string, Source>;
  /** Sequences of tokens, all of one length. */
  readonly windows: readonly (readonly number[])[];
  /** A file for the rounded matrices of one layer; removed when no longer needed. */
  readonly scratch: string;
  readonly signal?: AbortSignal;
}

export class Calibration {
  readonly #options: CalibrationOptions;
  readonly #backend: Backend;
  readonly #traced: Traced;
  readonly #products: readonly Product[];
  /** The rounded matrices of each layer that has been asked for, by name, until they are taken. */
  readonly #layers: Promise<Map<string, Uint8Array>>[] = [];
  /** The inputs of the layer that comes next, [tokens, hidden]. */
  #hidden: Float32Array = new Float32Array();

  constructor(options: CalibrationOptions) {
    this.#options = options;
    this.#traced = this.#trace();
    this.#products = productsOf(this.#traced.graph, options.sources);
    this.#backend = nativeBackend();
  }

  /** The int4 bytes of a part of a matrix; each can be taken once. All of its layer, and the layers before, are rounded first. */
  async take(parameter: string, index: number): Promise<Uint8Array> {
    const product = this.#products.find(({ source }) => source.name === parameter);
    if (!product) throw new Error(`internal: no product of a layer reads ${parameter}`);
    const name = partName(product.source.name, index, product.routed !== null);
    const layer = await this.#rounded(product.layer);
    const bytes = layer.get(name);
    if (!bytes) throw new Error(`internal: ${name} was not rounded, or taken before`);
    layer.delete(name);
    return bytes;
  }

  dispose(): void {
    this.#backend.dispose();
  }

  #rounded(layer: number): Promise<Map<string, Uint8Array>> {
    this.#layers[layer] ??= (layer === 0 ? this.#embed() : this.#rounded(layer - 1)).then(() => this.#round(layer));
    return this.#layers[layer];
  }

  async #embed(): Promise<void> {
    const { graph, hidden } = this.#traced;
    const values = await this.#run(cut(graph, new Map(), new Map([["hidden", hidden[0]]])));
    this.#hidden = values.get(hidden[0]) as Float32Array;
  }

  /** Rounds a layer's matrices, and leaves the inputs of the next in `#hidden`. */
  async #round(layer: number): Promise<Map<string, Uint8Array>> {
    const products = this.#products.filter((p) => p.layer === layer);
    const { graph, hidden } = this.#traced;
    const seen = new Set(products.flatMap(({ x, routed }) => (routed ? [x, routed.experts, routed.weights] : [x])));
    const wanted = new Map([...seen].map((t) => [`seen.${t.id}`, t]));
    const values = await this.#run(cut(graph, new Map([["hidden", hidden[layer]]]), wanted));

    const results = new Map<string, Uint8Array>();
    const jobs = await this.#jobs(products, (t) => values.get(t) as Numbers);
    let next = 0;
    const work = async () => {
      while (next < jobs.length) {
        this.#options.signal?.throwIfAborted();
        const { matrices, x, k, rows, shares, common } = jobs[next++];
        const parts = matrices.map(({ source, part }) => {
          const n = source.shape.at(-2) as number;
          const name = partName(source.name, part, source.shape.length === 3);
          return { ...source.parts[part], name, stored: source.dtype, n, to: new Uint8Array(blockBytes("int4", n, k)) };
        });
        await roundStored(parts, { x, k, rows, shares, common });
        for (const { name, to } of parts) results.set(name, to);
      }
    };
    const workers = await Promise.allSettled(Array.from({ length: availableParallelism() }, work));
    for (const w of workers) if (w.status === "rejected") throw w.reason;
    if (layer + 1 < this.#options.model.layers) await this.#advance(layer, products, results);
    return results;
  }

  async #jobs(products: readonly Product[], read: (t: Tensor) => Numbers): Promise<Job[]> {
    const jobs: Job[] = [];
    const tokens = this.#options.windows.length * this.#options.windows[0].length;
    for (const x of new Set(products.map((p) => p.x))) {
      const k = Number(x.shape[1]);
      const data = read(x) as Float32Array;
      const same = products.filter((p) => p.x === x);
      const plain = same.filter((p) => !p.routed);
      const all = Int32Array.from({ length: data.length / k }, (_, r) => r);
      if (plain.length > 0)
        jobs.push({
          matrices: plain.map(({ source }) => ({ source, part: 0 })),
          x: data,
          k,
          rows: all,
          shares: new Float32Array(),
          common: null,
        });
      const stacked = same.filter((p) => p.routed);
      if (stacked.length === 0) continue;
      const { experts, weights, slots } = stacked[0].routed as Routed;
      const count = stacked[0].source.shape[0];
      const common = slots > 1 ? await inputMoments(data, k, COMMON_TOKENS / tokens) : null;
      const rows: number[][] = Array.from({ length: count }, () => []);
      const shares: number[][] = Array.from({ length: count }, () => []);
      const chosen = Number(experts.shape[1]);
      const weight = read(weights);
      read(experts).forEach((e, slot) => {
        rows[e].push(slots > 1 ? Math.floor(slot / chosen) : slot);
        shares[e].push(weight[slot] * chosen);
      });
      for (let e = 0; e < count; e++)
        jobs.push({
          matrices: stacked.map(({ source }) => ({ source, part: e })),
          x: data,
          k,
          rows: Int32Array.from(rows[e]),
          shares: Float32Array.from(shares[e]),
          common,
        });
    }
    return jobs;
  }

  /** Computes the inputs of the next layer with the rounded matrices of this one. */
  async #advance(layer: number, products: readonly Product[], results: ReadonlyMap<string, Uint8Array>): Promise<void> {
    const { scratch } = this.#options;
    try {
      const rounded = await writeParts(scratch, products, results);
      const { graph, hidden } = this.#trace(rounded);
      const part = cut(graph, new Map([["hidden", hidden[layer]]]), new Map([["next", hidden[layer + 1]]]));
      this.#hidden = (await this.#run(part, rounded)).get(hidden[layer + 1]) as Float32Array;
    } finally {
      await rm(scratch, { force: true });
    }
  }

  #source(name: string, rounded?: ReadonlyMap<string, Source>): Source {
    const found = rounded?.get(name) ?? this.#options.sources.get(name);
    if (!found) throw new Error(`internal: ${name} was not located`);
    return found;
  }

  /** The forward pass of one sequence, over a cache with room for it. */
  #trace(rounded?: ReadonlyMap<string, Source>): Traced {
    const { model, windows } = this.#options;
    const g = new Graph();
    const { heads, width } = model.cache;
    const blocks = Math.ceil(windows[0].length / BLOCK_TOKENS);
    const half = (name: string) => g.state(name, [blocks, BLOCK_TOKENS, heads, width], "f32");
    const layers = Array.from({ length: model.layers }, (_, i): KvCache => ({ keys: half(`keys.${i}`), values: half(`values.${i}`) }));
    const dtypeOf = (name: string): Dtype => CPU_DEFAULTS.matrixDtype(computedAs(this.#source(name, rounded).dtype));
    const { hiddenStates } = model.forward(g, ({ name, shape, kind }) => g.weight(name, shape, kind === "matrix" ? dtypeOf(name) : "f32"), {
      ids: g.input("ids", [symbol("rows")], "i32"),
      positions: g.input("positions", model.positionAxes === 1 ? [symbol("rows")] : [model.positionAxes, symbol("rows")], "i32"),
      segments: g.input("segments", [symbol("sequences"), 3], "i32"),
      cache: { pages: g.input("pages", [symbol("sequences"), symbol("pages")], "i32"), context: symbol("context"), layers },
    });
    return { graph: g, hidden: hiddenStates };
  }

  /** Runs every window through a part of the model; returns all of its outputs, the windows one after another. */
  async #run(graph: Graph, rounded?: ReadonlyMap<string, Source>): Promise<Map<Tensor, Numbers>> {
    const { windows, model, signal } = this.#options;
    const rows = windows[0].length;
    const pages = Math.ceil(rows / BLOCK_TOKENS);
    const used = [...new Set(graph.calls.flatMap((c) => c.inputs))];
    const weights = used.filter((t) => t.kind === "weight").map((t) => ({ t, source: this.#source(t.name as string, rounded) }));
    const sources = weights.map(({ t, source }): WeightSource => ({ ...source, stored: source.dtype, dtype: t.dtype }));
    const values = new Map<Tensor, Numbers>();
    for (const t of graph.outputs.values()) {
      const size = windows.length * elements(t.shape, { rows });
      values.set(t, t.dtype === "i32" ? new Int32Array(size) : new Float32Array(size));
    }
    const states = new Map<string, State>();
    const loaded = await this.#backend.load(sources, "mapped");
    try {
      for (const t of used) if (t.kind === "state") states.set(t.name as string, this.#backend.state(t.dtype, t.shape.map(Number)));
      const program = this.#backend.prepare(graph, { rows }, loaded, states);
      try {
        for (const [w, ids] of windows.entries()) {
          signal?.throwIfAborted();
          const of = (all: Numbers) => all.subarray((w * all.length) / windows.length, ((w + 1) * all.length) / windows.length);
          const inputs = {
            ids: Int32Array.from(ids),
            positions: Int32Array.from({ length: rows * model.positionAxes }, (_, i) => i % rows),
            segments: Int32Array.of(0, rows, 0),
            pages: Int32Array.from({ length: pages }, (_, i) => i),
            hidden: of(this.#hidden),
          };
          const outputs = [...graph.outputs].map(([name, t]) => [name, of(values.get(t) as Numbers)]);
          await program.run({ rows, sequences: 1, pages, context: rows }, inputs, Object.fromEntries(outputs));
        }
      } finally {
        program.dispose();
      }
    } finally {
      for (const s of states.values()) s.dispose();
      loaded.dispose();
    }
    return values;
  }
}

/** The products of the layers (`layers.3`) with weights. */
function productsOf({ calls }: Graph, sources: ReadonlyMap<string, Source>): Product[] {
  const makers = new Map(calls.flatMap((call) => call.outputs.map((t) => [t, call])));
  return calls.flatMap(({ op, inputs: [x, weight, order], params, scope }): Product[] => {
    const source = weight?.kind === "weight" ? sources.get(weight.name as string) : undefined;
    const layer = Number(/^layers\.(\d+)$/.exec(scope)?.[1]);
    if (!source || !Number.isInteger(layer)) return [];
    if (op === "linear") return [{ source, layer, x, routed: null }];
    if (op !== "groupedLinear") return [];
    const route = makers.get(makers.get(order)?.inputs[0] as Tensor); // order <- group <- route
    if (route?.op !== "route") throw new Error(`internal: what chose the experts of ${source.name} was not found`);
    return [{ source, layer, x, routed: { experts: route.outputs[1], weights: route.outputs[2], slots: params.slots } }];
  });
}

/** Writes rounded matrices to a file; returns where they are, by parameter. */
async function writeParts(
  path: string,
  products: readonly Product[],
  results: ReadonlyMap<string, Uint8Array>,
): Promise<Map<string, Source>> {
  const file = await open(path, "w");
  try {
    let offset = 0;
    const written = new Map<string, Source>();
    for (const { source, routed } of products) {
      const parts: Slice[] = [];
      for (let i = 0; i < source.parts.length; i++) {
        const bytes = results.get(partName(source.name, i, routed !== null)) as Uint8Array;
        for (let done = 0; done < bytes.byteLength; ) done += (await file.write(bytes, done)).bytesWritten;
        parts.push({ file: path, offset, bytes: bytes.byteLength });
        offset += bytes.byteLength;
      }
      written.set(source.name, { ...source, dtype: "int4", parts });
    }
    return written;
  } finally {
    await file.close();
  }
}
