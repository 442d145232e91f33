/** From a model folder to an engine that is ready to run: opens files, checks them, chooses formats, loads weights. */
import { type Backend, RESIDENCES, type Residence, type State, type WeightSource, type Weights } from "../backend/backend.ts";
import { physicalCores } from "../backend/cores.ts";
import { type Checkpoint, openCheckpoint } from "../checkpoint/checkpoint.ts";
import { CheckpointError } from "../checkpoint/error.ts";
import { checkTiedHead, locate, unusedText } from "../checkpoint/names.ts";
import { Engine, type EngineOptions } from "../engine/engine.ts";
import type { ClassifierConfig, ErnieConfig } from "../model/config.ts";
import { ernie, parameterDtype } from "../model/ernie.ts";
import { configFor } from "../model/fit.ts";
import type { Model, ModelParameter } from "../model/model.ts";
import type { Dtype } from "../tensor/dtype.ts";
import { computedAs, storedBytes } from "../tensor/stored.ts";
import { openBackend } from "./backend.ts";
import { type GenerationDefaults, readDefaults } from "./defaults.ts";

import { KV_CACHE_DTYPES, KV_DTYPES, type KvCacheDtype, kvCacheName } from "./kv.ts";
import { thisMachine, warningsFor } from "./room.ts";

/** Formats of the weight matrices; `auto` uses each in its stored format. Norms, biases and the router are always float32. */
export type WeightDtype = "auto" | "fp32" | "fp16" | "bf16" | "fp8" | "int8" | "int4";

/** Formats by name, including the names that transformers uses. */
const DTYPES: Record<string, "auto" | Exclude<Dtype, "i32" | "int8row">> = {
  auto: "auto",
  fp32: "f32",
  float32: "f32",
  f32: "f32",
  fp16: "f16",
  float16: "f16",
  f16: "f16",
  half: "f16",
  bf16: "bf16",
  bfloat16: "bf16",
  fp8: "fp8",
  float8_e4m3fn: "fp8",
  int8: "int8",
  q8: "int8",
  int4: "int4",
  q4: "int4",
};

export interface LoadOptions {
  /** Default `auto`. `fp8` only on GPUs. */
  readonly dtype?: WeightDtype | (string & {});
  /** Compute threads. Default: one per physical core. */
  readonly threads?: number;
  /**
   * `cpu` is the native CPU backend; `cuda`, or `cuda:1`, an NVIDIA GPU; `reference` the slow TypeScript backend that defines every op. `auto`:
   * the first GPU, if there is one that works and the weights fit its memory, else the CPU, with a warning if a GPU was passed over. Default `auto`.
   */
  readonly device?: "auto" | "cpu" | "cuda" | "reference" | (string & {});
  /** An instruction set by name (`scalar`, `avx2`, ...). Default: the environment variable `MIXTAPE_ISA`, else the best available. */
  readonly isa?: string;
  /** Format of the KV cache: `fp32`, `fp16` or `int8`, or, on a GPU, `bf16` or `fp8`. Default: fp32 for fp32 weights; on a CPU int8 for int8 and int4, else fp16; on a GPU bf16. */
  readonly kv_cache_dtype?: KvCacheDtype;
  /** Capacity of the KV cache in tokens. Default: 16 full sequences, or as many as fit half of the free memory that the weights leave; 85 % of a GPU's. */
  readonly kv_cache_tokens?: number;
  /** Maximum number of prompt tokens per step. Default 512, on a GPU 8192. */
  readonly chunk_size?: number;
  /** Reuse full blocks of the KV cache for prompts with the same prefix. Default true. */
  readonly prefix_cache?: boolean;
  /** Maximum number of requests computed at the same time; others wait. Default 512. */
  readonly max_sequences?: number;
  /** How many adapters may be loaded at the same time. Default 32. */
  readonly max_loras?: number;
  /** The largest rank of an adapter. Memory is taken for the ranks that are loaded, not for this one. Default 256. */
  readonly max_lora_rank?: number;
  /**
   * Where weights are kept that are used in their stored format. `auto` answers from the mapped file at once and moves the weights to
   * huge pages in the background, where memory allows it; `resident` moves them before the model is ready, or rejects; `mapped` leaves them
   * in the file's pages, which several processes share. Default `auto`.
   */
  readonly weights?: Residence;
  /** Called with what may not be as intended: tensors that the model does not use, fields of generation_config.json without effect, weights larger than memory, more threads than cores. Default: a process warning. */
  readonly warning_callback?: (message: string) => void;
}

