/** The CPU backend in C++: loads the addon and hands it plans. Knows how the addon is called, not what it computes. */
import { createRequire } from "node:module";
import { bytesOf, DTYPE_CODES, type Plan } from "../graph/plan.ts";
import type { Dtype } from "../tensor/dtype.ts";
import type { SymbolValues } from "../tensor/shape.ts";
import type { StoredFormat } from "../tensor/stored.ts";
import type { Backend, Numbers, Program, Slice, State, WeightSource, Weights } from "./backend.ts";
import { physicalCores } from "./cores.ts";

/** What the addon holds for us; freed by its dispose call or with the last reference. */
type Handle = { readonly __handle: unique symbol };

interface Addon {
  isas(): string[];
  ops(isa: string): string[];
  team(threads: number): Handle;
  load(specs: readonly object[]): Promise<Handle>;
  weightBytes(weights: Handle): { mapped: number; owned: number };
  convert(part: Slice, stored: number, dtype: number, n: number, k: number, to: Uint8Array): Promise<void>;
  random(seed: number, deviation: number, dtype: number, n: number, k: number, to: Uint8Array): Promise<void>;
  memory(bytes: number): Handle;
  prepare(plan: object, isa: string, weights: Handle, states: readonly Handle[]): Handle;
  run(program: Handle, team: Handle, sizes: readonly number[], inputs: readonly Numbers[], outputs: readonly Numbers[]): Promise<void>;
  seconds(program: Handle): number[];
  limits(isa: string, threads: number): Promise<MachineLimits>;
  disposeTeam(team: Handle): void;
  disposeWeights(weights: Handle): void;
  disposeMemory(memory: Handle): void;
  disposeProgram(program: Handle): void;
}

/** Those, and those of formats that only files have; `native/kernels.h` has the same. */
export const STORED_CODES: Readonly<Record<StoredFormat, number>> = { ...DTYPE_CODES, q8_0: 100, q4_0: 101 };

function openAddon(): Addon {
  const path = new URL("../../native/build/mixtape.node", import.meta.url);
  try {
    return createRequire(import.meta.url)(path.pathname) as Addon;
  } catch (error) {
    throw new Error(`the native addon could not be loaded (${(error as Error).message.split("\n")[0]}); build it with 'npm run build'`);
  }
}

/** Names of the instruction sets that this processor can run, best first. */
export function instructionSets(): string[] {
  return openAddon().isas();
}

/** What the machine does at best, of all threads together; an operation is a multiplication or an addition. */
export interface MachineLimits {
  readonly readBytesPerSecond: number;
  readonly int8OpsPerSecond: number;
  readonly floatOpsPerSecond: number;
}

/** Measures, in about a second and off the event loop, what kernels of an instruction set could reach. */
export function machineLimits(isa: string, threads: number): Promise<MachineLimits> {
  return openAddon().limits(isa, threads);
}

export interface NativeOptions {
  /** Threads that compute; default: one a physical core. */
  readonly threads?: number;
  /** An instruction set by name; default: `MIXTAPE_ISA`, else the best there is. */
  readonly isa?: string;
}

/** Throws when the addon is missing, the instruction set unknown or the thread count out of range. */
export function nativeBackend(options: NativeOptions = {}): Backend {
  const addon = openAddon();
  const isa = options.isa ?? process.env.MIXTAPE_ISA ?? "";
  const threads = options.threads ?? physicalCores();
  if (!Number.isInteger(threads) || threads < 1 || threads > 1024)
    throw new RangeError(`threads: ${threads} is not a whole number from 1 to 1024`);
  const known = new Set(addon.ops(isa)); // throws on an unknown instruction set
  const team = addon.team(threads);

  return {
    name: isa || addon.isas()[0],
    threads,

    async load(sources: readonly WeightSource[]): Promise<Weights> {
      const handle = await addon.load(sources.map((s) => ({ ...s, stored: STORED_CODES[s.stored], dtype: DTYPE_CODES[s.dtype] })));
      const { mapped, owned } = addon.weightBytes(handle);
      const weights = {
        names: sources.map((s) => s.name),
        mappedBytes: mapped,
        ownedBytes: owned,
        handle,
        dispose: () => addon.disposeWeights(handle),
      };
      return weights;
    },

    state(dtype, shape): State {
      const bytes = bytesOf({ dtype, shape }, {});
      const handle = addon.memory(bytes);
      const state = { bytes, handle, dispose: () => addon.disposeMemory(handle) };
      return state;
    },

    prepare(plan: Plan, weights: Weights, states: ReadonlyMap<string, State>): Program {
      const missing = plan.ops.find((op) => !known.has(op));
      if (missing) throw new Error(`internal: the ${isa || addon.isas()[0]} backend has no kernel for the op '${missing}'`);
      const handle = addon.prepare(
        { ...plan, weights: plan.weights.map((t) => t.name), capacity: plan.symbols.map((s) => plan.capacity[s]) },
        isa,
        (weights as Weights & { handle: Handle }).handle,
        plan.states.map((t) => (states.get(t.name ?? "") as State & { handle: Handle }).handle),
      );
      return {
        run: (sizes, inputs, outputs) => {
          checkSpans(plan, sizes, inputs, outputs);
          return addon.run(
            handle,
            team,
            plan.symbols.map((s) => sizes[s]),
            inputs,
            outputs,
          );
        },
        seconds: () => addon.seconds(handle),
        dispose: () => addon.disposeProgram(handle),
      };
    },

    dispose: () => addon.disposeTeam(team),
  };
}

/** Converts a stored matrix [n, k] (or vector, n = 1) to another format, off the event loop. `to` must have the exact size. */
export function convertStored(part: Slice, stored: StoredFormat, dtype: StoredFormat, n: number, k: number, to: Uint8Array): Promise<void> {
  return openAddon().convert(part, STORED_CODES[stored], STORED_CODES[dtype], n, k, to);
}

/** Fills a matrix [n, k] with repeatable noise of the given standard deviation, off the event loop. `to` must have the exact size. */
export function randomMatrix(seed: number, deviation: number, dtype: Dtype, n: number, k: number, to: Uint8Array): Promise<void> {
  return openAddon().random(seed, deviation, DTYPE_CODES[dtype], n, k, to);
}

function checkSpans(plan: Plan, sizes: SymbolValues, inputs: readonly Numbers[], outputs: readonly Numbers[]): void {
  const check = (kind: string, tensors: Plan["inputs"], spans: readonly Numbers[]) => {
    if (tensors.length !== spans.length) throw new Error(`internal: ${spans.length} ${kind}s for ${tensors.length}`);
    tensors.forEach((t, i) => {
      const right = t.dtype === "i32" ? spans[i] instanceof Int32Array : spans[i] instanceof Float32Array;
      if (!right || spans[i].byteLength < bytesOf(t, sizes))
        throw new Error(`internal: ${kind} ${i} (${t.name ?? t.id}) does not fit its shape`);
    });
  };
  check("input", plan.inputs, inputs);
  check("output", plan.outputs, outputs);
}
