/** Parses the Prometheus text format. Knows nothing of particular metrics. */

export interface Sample {
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

/** Samples by metric name; histograms appear as `_bucket`, `_sum` and `_count`. */
export type Samples = ReadonlyMap<string, readonly Sample[]>;

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Parses a reply of /metrics; malformed lines are skipped. */
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

/** The sum of a metric's samples that have these labels; 0 when there are none. */
export function total(samples: Samples, name: string, labels: Readonly<Record<string, string>> = {}): number {
  return (samples.get(name) ?? [])
    .filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value))
    .reduce((sum, { value }) => sum + value, 0);
}

/** The increase of a counter. A lower value means that the server restarted, so the counter started again from 0. */
export function growth(before: number, now: number): number {
  return now >= before ? now - before : now;
}

/** The `q` quantile (0 to 1) of what a histogram observed between two readings, interpolated within its bucket; null when it observed nothing. */
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
  // In the last bucket only its lower bound is known.
  return upper === Number.POSITIVE_INFINITY ? lower : lower + ((upper - lower) * (wanted - below)) / (counts[at] - below);
}
