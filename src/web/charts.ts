/** The charts of the status page: what each one shows, computed from the server's metrics. Draws nothing. */
import { growth, quantile, type Samples, total } from "./metrics.ts";
import type { Word } from "./words.ts";

/** The metrics at one moment; `at` is in seconds since 1970. */
export interface Reading {
  readonly at: number;
  readonly samples: Samples;
}

export type Unit = "number" | "percent" | "seconds";

export interface Chart {
  readonly title: Word;
  readonly unit: Unit;
  readonly series: readonly {
    readonly label: Word;
    /** The value at `now`, or null when there is no data. Percentages are 0 to 100. */
    of(before: Reading, now: Reading): number | null;
  }[];
}

type Labels = Readonly<Record<string, string>>;

const grown = (before: Reading, now: Reading, name: string, labels: Labels) =>
  growth(total(before.samples, name, labels), total(now.samples, name, labels));

const perSecond = (name: string, labels: Labels) => (before: Reading, now: Reading) =>
  grown(before, now, name, labels) / (now.at - before.at);

const level = (name: string) => (_: Reading, now: Reading) => (now.samples.has(name) ? total(now.samples, name) : null);

const share = (part: number, whole: number) => (whole > 0 ? (100 * part) / whole : null);

const spread = (name: string): Chart["series"] => [
  { label: "seriesMedian", of: (before, now) => quantile(before.samples, now.samples, name, 0.5) },
  { label: "seriesSlow", of: (before, now) => quantile(before.samples, now.samples, name, 0.95) },
];

/** The metric names come from src/server/metrics.ts. */
export const CHARTS: readonly Chart[] = [
  {
    title: "chartThroughput",
    unit: "number",
    series: [
      { label: "seriesGenerated", of: perSecond("mixtape_tokens_total", { kind: "completion" }) },
      { label: "seriesPrompt", of: perSecond("mixtape_tokens_total", { kind: "prompt" }) },
    ],
  },
  {
    title: "chartRequests",
    unit: "number",
    series: [
      { label: "seriesRunning", of: level("mixtape_sequences_running") },
      { label: "seriesWaiting", of: level("mixtape_sequences_waiting") },
    ],
  },
  {
    title: "chartCache",
    unit: "percent",
    series: [
      {
        label: "seriesUsed",
        of: (_, { samples }) => share(total(samples, "mixtape_kv_blocks_held"), total(samples, "mixtape_kv_blocks")),
      },
    ],
  },
  {
    title: "chartHits",
    unit: "percent",
    series: [
      {
        label: "seriesHits",
        of: (before, now) =>
          share(
            grown(before, now, "mixtape_tokens_total", { kind: "cached" }),
            grown(before, now, "mixtape_tokens_total", { kind: "prompt" }),
          ),
      },
    ],
  },
  { title: "chartFirst", unit: "seconds", series: spread("mixtape_time_to_first_token_seconds") },
  { title: "chartStep", unit: "seconds", series: spread("mixtape_step_seconds") },
];
