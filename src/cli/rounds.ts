/**
 * The order in which `mixtape bench` measures: everything once per round, models in turns, and in each round also the machine's
 * limits, so that a temporary slowdown of the machine affects all alike. Every prompt is new, warm-up included; within a round
 * all models get the same ones. The models have no prefix cache.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { instructionSets, type MachineLimits, machineLimits } from "../backend/native.ts";
import { UsageError } from "./failure.ts";
import type { Loaded, MemoryUse, Profile } from "./probe.ts";
import { type Spread, spread } from "./spread.ts";
import { type Setting, Subject } from "./subject.ts";
import { generationLimit, promptLimit } from "./work.ts";

export interface Schedule {
  readonly promptLengths: readonly number[];
  /** Context lengths at which generation is timed. */
  readonly contexts: readonly number[];
  readonly newTokens: number;
  readonly repeat: number;
  readonly profile: boolean;
}

/** The measurements of one model, in the form that --json prints. */
export interface Measured {
  readonly model: string;
  readonly folder: string;
  readonly dtype: string;
  readonly kv_cache_dtype: string;
  readonly isa: string;
  readonly threads: number;
  readonly parameters: { readonly total: number; readonly active: number };
  readonly weight_bytes: number;
  readonly weight_bytes_per_token: number;
  readonly limits: {
    readonly read_bytes_per_second: Spread;
    readonly int8_ops_per_second: Spread;
    readonly float_ops_per_second: Spread;
  };
  readonly load: { readonly ready_seconds: Spread; readonly first_token_seconds: Spread };
  readonly memory: {
    readonly peak_bytes: number;
    readonly private_bytes: number | null;
    readonly mapped_bytes: number | null;
    /** Where the weights were: `mapped` or `resident`. */
    readonly weights: MemoryUse["weights"];
    /** Memory behind the weights on huge pages. */
    readonly huge_page_bytes: number;
  };
  readonly prompt: readonly Rate[];
  readonly generation: readonly (Rate & { readonly new_tokens: number })[];
  readonly profile?: readonly ProfiledPhase[];
}

/** Tokens per second for prompts of `tokens`, or for generation after `tokens`. */
export interface Rate {
  readonly tokens: number;
  readonly tokens_per_second: Spread;
  /** Tokens per second at the machine's limit. */
  readonly limit_tokens_per_second: number;
  readonly share: number;
}

export interface ProfiledPhase {
  readonly phase: "prompt" | "generation";
  readonly tokens: number;
  readonly seconds: number;
  /** Longest first. */
  readonly ops: readonly ProfiledOp[];
}

export interface ProfiledOp {
  readonly op: string;
  readonly seconds: number;
  /** Of the phase's time. */
  readonly share: number;
  /** Speed of reading weights; null for ops that read none. */
  readonly bytes_per_second: number | null;
  readonly ops_per_second: number | null;
  /** The time the machine needs at least to read these weights or do these operations, whichever is longer, as a share of `seconds`. */
  readonly limit_share: number | null;
}

const LOADS = 3;
const WARM_UPS = 8;
/** How often weights that move to huge pages are asked how far they are. */
const MOVING_MS = 200;

/** Measures settings in turns: A B A B. Throws when a model cannot be loaded or has no room for the lengths. */
export async function measureInTurns(
  settings: readonly Setting[],
  wanted: Schedule,
  signal: AbortSignal,
  { onStep, onCut }: { onStep: (what: string) => void; onCut: (message: string) => void },
): Promise<Measured[]> {
  const subjects: Subject[] = [];
  try {
    const loads = settings.map((): Loaded[] => []);
    const times = Math.min(wanted.repeat, LOADS);
    for (let round = 1; round <= times; round++) {
      for (const [s, setting] of settings.entries()) {
        onStep(`loading ${setting.model}, ${round} of ${times}`);
        subjects[s] = await Subject.start(setting, signal);
        loads[s].push(subjects[s].loaded);
        if (round < times) subjects[s].stop();
      }
    }
    const schedule = cut(wanted, Math.min(...subjects.map((s) => s.loaded.longest)), onCut);
    const runs = subjects.map((subject, s) => new Run(settings[s], subject, loads[s]));
    onStep("warming up");
    const seed = seeds();
    for (const { subject } of runs) await warmUp(subject, schedule, seed);
    for (let round = 1; round <= wanted.repeat; round++)
      await measureRound(runs, schedule, seed, (what) => onStep(`round ${round} of ${wanted.repeat}: ${what}`));
    const all: Measured[] = [];
    for (const run of runs) {
      const memory = await run.subject.ask({ kind: "memory" });
      onStep("profile");
      all.push(run.result(schedule, memory, schedule.profile ? await profile(run, schedule, seed) : undefined));
    }
    return all;
  } finally {
    for (const subject of subjects) subject?.stop();
  }
}

