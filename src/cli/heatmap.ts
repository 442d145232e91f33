/** The routing heat map as an SVG for a slide: layers by experts, the evenness of each layer, and a colour bar. Pure text, no files. */
import type { LayerUse } from "./census.ts";
import { hex, magma } from "./scale.ts";
import { excerpt } from "./terminal.ts";

export interface HeatmapOptions {
  readonly title: string;
  /** Lines under the title: the model, the prompt. */
  readonly model: string;
  readonly prompt: string;
  readonly tokens: number;
  readonly chosen: number;
}

const WIDTH = 1280;
const LEFT = 96;
const TOP = 166;
const GRID = 872;
const BARS = 1012;
const BAR_WIDTH = 150;
const INK = "#1f1b2d";
const MUTED = "#6b6579";
const NEVER = "#f0eef2";
/** In order of preference; all are sans-serif, and the last ones have Chinese characters. */
export const FONT_FAMILIES = [
  "Inter",
  "Helvetica Neue",
  "Arial",
  "Liberation Sans",
  "Noto Sans",
  "DejaVu Sans",
  "PingFang SC",
  "Microsoft YaHei",
  "Noto Sans CJK SC",
];
const FONTS = [...FONT_FAMILIES.map((family) => `'${family}'`), "sans-serif"].join(", ");

/** A whole SVG document, 1280 wide. */
export function heatmapSvg(layers: readonly LayerUse[], { title, model, prompt, tokens, chosen }: HeatmapOptions): string {
  const experts = layers[0].load.length;
  const most = Math.max(...layers.map((l) => l.max_load));
  const row = Math.min(48, Math.max(16, Math.floor(432 / layers.length)));
  const column = GRID / experts;
  const gridHeight = row * layers.length;
  const height = TOP + gridHeight + 118;
  const gap = column >= 10 ? 1 : 0.5;
  const parts: string[] = [];
  const put = (x: number, y: number, body: string, size: number, attributes = "") =>
    parts.push(`<text x="${n(x)}" y="${n(y)}" font-size="${size}"${attributes && ` ${attributes}`}>${escapeXml(body)}</text>`);

  put(48, 62, title, 30, 'font-weight="700"');
  put(48, 95, excerpt(prompt, 110), 18);
  put(
    48,
    121,
    `${excerpt(model, 60)}  ·  ${plural(tokens, "token")}, ${plural(chosen, "expert")} each of ${experts} in ${plural(layers.length, "layer")}`,
    15,
    muted(),
  );

  // Cells, each with a tooltip.
  layers.forEach((l, i) => {
    const y = TOP + i * row;
    l.load.forEach((share, e) => {
      const fill = share > 0 ? hex(shade(share / most)) : NEVER;
      const label = `layer ${l.layer}, expert ${e}: ${percent(share)}, ${plural(l.counts[e], "slot")}`;
      const place = `x="${n(LEFT + e * column)}" y="${n(y)}" width="${n(column - gap)}" height="${n(row - gap)}"`;
      parts.push(`<rect ${place} fill="${fill}"><title>${label}</title></rect>`);
    });
    if (row >= 15 || i % 2 === 0) put(LEFT - 12, y + row / 2 + 5, String(l.layer), 14, 'text-anchor="end"');
  });

  // Axes.
  const every = [1, 2, 4, 8, 16, 32].find((step) => step * column >= 32) ?? 64;
  for (let e = 0; e < experts; e += every) put(LEFT + (e + 0.5) * column, TOP + gridHeight + 22, String(e), 14, 'text-anchor="middle"');
  put(LEFT + GRID / 2, TOP + gridHeight + 46, "expert", 15, muted('text-anchor="middle"'));
  const middle = TOP + gridHeight / 2;
  put(48, middle, "layer", 15, muted(`text-anchor="middle" transform="rotate(-90 48 ${n(middle)})"`));

  // How even each layer is.
  put(BARS, TOP - 14, "effective experts", 15, 'font-weight="600"');
  layers.forEach((l, i) => {
    const y = TOP + i * row;
    const wide = (BAR_WIDTH * l.effective_experts) / experts;
    const thick = Math.min(row - 4, 18);
    const at = y + (row - gap - thick) / 2;
    parts.push(`<rect x="${BARS}" y="${n(at)}" width="${BAR_WIDTH}" height="${n(thick)}" rx="2" fill="${NEVER}"/>`);
    parts.push(
      `<rect x="${BARS}" y="${n(at)}" width="${n(wide)}" height="${n(thick)}" rx="2" fill="#8c2981"><title>layer ${l.layer}: ` +
        `${l.effective_experts.toFixed(1)} of ${experts}, busiest ${percent(l.max_load)}</title></rect>`,
    );
    put(BARS + BAR_WIDTH + 12, y + row / 2 + 5, l.effective_experts.toFixed(1), 14);
  });
  put(BARS, TOP + gridHeight + 22, `of ${experts}: how many, used evenly,`, 13, muted());
  put(BARS, TOP + gridHeight + 39, "would have this entropy", 13, muted());

  parts.push(...colourBar(TOP + gridHeight + 70, most, experts));
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${n(height)}" width="${WIDTH}" height="${n(height)}" role="img" aria-label="${escapeXml(title)}" font-family="${FONTS}" fill="${INK}">`,
    `<rect width="${WIDTH}" height="${n(height)}" fill="#ffffff"/>`,
    ...parts,
    "</svg>\n",
  ].join("\n");
}

/** From pale for small values to dark for large ones, so that busy experts stand out on a light background. */
function shade(value: number) {
  return magma(0.97 - 0.87 * value);
}

function colourBar(y: number, most: number, experts: number): string[] {
  const [x, width, thick] = [LEFT, 420, 14];
  const stops = Array.from({ length: 11 }, (_, i) => `<stop offset="${i * 10}%" stop-color="${hex(shade(i / 10))}"/>`);
  const even = x + (width * (1 / experts)) / most;
  const label = (at: number, body: string, anchor = "middle") =>
    `<text x="${n(at)}" y="${n(y + thick + 18)}" font-size="13" fill="${MUTED}" text-anchor="${anchor}">${escapeXml(body)}</text>`;
  return [
    `<defs><linearGradient id="scale">${stops.join("")}</linearGradient></defs>`,
    `<rect x="${x}" y="${n(y)}" width="${width}" height="${thick}" rx="2" fill="url(#scale)"/>`,
    `<path d="M${n(even)} ${n(y - 4)}V${n(y + thick + 4)}" stroke="${INK}" stroke-width="1.5"/>`,
    ...(even - x > 64 ? [label(x, "0", "start")] : []),
    label(Math.max(even, x + 34), `even ${percent(1 / experts)}`),
    ...(x + width - even > 110 ? [label(x + width, percent(most), "end")] : []),
    `<text x="${x + width + 20}" y="${n(y + 12)}" font-size="14">share of the layer's slots</text>`,
    `<rect x="${x + width + 236}" y="${n(y)}" width="22" height="${thick}" rx="2" fill="${NEVER}"/>`,
    `<text x="${x + width + 268}" y="${n(y + 12)}" font-size="14">never chosen</text>`,
  ];
}

/** Escapes text and attributes for XML 1.0; characters that XML does not allow become U+FFFD. */
export function escapeXml(text: string): string {
  const marks: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|\p{Cs}/gu, "\ufffd").replace(/[&<>"']/g, (c) => marks[c]);
}

function muted(attributes = ""): string {
  return `fill="${MUTED}"${attributes && ` ${attributes}`}`;
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** A coordinate with at most two decimals. */
function n(value: number): string {
  return String(Math.round(value * 100) / 100);
}