export interface LoadedModel {
  readonly config: ErnieConfig;
  readonly model: Model;
  readonly checkpoint: Checkpoint;
  /** Of generation_config.json. */
  readonly defaults: GenerationDefaults;
  readonly engine: Engine;
  readonly backend: Backend;
  /** The parameters as loaded, with the formats used in computation. */
  readonly weights: readonly WeightSource[];
  readonly tensors: Weights;
  /** How the engine was made, for another one on the same weights. */
  readonly settings: EngineSettings;
  /** Parameters that are float32 states of the backend. */
  readonly states: ReadonlyMap<string, State>;
  /** The names of those that a Trainer changes, and of stacked ones the experts where not all are. */
  readonly trained: ReadonlySet<string>;
  readonly experts: ReadonlyMap<string, readonly number[]>;
}

export type EngineSettings = Pick<
  EngineOptions,
  "dtypeOf" | "kvDtype" | "kvTokens" | "maxRows" | "prefixCache" | "maxSequences" | "adapters"
>;

export function parseDtype(name: string): (typeof DTYPES)[string] {
  const dtype = Object.hasOwn(DTYPES, name) ? DTYPES[name] : undefined;
  if (!dtype) throw new RangeError(`dtype '${name}' is not known; known are auto, fp32, fp16, bf16, fp8, int8, int4`);
  return dtype;
}

/** A classifier's head from another file than the model's: the tensors of its parameters, by name. */
export interface Head {
  readonly classifier: ClassifierConfig;
  readonly sources: ReadonlyMap<string, Pick<WeightSource, "stored" | "parts" | "shape">>;
  /** The numbers of a head that is yet to be trained, which become states. Default: none. */
  readonly fresh?: (parameter: ModelParameter) => Float32Array | null;
}

/**
 * Throws a one-line error for anything wrong with the folder, the config, a tensor or an option, before anything runs.
 * @param head makes a classifier of a model that predicts tokens
 */
export async function loadModel(folder: string, options: LoadOptions = {}, head: Head | null = null): Promise<LoadedModel> {
  const wanted = parseDtype(options.dtype ?? "auto");
  checkCache(options);
  if (options.weights !== undefined && !RESIDENCES.includes(options.weights))
    throw new RangeError(`weights '${options.weights}' is not known; known are ${RESIDENCES.join(", ")}`);
  const stored = await openCheckpoint(folder);
  const own = configFor(stored);
  const config = head ? { ...own, classifier: head.classifier } : own;
  const checkpoint = config.classifier ? withoutVocabularyHead(stored) : stored;
  const generation = readDefaults(checkpoint.generationConfig ?? {}, config);
  const model = ernie(config);
  const fresh = new Map(model.parameters.flatMap((p) => (head?.fresh?.(p) ? [[p.name, p] as const] : [])));
  const located = locate(
    model.parameters.filter((p) => !head?.sources.has(p.name) && !fresh.has(p.name)),
    checkpoint,
  );
  await checkTiedHead(located, checkpoint);
  const { sources } = located;
  const loadedFrom = model.parameters.filter((p) => !fresh.has(p.name));
  const requested = loadedFrom.map((p): WeightSource => {
    const foreign = head?.sources.get(p.name);
    if (foreign) {
      if (String(foreign.shape) !== String(p.shape))
        throw new CheckpointError(
          foreign.parts[0].file,
          `tensor ${p.name} has the shape [${foreign.shape}], but the base model implies [${p.shape}]; the head belongs to another base`,
        );
      return { name: p.name, ...foreign, dtype: "f32" };
    }
    const found = sources.get(p.name);
    if (!found) throw new Error(`internal: ${p.name} was not located`);
    const dtype =
      wanted === "auto" && p.kind === "matrix" ? computedAs(found.dtype) : parameterDtype(p, wanted === "auto" ? "f32" : wanted);
    return { name: p.name, stored: found.dtype, dtype, shape: p.shape, parts: found.parts };
  });
  const warn = options.warning_callback ?? ((message: string) => process.emitWarning(message));
  const backend = await openBackend(options, requested, warn);
  let tensors: Weights | null = null;
  try {
    const weights = readable(requested, backend, wanted, (message) => warn(`${folder}: ${message}`));
    const unused = unusedText(located);
    if (unused) warn(`${folder}: ${unused}`);
    for (const message of generation.warnings) warn(`${folder}: ${message}`);
    if (!backend.defaults.kvDtypes.includes(KV_DTYPES[options.kv_cache_dtype ?? "fp32"]))
      throw new RangeError(
        `kv_cache_dtype '${options.kv_cache_dtype}': the ${backend.name} backend has no such cache; it has ${backend.defaults.kvDtypes.map(kvCacheName).join(", ")}`,
      );
    if (!backend.name.startsWith("cuda"))
      for (const message of warningsFor(weights, backend.threads, thisMachine(physicalCores()))) warn(message);
    const dtypes = new Map(weights.map((w) => [w.name, w.dtype]));
    tensors = await backend.load(weights, options.weights);
    const settings: EngineSettings = {
      dtypeOf: (name) => dtypes.get(name) as Dtype,
      kvDtype: options.kv_cache_dtype && KV_DTYPES[options.kv_cache_dtype],
      kvTokens: options.kv_cache_tokens,
      maxRows: options.chunk_size,
      prefixCache: options.prefix_cache,
      maxSequences: options.max_sequences,
      adapters: { count: options.max_loras, rank: options.max_lora_rank },
    };
    const states = new Map<string, State>();
    for (const [name, p] of fresh) {
      const state = backend.state("f32", p.shape);
      state.write(head?.fresh?.(p) as Float32Array);
      states.set(name, state);
    }
    const engine = new Engine({ model, backend, weights: tensors, ...settings, states });
    return {
      ...{ config, model, checkpoint, defaults: generation.defaults, engine, backend, weights, tensors, settings },
      ...{ states, trained: new Set<string>(), experts: new Map() },
    };
  } catch (error) {
    tensors?.dispose();
    backend.dispose();
    throw error;
  }
}

