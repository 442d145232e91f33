/** The CUDA backend: a card's memory and programs, through the addon's library. Knows no kernel. */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { Graph } from "../../graph/graph.ts";
import { bytesOf, DTYPE_CODES, plan } from "../../graph/plan.ts";
import type { SymbolValues } from "../../tensor/shape.ts";
import { type CudaCard, type CudaLimits, openAddon, STORED_CODES } from "../addon.ts";
import type { Backend, Defaults, Program, State, WeightSource, Weights } from "../backend.ts";
import { type Held, heldState, nativePlan, plannedProgram, stateHandles } from "../planned.ts";
import { FEW_ROWS, loweredForCuda } from "./lowering.ts";
import { CASTS } from "./ops.ts";

export type { CudaCard, CudaLimits } from "../addon.ts";

/** What the system has: cards, and why the backend cannot use them. */
export interface CudaSystem {
  readonly cards: readonly CudaCard[];
  /** Versions such as `13.0`; null without a driver. */
  readonly driver: string | null;
  readonly runtime: string | null;
  /** Why no card can be used; empty if one can. */
  readonly refused: string;
}

const LIBRARY = fileURLToPath(new URL("../../../native/build/mixtape_cuda.so", import.meta.url));
/** The oldest driver that the runtime works with. */
const OLDEST_DRIVER = 12040;

const version = (code: number) => `${Math.floor(code / 1000)}.${Math.floor((code % 1000) / 10)}`;

/**
 * Looks for cards. Throws nothing: what is wrong is in `refused`.
 * @param library where the CUDA library is, if it was built
 */
export function cudaSystem(library = LIBRARY): CudaSystem {
  const none = { cards: [], driver: null, runtime: null };
  if (!existsSync(library))
    return { ...none, refused: "mixtape was built without CUDA: install nvcc 12.4 or newer and run 'npm rebuild mixtape'" };
  const addon = openAddon();
  try {
    addon.cudaLibrary(library);
    const { driver, runtime, cards } = addon.cudaCards();
    if (driver === 0) return { ...none, runtime: version(runtime), refused: "there is no NVIDIA driver" };
    const versions = { driver: version(driver), runtime: version(runtime) };
    const major = Math.floor(runtime / 1000);
    if (driver < Math.max(OLDEST_DRIVER, major * 1000))
      return { ...versions, cards, refused: `the driver supports CUDA ${version(driver)}; ${Math.max(major, 12)}.0 or newer is needed` };
    if (cards.length === 0) return { ...versions, cards, refused: "no NVIDIA GPU is visible (see CUDA_VISIBLE_DEVICES)" };
    const usable = cards.some((card) => card.refused === "");
    return { ...versions, cards, refused: usable ? "" : `${cards[0].name}: ${cards[0].refused}` };
  } catch (error) {
    return { ...none, refused: `the CUDA library cannot be used: ${(error as Error).message}` };
  }
}

export interface CudaOptions {
  /** Which of the visible cards. Default 0. */
  readonly card?: number;
  /** Time each call, which costs the captured graphs. Default false. */
  readonly profile?: boolean;
}

/** A backend on one card, with what only cards have. */
export interface CudaBackend extends Backend {
  readonly card: CudaCard;
  limits(): Promise<CudaLimits>;
  /** Times each call from now on, instead of replaying graphs. */
  profile(on: boolean): void;
}

/** Matrix units want thousands of rows; what steps need beside weights and cache is small compared with a card's memory. */
export const CUDA_DEFAULTS: Defaults = {
  rows: 8192,
  cacheShare: 0.85,
  kvDtypes: ["f32", "f16", "bf16", "int8kv", "fp8kv"],
  matrixDtype: (stored) => stored,
  kvDtype: (embedding) => (embedding === "f32" ? "f32" : "bf16"),
};

/** @throws Error if there is no such card, or it cannot be used */
export function cudaBackend({ card: index = 0, profile = false }: CudaOptions = {}): CudaBackend {
  const system = cudaSystem();
  if (system.refused) throw new Error(`device 'cuda': ${system.refused}`);
  const card = system.cards[index];
  if (!card)
    throw new Error(
      `device 'cuda:${index}': there ${system.cards.length === 1 ? "is 1 GPU" : `are ${system.cards.length} GPUs`}, numbered from 0`,
    );
  if (card.refused) throw new Error(`device 'cuda:${index}': ${card.name}: ${card.refused}`);
  const addon = openAddon();
  const device = addon.cudaOpen(index);
  addon.cudaProfile(device, profile);
  const ops = new Set(addon.cudaOps());
  /** A name that ends with the format of its result is the same kernel. */
  const hasKernel = (op: string) =>
    ops.has(op) || Object.values(CASTS).some((ending) => op.endsWith(ending) && ops.has(op.slice(0, -ending.length)));
  /** Traced graphs behind the passes: for few rows and for many. A graph must not grow once it has been prepared. */
  const passed = new WeakMap<Graph, Map<boolean, Graph>>();

  return {
    name: `cuda:${index}`,
    device: `cuda:${index}, ${card.name}`,
    threads: 1,
    trains: false,
    defaults: CUDA_DEFAULTS,
    card,
    memory: () => addon.cudaFree(device),
    limits: () => addon.cudaLimits(device),
    profile: (on) => addon.cudaProfile(device, on),

    async load(sources: readonly WeightSource[]): Promise<Held<Weights>> {
      const coded = sources.map((s) => ({ ...s, stored: STORED_CODES[s.stored], dtype: DTYPE_CODES[s.dtype] }));
      const handle = await addon.cudaLoad(device, coded);
      return {
        names: sources.map((s) => s.name),
        mappedBytes: 0,
        ownedBytes: addon.cudaWeightBytes(handle),
        handle,
        placement: () => ({ state: "resident", movedBytes: 0, mappedBytes: 0, why: "" }),
        settled: Promise.resolve(),
        pages: async () => ({ huge: 0, small: 0 }),
        lost: () => false,
        dispose: () => addon.disposeCudaWeights(handle),
      };
    },

    state(dtype, shape) {
      // Caches are traced as [blocks, tokens, heads, width].
      const [blocks, tokens, heads, width] = shape;
      const laidOut = shape.length === 4 ? [blocks, heads, tokens, width] : shape;
      const handle = addon.cudaMemory(device, DTYPE_CODES[dtype], laidOut);
      return heldState(handle, dtype, bytesOf({ dtype, shape: laidOut }, {}), {
        read: (at, to) => addon.cudaRead(handle, at, to),
        write: (at, from) => addon.cudaWrite(handle, at, from),
        dispose: () => addon.disposeCudaMemory(handle),
      });
    },

    prepare(graph: Graph, capacity: SymbolValues, weights: Weights, states: ReadonlyMap<string, State>): Program {
      const few = (capacity["rows"] ?? 0) <= FEW_ROWS;
      const kinds = passed.get(graph) ?? new Map<boolean, Graph>();
      passed.set(graph, kinds);
      const through = kinds.get(few) ?? loweredForCuda(graph, few ? FEW_ROWS : Number.POSITIVE_INFINITY, (op) => ops.has(op));
      kinds.set(few, through);
      const planned = plan(through, capacity);
      const native = nativePlan(planned, capacity, "cuda", hasKernel);
      const handle = addon.cudaPrepare(device, native, (weights as Held<Weights>).handle, stateHandles(planned, states));
      return plannedProgram(planned, {
        run: (...step) => addon.cudaRun(device, handle, ...step),
        seconds: () => addon.seconds(handle),
        dispose: () => addon.disposeProgram(handle),
      });
    },

    dispose: () => addon.disposeCuda(device),
  };
}
