/** The status page: whether the server accepts requests, and live charts of its metrics. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import "./style/status.css";
import { CHARTS, type Chart, type Reading, type Unit } from "./charts.ts";
import { coloursOf } from "./heatmap.ts";
import { Icon } from "./icons.tsx";
import { readMetrics } from "./metrics.ts";
import { formatNumber, formatSeconds, usePage } from "./page.ts";
import type { Language } from "./words.ts";

const [EVERY_MS, KEPT] = [2000, 151];
const HEIGHT = 168;

interface State {
  /** The server's answer to /ready: null before the first one, `unreachable` when the request failed. */
  readonly ready: boolean | "unreachable" | null;
  readonly readings: readonly Reading[];
  readonly problem: string | null;
}

export function Status({ onMenu }: { readonly onMenu: () => void }) {
  const { client, say } = usePage();
  const [state, setState] = useState<State>({ ready: null, readings: [], problem: null });
  useEffect(() => {
    const left = new AbortController();
    let timer = 0;
    const ask = async () => {
      // No polling while the page is hidden.
      if (!document.hidden) {
        const [ready, metrics] = await Promise.allSettled([client.ready(left.signal), client.text("metrics", left.signal)]);
        if (left.signal.aborted) return;
        const reading = metrics.status === "fulfilled" ? [{ at: Date.now() / 1000, samples: readMetrics(metrics.value) }] : [];
        setState(({ readings }) => ({
          ready: ready.status === "fulfilled" ? ready.value : "unreachable",
          readings: [...readings, ...reading].slice(-KEPT),
          problem: metrics.status === "rejected" ? (metrics.reason as Error).message : null,
        }));
      }
      timer = setTimeout(ask, EVERY_MS);
    };
    void ask();
    return () => {
      left.abort();
      clearTimeout(timer);
    };
  }, [client]);

  const { ready, readings, problem } = state;
  return (
    <div class="status">
      <header class="bar">
        <button type="button" class="quiet square only-narrow" aria-label={say("openNavigation")} onClick={onMenu}>
          <Icon name="menu" />
        </button>
        <h2 class="cut bar-title">{say("statusTitle")}</h2>
        <p class="badge" role="status" data-state={ready === true ? "good" : ready === null ? "asking" : "bad"}>
          {say(ready === null ? "statusChecking" : ready === "unreachable" ? "unreachable" : ready ? "statusReady" : "statusNotReady")}
        </p>
      </header>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: scrollable regions must be focusable to scroll by keyboard */}
      <section class="scroll" tabIndex={0} aria-label={say("statusTitle")}>
        <div class="status-body">
          {problem !== null && ready !== "unreachable" && (
            <p class="notice" role="alert">
              <Icon name="alert" /> {say("statusNoMetrics", { reason: problem })}
            </p>
          )}
          <p class="quiet-text">{say("statusLast")}</p>
          <div class="cards">
            {CHARTS.map((chart) => (
              <Card key={chart.title} chart={chart} readings={readings} />
            ))}
          </div>
        </div>
      </section>
    </div>
  );
}

function Card({ chart, readings }: { readonly chart: Chart; readonly readings: readonly Reading[] }) {
  const { say, language } = usePage();
  const data = useMemo(() => {
    const times = readings.slice(1).map(({ at }) => at);
    return [times, ...chart.series.map(({ of }) => times.map((_, i) => of(readings[i], readings[i + 1])))] as uPlot.AlignedData;
  }, [chart, readings]);
  return (
    <section class="card" aria-label={say(chart.title)}>
      <h3>{say(chart.title)}</h3>
      <dl class="now">
        {chart.series.map(({ label }, i) => (
          <div key={label}>
            <dt>
              <span class="swatch" data-series={i} aria-hidden="true" />
              {say(label)}
            </dt>
            <dd>{latest(data[i + 1], chart.unit, language) ?? <span class="quiet-text">{say("statusNoData")}</span>}</dd>
          </div>
        ))}
      </dl>
      <Plot chart={chart} data={data} />
    </section>
  );
}

/** The latest value as text; null when there is none. */
function latest(values: uPlot.AlignedData[number], unit: Unit, language: Language): string | null {
  const value = Array.from(values as ArrayLike<number | null>).findLast((v) => v !== null);
  return value === undefined || value === null ? null : formatValue(value, unit, language);
}

function formatValue(value: number, unit: Unit, language: Language): string {
  switch (unit) {
    case "number":
      return formatNumber(value, language, value > 0 && value < 10 && !Number.isInteger(value) ? 1 : 0);
    case "percent":
      return `${formatNumber(value, language, value > 0 && value < 10 ? 1 : 0)} %`;
    case "seconds":
      return formatSeconds(value, language);
    default:
      return unit satisfies never;
  }
}

/** The curves. What they say last stands above as text, so that they are hidden from screen readers. */
function Plot({ chart, data }: { readonly chart: Chart; readonly data: uPlot.AlignedData }) {
  const { say, language, theme } = usePage();
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const [dark, setDark] = useState(() => matchMedia("(prefers-color-scheme: dark)").matches);
  useEffect(() => {
    const media = matchMedia("(prefers-color-scheme: dark)");
    const changed = () => setDark(media.matches);
    media.addEventListener("change", changed);
    return () => media.removeEventListener("change", changed);
  }, []);
  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const colour = coloursOf(element);
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px sans-serif" };
    const made = new uPlot(
      {
        width: element.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false } },
        scales: {
          // Always five minutes wide, so that curves grow in from the right.
          x: { range: (_, __, max) => [(max ?? 0) - (EVERY_MS / 1000) * (KEPT - 1), max ?? 0] },
          y: { range: (_, __, max) => [0, chart.unit === "percent" ? 100 : niceAbove(max ?? 0)] },
        },
        axes: [
          {
            ...axis,
            size: 28,
            space: 70,
            values: (_, at) =>
              at.map((t) => new Date(t * 1000).toLocaleTimeString(language, { hour: "2-digit", minute: "2-digit", hour12: false })),
          },
          { ...axis, size: 58, space: 34, values: (_, at) => at.map((v) => formatValue(v, chart.unit, language)) },
        ],
        series: [
          {},
          ...chart.series.map(({ label }, i) => ({
            label: say(label),
            stroke: colour(`series-${i}`),
            fill: i === 0 ? colour("series-fill") : undefined,
            width: 2,
            spanGaps: false,
            points: { show: false },
          })),
        ],
      },
      data,
      element,
    );
    plot.current = made;
    const sizes = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    sizes.observe(element);
    return () => {
      sizes.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [chart, language, theme, dark, say]);
  useEffect(() => plot.current?.setData(data), [data]);
  return <div ref={place} class="plot" aria-hidden="true" />;
}

/** The next round number above the value, for the top of an axis. */
function niceAbove(value: number): number {
  if (!(value > 0)) return 1;
  const ten = 10 ** Math.floor(Math.log10(value));
  return ([1, 2, 2.5, 5, 10].find((step) => step * ten >= value * 1.05) ?? 20) * ten;
}
