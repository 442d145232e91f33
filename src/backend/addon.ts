/** The native addon: its interface, its location, and whether it matches this version. Knows nothing of graphs or backends. */
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { SAMPLING_FLOATS, SAMPLING_INTS } from "../graph/ops/sampling.ts";
import { ARENA_UNIT, DTYPE_CODES, PLACES, VALUE_WORDS } from "../graph/plan.ts";
import type { StoredFormat } from "../tensor/stored.ts";
import { BLOCK_TOKENS, type Numbers, type Slice } from "./backend.ts";

/** An object owned by the addon; freed by its dispose call or with its last reference. */
export type Handle = { readonly __handle: unique symbol };

/** The constants that both sides must agree on. */
export interface Description {
  /** Words per value record, bytes per workspace unit, tokens per KV cache block. */
  readonly valueWords: number;
  readonly arenaUnit: number;
  readonly blockTokens: number;
  readonly dtypes: Readonly<Record<string, number>>;
  readonly places: Readonly<Record<string, number>>;
  /** Columns of the sampling controls, in order. */
  readonly samplingFloats: readonly string[];
  readonly samplingInts: readonly string[];
}

/** The machine's peak rates, over all threads together; an operation is a multiplication or an addition. */
export interface MachineLimits {
  readonly readBytesPerSecond: number;
  readonly int8OpsPerSecond: number;
  readonly floatOpsPerSecond: number;
}

/** A plan as the addon takes it: names instead of tensors. */
export interface NativePlan {
  readonly ops: readonly string[];
  readonly weights: readonly string[];
  readonly values: Int32Array;
  readonly calls: Int32Array;
  readonly params: Float64Array;
  readonly capacity: readonly number[];
  readonly arenaBytes: number;
}

export interface Addon {
  isas(): string[];
  ops(isa: string): string[];
  describe(): Description;
  open(isa: string, threads: number): Handle;
  load(specs: readonly object[]): Promise<Handle>;
  weightBytes(weights: Handle): { mapped: number; owned: number };
  weightsLost(weights: Handle): boolean;
  /** Starts threads that move mapped weights to huge pages; `quietly`: at low priority. */
  moveWeights(weights: Handle, threads: number, quietly: boolean, dropCached: boolean): void;
  stopMoving(weights: Handle, why: string): void;
  movedWeights(weights: Handle): { bytes: number; moved: number; kept: number; moving: boolean; why: string };
  weightPages(weights: Handle): Promise<{ huge: number; small: number }>;
  convert(part: Slice, stored: number, dtype: number, n: number, k: number, to: Uint8Array, name: string): Promise<void>;
  checkFinite(part: Slice, stored: number, n: number, k: number, name: string): Promise<void>;
  random(seed: number, deviation: number, dtype: number, n: number, k: number, to: Uint8Array): Promise<void>;
  round(
    parts: readonly object[],
    k: number,
    x: Float32Array,
    rows: Int32Array,
    shares: Float32Array,
    common: Float32Array | null,
  ): Promise<void>;
  moments(x: Float32Array, k: number, weight: number, to: Float32Array): Promise<void>;
  limits(isa: string, threads: number, memory: number): Promise<MachineLimits>;
  memory(bytes: number): Handle;
  readMemory(memory: Handle, byteOffset: number, to: Uint8Array): void;
  writeMemory(memory: Handle, byteOffset: number, from: Uint8Array): void;
  prepare(device: Handle, plan: NativePlan, weights: Handle, states: readonly Handle[]): Handle;
  /** Runs the calls at these positions. An input or output that none of them touches may be null. */
  run(
    device: Handle,
    program: Handle,
    sizes: readonly number[],
    inputs: readonly (Numbers | null)[],
    outputs: readonly (Numbers | null)[],
    calls: Int32Array,
  ): Promise<void>;
  seconds(program: Handle): number[];
  disposeDevice(device: Handle): void;
  disposeWeights(weights: Handle): void;
  disposeMemory(memory: Handle): void;
  disposeProgram(program: Handle): void;

