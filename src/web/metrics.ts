/** Reads Prometheus' text format. Knows no metric by its name. */

export interface Sample {
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

/** Samples by the name of their metric; those of histograms under their `_bucket`, `_sum` and `_count`. */
export type Samples = ReadonlyMap<string, readonly Sample[]>;

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Lines that are none of the format are passed over. */
export function readMetrics(text: string): Samples {
  const found = new Map<string, Sample[]>();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line.trim());
    if (!match) continue;
    const [, name, labels = "", number] = match;
    const value = number === "+Inf" ? Number.POSITIVE_INFINITY : number === "-Inf" ? Number.NEGATIVE_INFINITY : Number(number);
    const sample = {
      labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, text]) => [key, unescaped(text)])),
      value,
    };
    const list = found.get(name);
    if (list) list.push(sample);
    else found.set(name, [sample]);
  }
  return found;
}

function unescaped(text: string): string {
  return text.replace(/\\(.)/g, (_, c: string) => (c === "n" ? "\n" : c));
}

/** The sum of those samples of a metric that have these labels; 0 where there is none. */
export function total(samples: Samples, name: string, labels: Readonly<Record<string, string>> = {}): number {
  return (samples.get(name) ?? [])
    .filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value))
    .reduce((sum, { value }) => sum + value, 0);
}

/** What a counter grew by; from 0 when it began anew, because the server did. */
export function growth(before: number, now: number): number {
  return now >= before ? now - before : now;
}

/** The value below which the share `q` of what a histogram saw between two readings lies; null where it saw nothing. */
export function quantile(before: Samples, now: Samples, name: string, q: number): number | null {
  const bounds = [...new Set((now.get(`${name}_bucket`) ?? []).map(({ labels }) => labels["le"]))]
    .map((le) => ({ le, bound: le === "+Inf" ? Number.POSITIVE_INFINITY : Number(le) }))
    .sort((a, b) => a.bound - b.bound);
  const counts = bounds.map(({ le }) => growth(total(before, `${name}_bucket`, { le }), total(now, `${name}_bucket`, { le })));
  const wanted = q * (counts.at(-1) ?? 0);
  if (wanted <= 0) return null;
  const at = counts.findIndex((count) => count >= wanted);
  const [lower, below] = at === 0 ? [0, 0] : [bounds[at - 1].bound, counts[at - 1]];
  const upper = bounds[at].bound;
  // Beyond the last bound nothing more is known than that.
  return upper === Number.POSITIVE_INFINITY ? lower : lower + ((upper - lower) * (wanted - below)) / (counts[at] - below);
}
