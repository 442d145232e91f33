/**
 * The process that `mixtape bench` measures: holds one model and answers one request at a time. It is a separate process so that
 * its memory is only the model's, and so that two of them can take turns. Started by `subject.ts`.
 */
import { readFileSync } from "node:fs";
import { kvCacheName } from "../api/kv.ts";
import { type LoadedModel, type LoadOptions, loadModel } from "../api/load.ts";
import type { Backend, Placement } from "../backend/backend.ts";
import type { CudaBackend } from "../backend/cuda/cuda.ts";
import type { MachineLimits } from "../backend/native.ts";
import { BLOCK_TOKENS } from "../engine/blocks.ts";
import { GREEDY } from "../engine/sampling.ts";
import { oneLine } from "./failure.ts";
import { bytesRead, type Operations, operations, type Work, workOf } from "./work.ts";

/** A seed determines the prompt's token ids: the same for every model with the same vocabulary. */
export type Request =
  | { readonly kind: "load"; readonly folder: string; readonly options: LoadOptions }
  | { readonly kind: "prompt"; readonly tokens: number; readonly seed: number }
  | { readonly kind: "generate"; readonly context: number; readonly newTokens: number; readonly seed: number }
  | {
      readonly kind: "profile";
      readonly of: "prompt" | "generation";
      readonly tokens: number;
      readonly newTokens: number;
      readonly seed: number;
    }
  | { readonly kind: "limits" }
  | { readonly kind: "memory" };

export interface Loaded {
  readonly isa: string;
  readonly threads: number;
  /** Format of most of the weights' bytes. */
  readonly dtype: string;
  readonly kvCacheDtype: string;
  readonly longest: number;
  readonly work: Work;
  /** Time from the load call until the model is ready, and until it has answered a short prompt. */
  readonly readySeconds: number;
  readonly firstTokenSeconds: number;
}

/** Resident memory in bytes: the peak, and its current parts. */
export interface MemoryUse {
  readonly peakBytes: number;
  readonly privateBytes: number | null;
  /** File-backed pages, which the system can drop and share. */
  readonly mappedBytes: number | null;
  /** Where the weights are. */
  readonly weights: Placement["state"];
  /** Memory behind the weights on huge pages; 0 where the system does not tell. */
  readonly hugeBytes: number;
}

export interface OpTime {
  readonly op: string;
  readonly seconds: number;
  /** Of weights. */
  readonly bytes: number;
  readonly operations: Operations;
}

export interface Profile {
  readonly ops: readonly OpTime[];
  /** Wall time from submission to the last token. */
  readonly seconds: number;
}

export type Reply = { readonly value: unknown } | { readonly error: string };

const FIRST_PROMPT = 16;
let model: LoadedModel | null = null;

process.on("message", (request: Request) => {
  answer(request).then(
    (value) => process.send?.({ value } satisfies Reply),
    (error: unknown) => process.send?.({ error: oneLine(error) } satisfies Reply),
  );
});
process.on("SIGINT", () => {}); // from the terminal, meant for the command, which ends this process
process.on("disconnect", () => process.kill(process.pid, "SIGKILL")); // a running step would delay a normal exit

async function answer(request: Request): Promise<unknown> {
  switch (request.kind) {
    case "load":
      return load(request);
    case "prompt":
      return (await run(request.tokens, 1, request.seed)).first;
    case "generate": {
      const { first, last } = await run(request.context, request.newTokens + 1, request.seed);
      return last - first;
    }
    case "profile":
      return profile(request);
    case "limits":
      return limits();
    case "memory":
      return { ...memory(), ...(await pages()) };
    default:
      return request satisfies never;
  }
}

async function load({ folder, options }: Extract<Request, { kind: "load" }>): Promise<Loaded> {
  const start = performance.now();
  model = await loadModel(folder, {
    ...options,
    prefix_cache: false, // a repeated prompt must cost as much as a new one
    warning_callback: (message) => process.stderr.write(`mixtape: ${message}\n`),
  });
  const readySeconds = (performance.now() - start) / 1000;
  const { config, engine, backend, weights } = model;
  await run(Math.min(FIRST_PROMPT, config.maxPositions - 1), 1, 0);
  const firstTokenSeconds = (performance.now() - start) / 1000;
  const byDtype = new Map<string, number>();
  for (const w of weights) byDtype.set(w.dtype, (byDtype.get(w.dtype) ?? 0) + bytesRead(w, { ...config, moe: null }, 1));
  const [[most]] = [...byDtype].sort((a, b) => b[1] - a[1]);
  return {
    isa: backend.name,
    threads: backend.threads,
    dtype: most,
    kvCacheDtype: kvCacheName(engine.kvDtype),
    longest: Math.min(config.maxPositions, engine.cache.count * BLOCK_TOKENS),
    work: workOf(config, weights),
    readySeconds,
    firstTokenSeconds,
  };
}