  /** Opens the CUDA library. @throws Error with the loader's message, or if it is of another version */
  cudaLibrary(path: string): void;
  cudaOps(): string[];
  cudaCards(): { driver: number; runtime: number; cards: readonly CudaCard[] };
  cudaOpen(index: number): Handle;
  cudaFree(device: Handle): { free: number; total: number };
  /** Time each call instead of replaying graphs. */
  cudaProfile(device: Handle, on: boolean): void;
  cudaLimits(device: Handle): Promise<CudaLimits>;
  cudaLoad(device: Handle, specs: readonly object[]): Promise<Handle>;
  /** Bytes copied so far by the running `cudaLoad`. */
  cudaLoaded(device: Handle): number;
  cudaWeightBytes(weights: Handle): number;
  cudaMemory(device: Handle, dtype: number, shape: readonly number[]): Handle;
  cudaRead(memory: Handle, byteOffset: number, to: Uint8Array): void;
  cudaWrite(memory: Handle, byteOffset: number, from: Uint8Array): void;
  cudaPrepare(device: Handle, plan: NativePlan, weights: Handle, states: readonly Handle[]): Handle;
  cudaRun: Addon["run"];
  disposeCuda(device: Handle): void;
  disposeCudaWeights(weights: Handle): void;
  disposeCudaMemory(memory: Handle): void;
}

/** A card as the CUDA library sees it. */
export interface CudaCard {
  readonly name: string;
  /** Compute capability. */
  readonly major: number;
  readonly minor: number;
  readonly multiprocessors: number;
  /** Bytes of memory. */
  readonly total: number;
  readonly free: number;
  /** Why the backend cannot use it; empty if it can. */
  readonly refused: string;
}

/** A card's peak rates; copying counts bytes read and written. */
export interface CudaLimits {
  readonly copyBytesPerSecond: number;
  readonly readBytesPerSecond: number;
  readonly bf16FlopsPerSecond: number;
  readonly fp8FlopsPerSecond: number;
}

/** Codes of dtypes, and of formats that occur only in files. */
export const STORED_CODES: Readonly<Record<StoredFormat, number>> = { ...DTYPE_CODES, q8_0: 100, q4_0: 101 };

/** The description that this version expects. */
export const DESCRIPTION: Description = {
  valueWords: VALUE_WORDS,
  arenaUnit: ARENA_UNIT,
  blockTokens: BLOCK_TOKENS,
  dtypes: STORED_CODES,
  places: PLACES,
  samplingFloats: SAMPLING_FLOATS,
  samplingInts: SAMPLING_INTS,
};

/** Differences between an addon and this version, one phrase each. */
export function differences(theirs: Description, ours: Description = DESCRIPTION): string[] {
  const found: string[] = [];
  const number = (label: string, a: number, b: number) => {
    if (a !== b) found.push(`${label}: ${a}, expected ${b}`);
  };
  number("words of a value record", theirs.valueWords, ours.valueWords);
  number("bytes of a workspace unit", theirs.arenaUnit, ours.arenaUnit);
  number("tokens of a KV block", theirs.blockTokens, ours.blockTokens);
  const codes = (kind: string, a: Readonly<Record<string, number>>, b: Readonly<Record<string, number>>) => {
    for (const name of Object.keys(b)) {
      if (a[name] === undefined) found.push(`no ${kind} '${name}'`);
      else number(`${kind} '${name}'`, a[name], b[name]);
    }
    for (const name of Object.keys(a)) if (b[name] === undefined) found.push(`an unknown ${kind} '${name}'`);
  };
  codes("dtype", theirs.dtypes, ours.dtypes);
  codes("place", theirs.places, ours.places);
  const columns = (kind: string, a: readonly string[], b: readonly string[]) => {
    if (a.join() !== b.join()) found.push(`${kind} sampling columns are ${a.join(", ")}; expected ${b.join(", ")}`);
  };
  columns("float", theirs.samplingFloats, ours.samplingFloats);
  columns("integer", theirs.samplingInts, ours.samplingInts);
  return found;
}

/**
 * The addon at `path`, if it matches this version.
 * @throws Error that says what is wrong with the file and how to rebuild it
 */
export function loadAddon(path: string): Addon {
  const rebuild = /[\\/]node_modules[\\/]/.test(path) ? "'npm rebuild mixtape'" : "'npm run build'";
  let addon: Partial<Addon>;
  try {
    addon = createRequire(import.meta.url)(path) as Partial<Addon>;
  } catch (error) {
    throw new Error(`cannot load the native addon (${(error as Error).message.split("\n")[0]}); build it with ${rebuild}`);
  }
  if (typeof addon.describe !== "function")
    throw new Error(`the native addon ${path} is older than this version of mixtape; rebuild it with ${rebuild}`);
  const found = differences(addon.describe());
  if (found.length > 0)
    throw new Error(`the native addon ${path} does not match this version of mixtape: ${found.join("; ")}; rebuild it with ${rebuild}`);
  return addon as Addon;
}

let loaded: Addon | undefined;

/** The addon built with this package. */
export function openAddon(): Addon {
  loaded ??= loadAddon(fileURLToPath(new URL("../../native/build/mixtape.node", import.meta.url)));
  return loaded;
}
