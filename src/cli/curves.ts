/** The curves of a training run as an SVG: loss, learning rate and gradient norm over steps. Pure text, no files. */
import type { LogEntry } from "../train/history.ts";
import { escapeXml, FONT_FAMILIES } from "./heatmap.ts";
import { excerpt } from "./terminal.ts";

const WIDTH = 1280;
const [LEFT, RIGHT, TOP, HIGH, GAP] = [90, 40, 100, 250, 62];
const [INK, MUTED, GRID] = ["#1f1b2d", "#6b6579", "#e6e3ea"];
const COLOURS = ["#8c2981", "#f7705c"] as const;
const FONTS = [...FONT_FAMILIES.map((family) => `'${family}'`), "sans-serif"].join(", ");

interface Series {
  readonly name: string;
  readonly points: readonly (readonly [step: number, value: number])[];
}

/** A whole SVG document. Panels without any number are left out. */
export function curvesSvg(log: readonly LogEntry[], title: string): string {
  const series = (key: string, name: string): Series => ({
    name,
    points: log.flatMap((entry): [number, number][] =>
      typeof entry[key] === "number" && Number.isFinite(entry[key]) ? [[entry.step, entry[key] as number]] : [],
    ),
  });
  const panels = [
    [series("loss", "training loss"), series("eval_loss", "evaluation loss")],
    [series("learning_rate", "learning rate")],
    [series("grad_norm", "gradient norm")],
  ].filter((panel) => panel.some((s) => s.points.length > 0));
  const parts: string[] = [text(LEFT, 52, excerpt(title, 90), 26, 'font-weight="700"')];
  panels.forEach((panel, i) => {
    parts.push(...drawn(panel, TOP + i * (HIGH + GAP)));
  });
  const height = TOP + panels.length * (HIGH + GAP);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img" aria-label="Training curves" font-family="${FONTS}" fill="${INK}">`,
    `<rect width="${WIDTH}" height="${height}" fill="#ffffff"/>`,
    ...parts,
    "</svg>\n",
  ].join("\n");
}

function drawn(panel: readonly Series[], top: number): string[] {
  const all = panel.flatMap((s) => s.points);
  const steps = all.map(([step]) => step);
  const values = all.map(([, value]) => value);
  const [from, to] = [Math.min(...steps), Math.max(...steps)];
  const ticks = ticksOf(Math.min(...values), Math.max(...values));
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const x = (step: number) => LEFT + ((WIDTH - LEFT - RIGHT) * (step - from)) / Math.max(1, to - from);
  const y = (value: number) => top + HIGH - (HIGH * (value - low)) / (high - low);
  const parts: string[] = [];
  for (const tick of ticks) {
    parts.push(`<path d="M${LEFT} ${n(y(tick))}H${WIDTH - RIGHT}" stroke="${GRID}"/>`);
    parts.push(text(LEFT - 10, y(tick) + 5, label(tick), 14, `text-anchor="end" fill="${MUTED}"`));
  }
  parts.push(text(LEFT, top + HIGH + 22, `step ${from}`, 14, `fill="${MUTED}"`));
  parts.push(text(WIDTH - RIGHT, top + HIGH + 22, `step ${to}`, 14, `text-anchor="end" fill="${MUTED}"`));
  let at = LEFT;
  panel.forEach(({ name, points }, i) => {
    if (points.length === 0) return;
    parts.push(`<rect x="${at}" y="${top - 24}" width="14" height="14" rx="2" fill="${COLOURS[i]}"/>`, text(at + 22, top - 12, name, 15));
    at += 40 + name.length * 9;
    if (points.length === 1) parts.push(`<circle cx="${n(x(points[0][0]))}" cy="${n(y(points[0][1]))}" r="3" fill="${COLOURS[i]}"/>`);
    else
      parts.push(
        `<path d="M${points.map(([s, v]) => `${n(x(s))} ${n(y(v))}`).join("L")}" fill="none" stroke="${COLOURS[i]}" stroke-width="2"/>`,
      );
  });
  return parts;
}

/** Round numbers around a range, four to nine of them. */
function ticksOf(low: number, high: number): number[] {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? 10 * power;
  const first = Math.floor(low / step);
  const last = Math.max(first + 1, Math.ceil(high / step));
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function label(value: number): string {
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(6)));
}

function text(x: number, y: number, body: string, size: number, attributes = ""): string {
  return `<text x="${n(x)}" y="${n(y)}" font-size="${size}"${attributes && ` ${attributes}`}>${escapeXml(body)}</text>`;
}

function n(value: number): string {
  return String(Math.round(value * 100) / 100);
}