/**
 * The weights in formats that the backend has kernels for.
 * @throws RangeError if it has none for the format that was asked for
 */
function readable(
  weights: readonly WeightSource[],
  { name, defaults }: Backend,
  wanted: ReturnType<typeof parseDtype>,
  warn: (message: string) => void,
): readonly WeightSource[] {
  const replaced = weights.map((w): WeightSource => ({ ...w, dtype: defaults.matrixDtype(w.dtype) }));
  const from = weights.find((w, i) => w.dtype !== replaced[i].dtype)?.dtype;
  if (from === undefined) return weights;
  if (wanted === from)
    throw new RangeError(
      `dtype '${from}': the ${name} backend has no kernels for it, GPUs have; a model stored in ${from} is read as ${defaults.matrixDtype(from)} without dtype`,
    );
  const gb = (all: readonly WeightSource[]) => (all.reduce((sum, { dtype, shape }) => sum + storedBytes(dtype, shape), 0) / 1e9).toFixed(2);
  warn(
    `the CPU has no kernels for ${from}; its matrices are converted to ${defaults.matrixDtype(from)}, which holds them exactly, and take ${gb(replaced)} GB of memory instead of ${gb(weights)} GB; models that 'mixtape quantize --dtype int8' writes are used as stored`,
  );
  return replaced;
}

/** A classifier made of a model that predicts tokens has no use for its head over the vocabulary. */
function withoutVocabularyHead(checkpoint: Checkpoint): Checkpoint {
  return { ...checkpoint, tensors: new Map([...checkpoint.tensors].filter(([name]) => !name.startsWith("lm_head."))) };
}

function checkCache({ kv_cache_dtype: dtype = "fp32", kv_cache_tokens = 1, chunk_size = 1 }: LoadOptions): void {
  if (!Object.hasOwn(KV_DTYPES, dtype))
    throw new RangeError(`kv_cache_dtype '${dtype}' is not known; known are ${KV_CACHE_DTYPES.join(", ")}`);
  for (const [name, value] of Object.entries({ kv_cache_tokens, chunk_size }))
    if (!Number.isSafeInteger(value) || value < 1) throw new RangeError(`${name} is ${value}; it must be a whole number of at least 1`);
}
