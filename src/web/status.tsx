/** What the server does now, as charts that grow while one looks. */
import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Say } from "./app.tsx";
import { text } from "./wire.ts";
import type { Word } from "./words.ts";

const EVERY_MS = 2000;
const KEPT = 150;

/** Sums of Prometheus' samples by name and, where given, one label. */
type Figures = ReadonlyMap<string, number>;

export function parseMetrics(body: string): Figures {
  const sums = new Map<string, number>();
  for (const line of body.split("\n")) {
    const [, name, labels = "", value] = /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (name === undefined) continue;
    const kind = /kind="(\w+)"/.exec(labels)?.[1];
    const key = kind === undefined ? name : `${name}:${kind}`;
    sums.set(key, (sums.get(key) ?? 0) + Number(value));
  }
  return sums;
}

interface Chart {
  readonly title: Word;
  readonly lines: readonly (readonly [Word, (now: Figures, before: Figures, seconds: number) => number | null])[];
}

const get = (f: Figures, name: string) => f.get(name) ?? 0;
const rate = (name: string) => (now: Figures, before: Figures, seconds: number) =>
  Math.max(0, get(now, name) - get(before, name)) / seconds;
const mean = (name: string) => (now: Figures, before: Figures) => {
  const count = get(now, `${name}_count`) - get(before, `${name}_count`);
  return count > 0 ? (1000 * (get(now, `${name}_sum`) - get(before, `${name}_sum`))) / count : null;
};
const share = (name: string) => (now: Figures) => (100 * get(now, name)) / Math.max(1, get(now, "mixtape_kv_blocks"));

const CHARTS: readonly Chart[] = [
  {
    title: "throughput",
    lines: [
      ["answer", rate("mixtape_tokens_total:completion")],
      ["prompt", rate("mixtape_tokens_total:prompt")],
      ["cacheHits", rate("mixtape_tokens_total:cached")],
    ],
  },
  {
    title: "inProgress",
    lines: [
      ["running", (now) => get(now, "mixtape_sequences_running")],
      ["waiting", (now) => get(now, "mixtape_sequences_waiting")],
    ],
  },
  { title: "stepTime", lines: [["stepTime", mean("mixtape_step_seconds")]] },
  { title: "ttft", lines: [["ttft", mean("mixtape_time_to_first_token_seconds")]] },
  {
    title: "kvUse",
    lines: [
      ["held", share("mixtape_kv_blocks_held")],
      ["remembered", share("mixtape_kv_blocks_remembered")],
    ],
  },
];
const COLOURS = ["#c2479a", "#e0873a", "#4a8fe7"];

export function Status({ say }: { say: Say }) {
  const [samples, setSamples] = useState<readonly { at: number; figures: Figures }[]>([]);
  const [state, setState] = useState<Word>("notReady");

  useEffect(() => {
    let over = false;
    const look = async () => {
      try {
        const figures = parseMetrics(await text("metrics"));
        if (!over) setSamples((list) => [...list.slice(-KEPT), { at: Date.now() / 1000, figures }]);
        await text("ready");
        if (!over) setState("ready");
      } catch (error) {
        if (!over) setState(error instanceof TypeError ? "unreachable" : "notReady");
      }
    };
    void look();
    const timer = setInterval(() => void look(), EVERY_MS);
    return () => {
      over = true;
      clearInterval(timer);
    };
  }, []);

  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reachable by keyboard
    <section class="status" tabIndex={0} aria-label={say("status")}>
      <p class={state === "ready" ? "badge good" : "badge"} role="status">
        {say(state)}
      </p>
      <div class="charts">
        {CHARTS.map((chart) => (
          <Plot key={chart.title} say={say} chart={chart} samples={samples} />
        ))}
      </div>
    </section>
  );
}

function Plot({ say, chart, samples }: { say: Say; chart: Chart; samples: readonly { at: number; figures: Figures }[] }) {
  const at = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const data = [
    samples.slice(1).map((s) => s.at),
    ...chart.lines.map(([, of]) => samples.slice(1).map((s, i) => of(s.figures, samples[i].figures, s.at - samples[i].at))),
  ] as uPlot.AlignedData;

  useEffect(() => {
    if (!at.current) return;
    const ink = getComputedStyle(at.current).color;
    const axis = { stroke: ink, grid: { stroke: "rgba(128,128,128,0.2)" }, ticks: { stroke: "rgba(128,128,128,0.3)" } };
    plot.current = new uPlot(
      {
        width: at.current.clientWidth,
        height: 180,
        cursor: { drag: { x: false, y: false } },
        scales: { y: { range: (_u, _min, max) => [0, Math.max(1, max * 1.1)] } },
        axes: [axis, axis],
        series: [
          { label: say("time") },
          ...chart.lines.map(([word], i) => ({ label: say(word), stroke: COLOURS[i], width: 2, spanGaps: true })),
        ],
      },
      data,
      at.current,
    );
    const resize = new ResizeObserver(([entry]) => plot.current?.setSize({ width: entry.contentRect.width, height: 180 }));
    resize.observe(at.current);
    return () => {
      resize.disconnect();
      plot.current?.destroy();
    };
  }, [say, chart]);
  useEffect(() => plot.current?.setData(data), [samples]);

  const last = chart.lines
    .map(([word], i) => `${say(word)}: ${(data[i + 1].at(-1) as number | null | undefined)?.toFixed(1) ?? "–"}`)
    .join(", ");
  return (
    <figure class="card">
      <figcaption>
        <h2>{say(chart.title)}</h2>
        <span class="hint">{last}</span>
      </figcaption>
      <div ref={at} aria-hidden="true" />
    </figure>
  );
}