/** Seconds until the first and the last new token. Greedy, without end tokens. */
async function run(tokens: number, newTokens: number, seed: number): Promise<{ first: number; last: number }> {
  const { engine, config } = loaded();
  const ids = madeUp(tokens, config.vocabSize, seed);
  const start = performance.now();
  let first = 0;
  let count = 0;
  for await (const _ of engine.submit({ tokens: ids, sampling: GREEDY, maxNewTokens: newTokens }))
    if (count++ === 0) first = (performance.now() - start) / 1000;
  if (count !== newTokens) throw new Error(`internal: ${count} of ${newTokens} tokens arrived`);
  return { first, last: (performance.now() - start) / 1000 };
}

/** Time by op of one prompt, or of the steps after one. */
async function profile({ of, tokens, newTokens, seed }: Extract<Request, { kind: "profile" }>): Promise<Profile> {
  const { engine, backend, config, weights } = loaded();
  const rows = of === "generation" ? 1 : undefined;
  const before = engine.profile(rows);
  if (isCuda(backend)) backend.profile(true);
  const { first, last } = await run(tokens, of === "generation" ? newTokens + 1 : 1, seed);
  if (isCuda(backend)) backend.profile(false);
  const readers = engine.weightsByOp();
  const ops = [...engine.profile(rows)].map(([op, { seconds }]): OpTime => {
    const read = op === "embed" ? [] : weights.filter((w) => readers.get(op)?.has(w.name));
    const heads = read.filter(({ name }) => name === "lm_head.weight" || name === "model.embed_tokens.weight");
    const others = read.filter((w) => !heads.includes(w));
    // A prompt runs in several steps, each of which reads the weights.
    const bytes =
      of === "generation"
        ? newTokens * sum(read.map((w) => bytesRead(w, config, 1)))
        : sum(stepsOf(tokens).flatMap((r) => read.map((w) => bytesRead(w, config, r))));
    const [each, once] = [operations(others, config), operations(heads, config)];
    const times = of === "generation" ? [newTokens, newTokens] : [tokens, stepsOf(tokens).length];
    const total = (key: keyof Operations) => each[key] * times[0] + once[key] * times[1];
    return {
      op,
      seconds: seconds - (before.get(op)?.seconds ?? 0),
      bytes,
      operations: { int8: total("int8"), float: total("float") },
    };
  });
  return { ops, seconds: of === "generation" ? last - first : first };
}

/** The card's limits. Matrices in any narrow format meet activations in bfloat16 there. */
async function limits(): Promise<MachineLimits> {
  const { readBytesPerSecond, bf16FlopsPerSecond } = await card().limits();
  return { readBytesPerSecond, int8OpsPerSecond: bf16FlopsPerSecond, floatOpsPerSecond: bf16FlopsPerSecond };
}

function isCuda(backend: Backend): backend is CudaBackend {
  return backend.name.startsWith("cuda");
}

function card(): CudaBackend {
  const { backend } = loaded();
  if (!isCuda(backend)) throw new Error("internal: the limits of a CPU are measured elsewhere");
  return backend;
}

function stepsOf(tokens: number): number[] {
  const { rows } = loaded().backend.defaults;
  return Array.from({ length: Math.ceil(tokens / rows) }, (_, i) => Math.min(rows, tokens - i * rows));
}

async function pages(): Promise<Pick<MemoryUse, "weights" | "hugeBytes">> {
  const { engine } = loaded();
  return { weights: engine.placement().state, hugeBytes: (await engine.pages()).huge };
}

function memory(): Omit<MemoryUse, "weights" | "hugeBytes"> {
  try {
    const status = readFileSync("/proc/self/status", "utf8");
    const bytes = (name: string) => Number(new RegExp(`^${name}:\\s*(\\d+) kB`, "m").exec(status)?.[1] ?? Number.NaN) * 1024;
    return { peakBytes: bytes("VmHWM"), privateBytes: bytes("RssAnon"), mappedBytes: bytes("RssFile") };
  } catch {
    // Not Linux: the parts are unknown.
    return { peakBytes: process.resourceUsage().maxRSS * 1024, privateBytes: null, mappedBytes: null };
  }
}

function loaded(): LoadedModel {
  if (!model) throw new Error("internal: no model is loaded");
  return model;
}

/** Random token ids (a linear congruential generator); the same seed gives the same ones. */
function madeUp(count: number, vocabSize: number, seed: number): number[] {
  let state = BigInt.asUintN(64, BigInt(seed) * 2n + 1n);
  return Array.from({ length: count }, () => {
    state = (state * 6364136223846793005n + 1442695040888963407n) & 0xffffffffffffffffn;
    return Number((state >> 33n) % BigInt(vocabSize));
  });
}

function sum(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0);
}
