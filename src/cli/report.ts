/** The results of `mixtape bench` as text for a terminal. */
import type { Measured, ProfiledPhase, Rate } from "./rounds.ts";
import { ratios, type Spread } from "./spread.ts";
import { colours, formatBytes, formatCount, padEnd } from "./terminal.ts";

/** The second model's tokens per second relative to the first's, pair by pair. */
export interface Comparison {
  readonly prompt: readonly { readonly tokens: number; readonly ratio: Spread }[];
  readonly generation: readonly { readonly tokens: number; readonly ratio: Spread }[];
}

export interface BenchResult {
  readonly machine: { readonly cpu: string; readonly cores: number; readonly memory_bytes: number };
  readonly rounds: number;
  /** The model and, if any, the one it is compared with. */
  readonly models: readonly Measured[];
  readonly comparison?: Comparison;
}

export function compare(first: Measured, second: Measured): Comparison {
  const pair = (a: readonly Rate[], b: readonly Rate[]) =>
    a.map(({ tokens, tokens_per_second }, i) => ({ tokens, ratio: ratios(tokens_per_second, b[i].tokens_per_second) }));
  return { prompt: pair(first.prompt, second.prompt), generation: pair(first.generation, second.generation) };
}

export function report({ machine, rounds, models, comparison }: BenchResult): string {
  const { bold, dim } = colours(process.stdout);
  const lines = [
    dim(
      `${machine.cpu}, ${machine.cores} cores, ${formatBytes(machine.memory_bytes)}; ${rounds === 1 ? "one round" : `medians of ${rounds} rounds (minimum … maximum)`}`,
    ),
    ...models.flatMap((m) => ["", ...describe(m)]),
  ];
  if (comparison) {
    const [a, b] = models.map((m) => describeSetting(m));
    lines.push("", bold(`${b} relative to ${a}`));
    for (const { tokens, ratio } of comparison.prompt) lines.push(`  ${padEnd(`prompt of ${tokens}`, 24)}${times(ratio)}`);
    for (const { tokens, ratio } of comparison.generation) lines.push(`  ${padEnd(`generation after ${tokens}`, 24)}${times(ratio)}`);
  }
  return `${lines.join("\n")}\n`;
}

/** A model's settings, in a few words. */
export function describeSetting({ model, dtype, kv_cache_dtype, threads }: Measured): string {
  return `${model}, ${dtype}, cache ${kv_cache_dtype}, ${threads} thread${threads === 1 ? "" : "s"}`;
}

/** The limit that prompt speeds are compared with: the peak of the arithmetic that does most of the work. */
export function promptLimitName({ dtype, isa }: Measured): string {
  if (isa.startsWith("cuda")) return "bf16 peak";
  return dtype === "int8" || dtype === "int4" ? "int8 peak" : "fp32 peak";
}

function describe(m: Measured): string[] {
  const { bold, dim } = colours(process.stdout);
  const row = (name: string, figures: string, more = "") => `  ${padEnd(name, 24)}${padEnd(figures, 38)}${more}`.trimEnd();
  const { total, active } = m.parameters;
  const { limits, load, memory } = m;
  const parts =
    memory.private_bytes === null || memory.mapped_bytes === null
      ? ""
      : dim(`now ${formatBytes(memory.private_bytes)} private, ${formatBytes(memory.mapped_bytes)} mapped from files`);
  return [
    `${bold(describeSetting(m))}  ${dim(m.isa)}`,
    row("parameters", `${formatCount(total)}, ${formatCount(active)} active`),
    row("weights", formatBytes(m.weight_bytes), dim(`${formatBytes(m.weight_bytes_per_token)} read per token`)),
    row("peak memory", formatBytes(memory.peak_bytes), parts),
    row("weights' pages", memory.weights, dim(memory.huge_page_bytes > 0 ? `${formatBytes(memory.huge_page_bytes)} on huge pages` : "")),
    row("ready", spreadOf(load.ready_seconds, seconds)),
    row("first token", spreadOf(load.first_token_seconds, seconds)),
    "",
    row(
      "machine: reading",
      spreadOf(limits.read_bytes_per_second, (x) => `${formatBytes(x)}/s`),
    ),
    ...(m.isa.startsWith("cuda")
      ? [row("machine: bf16", spreadOf(limits.float_ops_per_second, rate))]
      : [
          row("machine: int8", spreadOf(limits.int8_ops_per_second, rate)),
          row("machine: fp32", spreadOf(limits.float_ops_per_second, rate)),
        ]),
    "",
    ...m.prompt.map((p) => row(`prompt of ${p.tokens}`, `${spreadOf(p.tokens_per_second, speed)} tokens/s`, share(p, promptLimitName(m)))),
    ...m.generation.map((g) =>
      row(
        `generation after ${g.tokens}`,
        `${spreadOf(g.tokens_per_second, speed)} tokens/s`,
        `${share(g, "reading")}, ${milliseconds(1 / g.tokens_per_second.median)} per token`,
      ),
    ),
    ...(m.profile ?? []).flatMap((phase) => ["", ...describePhase(phase)]),
  ];
}

function describePhase({ phase, tokens, seconds: all, ops }: ProfiledPhase): string[] {
  const { bold } = colours(process.stdout);
  const name = phase === "prompt" ? `prompt of ${tokens}` : `generation after ${tokens}`;
  const number = (value: number | null, unit: string, width: number) =>
    (value === null ? "" : `${(value / 1e9).toFixed(1)} ${unit}`).padStart(width);
  return [
    `  ${bold(name)}, ${seconds(all)} in all`,
    ...ops.map((o) => {
      const time = `${padEnd(o.op, 20)}${milliseconds(o.seconds).padStart(12)}${percent(o.share).padStart(9)}`;
      const speeds = `${number(o.bytes_per_second, "GB/s", 14)}${number(o.ops_per_second, "Gop/s", 16)}`;
      const limit = o.limit_share === null ? "" : `${percent(o.limit_share).padStart(9)} of the limit`;
      return `    ${time}${speeds}${limit}`.trimEnd();
    }),
  ];
}

function spreadOf({ median, least, most, values }: Spread, format: (x: number) => string): string {
  return values.length === 1 ? format(median) : `${format(median)} (${format(least)} … ${format(most)})`;
}

function share({ share: of }: Rate, limit: string): string {
  return `${percent(of)} of ${limit}`;
}

function times(ratio: Spread): string {
  return spreadOf(ratio, (x) => `${x.toFixed(3)} x`);
}

export function percent(x: number): string {
  return `${(100 * x).toFixed(1)} %`;
}

export function speed(x: number): string {
  return x.toFixed(x < 10 ? 2 : x < 1000 ? 1 : 0);
}

function rate(x: number): string {
  return x < 1e12 ? `${(x / 1e9).toFixed(0)} Gop/s` : `${(x / 1e12).toFixed(2)} Top/s`;
}

function seconds(x: number): string {
  return x < 1 ? milliseconds(x) : `${x.toFixed(2)} s`;
}

function milliseconds(x: number): string {
  return `${(1000 * x).toFixed(x < 0.1 ? 2 : 0)} ms`;
}