/** Seeds, each for a new prompt. 0 is the one used for loading. */
function seeds(): () => number {
  let last = 0;
  return () => ++last;
}

/** Prepares programs, and processes prompts until hardly any page of the weights is new to the process, and none moves to huge pages. */
async function warmUp(subject: Subject, { promptLengths, contexts }: Schedule, seed: () => number): Promise<void> {
  for (const tokens of promptLengths) await subject.ask({ kind: "prompt", tokens, seed: seed() });
  await subject.ask({ kind: "generate", context: contexts[0], newTokens: 1, seed: seed() });
  while ((await subject.ask({ kind: "memory" })).weights === "moving") await sleep(MOVING_MS);
  let mapped = (await subject.ask({ kind: "memory" })).mappedBytes;
  for (let i = 1; mapped !== null && i <= WARM_UPS; i++) {
    await subject.ask({ kind: "prompt", tokens: Math.max(...promptLengths), seed: seed() });
    const now = (await subject.ask({ kind: "memory" })).mappedBytes ?? 0;
    if (now < mapped * 1.003) return;
    mapped = now;
  }
}

/** The lengths, cut to what the models' positions allow. */
function cut(schedule: Schedule, longest: number, onCut: (message: string) => void): Schedule {
  const { newTokens, promptLengths, contexts } = schedule;
  const [prompt, context] = [longest - 1, longest - 1 - newTokens];
  if (context < 1) throw new UsageError(`--new-tokens ${newTokens} does not fit: the longest sequence is ${longest} tokens`);
  const within = (name: string, lengths: readonly number[], most: number) => {
    const over = lengths.filter((n) => n > most);
    if (over.length) onCut(`${name} of ${over.join(", ")} cut to ${most}: the longest sequence is ${longest} tokens`);
    return [...new Set(lengths.map((n) => Math.min(n, most)))];
  };
  return { ...schedule, promptLengths: within("prompts", promptLengths, prompt), contexts: within("contexts", contexts, context) };
}

async function measureRound(
  runs: readonly Run[],
  schedule: Schedule,
  nextSeed: () => number,
  onStep: (what: string) => void,
): Promise<void> {
  const measured = new Map<string, MachineLimits>(); // runs with the same threads share them
  for (const run of runs) {
    const { isa, threads } = run.subject.loaded;
    onStep("the machine's limits");
    const key = `${isa} ${threads}`;
    const found =
      measured.get(key) ??
      (isa.startsWith("cuda")
        ? await run.subject.ask({ kind: "limits" })
        : await machineLimits(instructionSets().includes(isa) ? isa : "", threads));
    measured.set(key, found);
    run.limits.push(found);
  }
  for (const tokens of schedule.promptLengths) {
    onStep(`prompt of ${tokens}`);
    const seed = nextSeed();
    for (const run of runs) run.add("prompt", tokens, tokens / (await run.subject.ask({ kind: "prompt", tokens, seed })));
  }
  const { newTokens } = schedule;
  for (const context of schedule.contexts) {
    onStep(`generation after ${context}`);
    const seed = nextSeed();
    for (const run of runs)
      run.add("generation", context, newTokens / (await run.subject.ask({ kind: "generate", context, newTokens, seed })));
  }
}

/** Collects the measurements of one subject. */
class Run {
  readonly subject: Subject;
  readonly limits: MachineLimits[] = [];
  readonly #setting: Setting;
  readonly #loads: readonly Loaded[];
  readonly #rates = new Map<string, number[]>();

  constructor(setting: Setting, subject: Subject, loads: readonly Loaded[]) {
    this.#setting = setting;
    this.subject = subject;
    this.#loads = loads;
  }

