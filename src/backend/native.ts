/** The CPU backend in C++: runs the CPU's passes on a graph and passes the plan to the addon. Knows no kernel. */
import { realpathSync } from "node:fs";
import type { Graph } from "../graph/graph.ts";
import { bytesOf, DTYPE_CODES, plan } from "../graph/plan.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { GROUP } from "../tensor/quantized.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { StoredFormat } from "../tensor/stored.ts";
import { type MachineLimits, openAddon, STORED_CODES } from "./addon.ts";
import type { Backend, Program, Residence, Slice, State, WeightSource, Weights } from "./backend.ts";
import { physicalCores } from "./cores.ts";
import { CPU_DEFAULTS, lowered } from "./cpu.ts";
import { hostMemory } from "./memory.ts";
import { type Held, heldState, nativePlan, plannedProgram, stateHandles } from "./planned.ts";
import { settle } from "./residence.ts";

export type { MachineLimits } from "./addon.ts";

/** Names of the instruction sets that this processor supports, best first. */
export function instructionSets(): string[] {
  return openAddon().isas();
}

/** Measures the best speed that an instruction set's kernels could reach. Takes about a second, off the event loop. */
export function machineLimits(isa: string, threads: number): Promise<MachineLimits> {
  return openAddon().limits(isa, threads, Math.floor(hostMemory().free / 4)); // a model may fill the memory already
}

export interface NativeOptions {
  /** Number of compute threads; default: one per physical core. */
  readonly threads?: number;
  /** Name of an instruction set; default: `MIXTAPE_ISA`, else the best available. */
  readonly isa?: string;
}

/** Throws if the addon is missing or of another version, the instruction set is not available, or the thread count is out of range. */
export function nativeBackend(options: NativeOptions = {}): Backend {
  const addon = openAddon();
  const isa = options.isa ?? process.env.MIXTAPE_ISA ?? "";
  const threads = options.threads ?? physicalCores();
  if (!Number.isInteger(threads) || threads < 1 || threads > 1024)
    throw new RangeError(`threads: ${threads} is not a whole number from 1 to 1024`);
  const kernels = new Set(addon.ops(isa)); // throws on an unknown instruction set
  const name = isa || addon.isas()[0];
  const device = addon.open(isa, threads);
  /** Traced graphs behind the passes that no capacity changes. A graph must not grow once it has been prepared. */
  const passed = new WeakMap<Graph, Graph>();

  return {
    name,
    device: `${name}, ${threads} thread${threads === 1 ? "" : "s"}`,
    threads,
    trains: true,
    defaults: CPU_DEFAULTS,
    memory: hostMemory,

    async load(sources: readonly WeightSource[], residence: Residence = "auto"): Promise<Held<Weights>> {
      const handle = await addon.load(sources.map((s) => ({ ...s, stored: STORED_CODES[s.stored], dtype: DTYPE_CODES[s.dtype] })));
      const { mapped, owned } = addon.weightBytes(handle);
      let settled: Awaited<ReturnType<typeof settle>>;
      try {
        settled = await settle(addon, handle, residence, hostMemory, threads, realPaths(sources));
      } catch (error) {
        addon.disposeWeights(handle);
        throw error;
      }
      return {
        names: sources.map((s) => s.name),
        mappedBytes: mapped,
        ownedBytes: owned,
        handle,
        placement: settled.placement,
        settled: settled.settled,
        pages: () => addon.weightPages(handle),
        lost: () => addon.weightsLost(handle),
        dispose() {
          settled.unwatch();
          addon.disposeWeights(handle);
        },
      };
    },

    state(dtype, shape) {
      const bytes = bytesOf({ dtype, shape }, {});
      const handle = addon.memory(bytes);
      return heldState(handle, dtype, bytes, {
        read: (at, to) => addon.readMemory(handle, at, to),
        write: (at, from) => addon.writeMemory(handle, at, from),
        dispose: () => addon.disposeMemory(handle),
      });
    },

    prepare(graph: Graph, capacity: SymbolValues, weights: Weights, states: ReadonlyMap<string, State>): Program {
      const through = passed.get(graph) ?? lowered(graph, (op) => kernels.has(op));
      passed.set(graph, through);
      const planned = plan(through, capacity);
      const native = nativePlan(planned, capacity, name, (op) => kernels.has(op));
      const handle = addon.prepare(device, native, (weights as Held<Weights>).handle, stateHandles(planned, states));
      return plannedProgram(planned, {
        run: (...step) => addon.run(device, handle, ...step),
        seconds: () => addon.seconds(handle),
        dispose: () => addon.disposeProgram(handle),
      });
    },

    dispose: () => addon.disposeDevice(device),
  };
}

/**
 * Converts a stored matrix [n, k] (or vector, n = 1) to another format, off the event loop. `to` must have the exact size. Rejects,
 * naming the file and `name`, if a number is not finite or too large for the format.
 */
export function convertStored(
  part: Slice,
  stored: StoredFormat,
  dtype: StoredFormat,
  n: number,
  k: number,
  to: Uint8Array,
  name = "without a name",
): Promise<void> {
  return openAddon().convert(part, STORED_CODES[stored], STORED_CODES[dtype], n, k, to, name);
}

/** Reads a stored matrix, off the event loop. Rejects, naming the file and `name`, if a number is not finite. */
export function checkFinite(part: Slice, stored: StoredFormat, n: number, k: number, name: string): Promise<void> {
  return openAddon().checkFinite(part, STORED_CODES[stored], n, k, name);
}

/** Fills a matrix [n, k] with repeatable noise of the given standard deviation, off the event loop. `to` must have the exact size. */
export function randomMatrix(seed: number, deviation: number, dtype: Dtype, n: number, k: number, to: Uint8Array): Promise<void> {
  return openAddon().random(seed, deviation, DTYPE_CODES[dtype], n, k, to);
}

/** The files of all sources, links resolved. */
function realPaths(sources: readonly WeightSource[]): string[] {
  return [...new Set(sources.flatMap(({ parts }) => parts.map((part) => part.file)))].map((file) => realpathSync(file));
}

/** A stored matrix of n rows to be rounded to int4, and where to. */
export interface RoundedPart extends Slice {
  readonly name: string;
  readonly stored: StoredFormat;
  readonly n: number;
  /** Of the exact size. */
  readonly to: Uint8Array;
}

/** What matrices of k columns see. */
export interface Seen {
  /** [.., k] */
  readonly x: Float32Array;
  readonly k: number;
  /** The rows of x that these matrices see. */
  readonly rows: Int32Array;
  /** What to multiply each of them by; empty: 1. */
  readonly shares: Float32Array;
  /** From `inputMoments`: what stands in where there are few rows. */
  readonly common: Float32Array | null;
}

/**
 * Rounds stored matrices that all see the same inputs to int4, off the event loop: of the scales and values, those that change their
 * products with these inputs least (native/rounding.h). Rejects, naming the file and the tensor, if a number is not finite.
 */
export async function roundStored(parts: readonly RoundedPart[], { x, k, rows, shares, common }: Seen): Promise<void> {
  const coded = parts.map((p) => ({ ...p, stored: STORED_CODES[p.stored] }));
  return openAddon().round(coded, k, x, rows, shares, common);
}

/** The sums of products of the columns of x [.., k], times `weight`, for `roundStored`. */
export async function inputMoments(x: Float32Array, k: number, weight: number): Promise<Float32Array> {
  const padded = Math.ceil(k / GROUP) * GROUP;
  const to = new Float32Array(padded * padded);
  await openAddon().moments(x, k, weight, to);
  return to;
}