  add(phase: "prompt" | "generation", tokens: number, tokensPerSecond: number): void {
    const key = `${phase} ${tokens}`;
    this.#rates.set(key, [...(this.#rates.get(key) ?? []), tokensPerSecond]);
  }

  result({ promptLengths, contexts, newTokens }: Schedule, memory: MemoryUse, profile: Measured["profile"]): Measured {
    const { isa, threads, dtype, kvCacheDtype, work } = this.subject.loaded;
    const limit = (key: keyof MachineLimits) => spread(this.limits.map((l) => l[key]));
    const limits = {
      read_bytes_per_second: limit("readBytesPerSecond"),
      int8_ops_per_second: limit("int8OpsPerSecond"),
      float_ops_per_second: limit("floatOpsPerSecond"),
    };
    const machine = typical(this.limits);
    const rate = (phase: string, tokens: number, best: number): Rate => {
      const speed = spread(this.#rates.get(`${phase} ${tokens}`) ?? []);
      return { tokens, tokens_per_second: speed, limit_tokens_per_second: best, share: speed.median / best };
    };
    return {
      model: this.#setting.model,
      folder: this.#setting.folder,
      dtype,
      kv_cache_dtype: kvCacheDtype,
      isa,
      threads,
      parameters: work.parameters,
      weight_bytes: work.weightBytes,
      weight_bytes_per_token: work.tokenBytes,
      limits,
      load: {
        ready_seconds: spread(this.#loads.map((l) => l.readySeconds)),
        first_token_seconds: spread(this.#loads.map((l) => l.firstTokenSeconds)),
      },
      memory: {
        peak_bytes: memory.peakBytes,
        private_bytes: memory.privateBytes,
        mapped_bytes: memory.mappedBytes,
        weights: memory.weights,
        huge_page_bytes: memory.hugeBytes,
      },
      prompt: promptLengths.map((tokens) => rate("prompt", tokens, promptLimit(work, machine, tokens))),
      generation: contexts.map((tokens) => ({
        ...rate("generation", tokens, generationLimit(work, machine)),
        new_tokens: newTokens,
      })),
      ...(profile ? { profile } : {}),
    };
  }
}

async function profile(run: Run, { promptLengths, contexts, newTokens }: Schedule, seed: () => number): Promise<ProfiledPhase[]> {
  const phases: ProfiledPhase[] = [];
  const limits = typical(run.limits);
  for (const [phase, lengths] of [["prompt", promptLengths] as const, ["generation", contexts] as const]) {
    for (const tokens of lengths) {
      const { ops, seconds } = await run.subject.ask({ kind: "profile", of: phase, tokens, newTokens, seed: seed() });
      phases.push({ phase, tokens, seconds, ops: byTime(ops, seconds, limits) });
    }
  }
  return phases;
}

function byTime(ops: Profile["ops"], total: number, limits: MachineLimits): ProfiledOp[] {
  const known = ops.reduce((sum, o) => sum + o.seconds, 0);
  const rows = ops.map(({ op, seconds, bytes, operations }): ProfiledOp => {
    const count = operations.int8 + operations.float;
    const arithmetic = operations.int8 / limits.int8OpsPerSecond + operations.float / limits.floatOpsPerSecond;
    const least = Math.max(bytes / limits.readBytesPerSecond, arithmetic);
    const multiplies = count > 0;
    return {
      op,
      seconds,
      share: seconds / total,
      bytes_per_second: multiplies ? bytes / seconds : null,
      ops_per_second: multiplies ? count / seconds : null,
      limit_share: multiplies ? least / seconds : null,
    };
  });
  const rest = Math.max(0, total - known);
  const none = { bytes_per_second: null, ops_per_second: null, limit_share: null };
  rows.push({ op: "(between steps)", seconds: rest, share: rest / total, ...none });
  return rows.filter((r) => r.seconds > 0).sort((a, b) => b.seconds - a.seconds);
}

function typical(limits: readonly MachineLimits[]): MachineLimits {
  const median = (key: keyof MachineLimits) => spread(limits.map((l) => l[key])).median;
  return {
    readBytesPerSecond: median("readBytesPerSecond"),
    int8OpsPerSecond: median("int8OpsPerSecond"),
    floatOpsPerSecond: median("floatOpsPerSecond"),
  };
}
