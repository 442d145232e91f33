/** The results of `mixtape bench` as an SVG: a bar per length, in front of a bar for the machine's limit. Pure text, no files. */
import { escapeXml, FONT_FAMILIES } from "./heatmap.ts";
import { type BenchResult, describeSetting, percent, promptLimitName, speed } from "./report.ts";
import type { Measured, Rate } from "./rounds.ts";
import { counted, excerpt } from "./terminal.ts";

const WIDTH = 1280;
const LEFT = 250;
const BAR = 700;
const THICK = 26;
const INK = "#1f1b2d";
const MUTED = "#6b6579";
const LIMIT = "#f0eef2";
/** Colours of the model and of the one it is compared with. */
const COLOURS = ["#8c2981", "#f7705c"] as const;
const FONTS = [...FONT_FAMILIES.map((family) => `'${family}'`), "sans-serif"].join(", ");

/** A whole SVG document, 1280 wide. */
export function speedSvg({ machine, rounds, models }: BenchResult): string {
  const parts: string[] = [];
  const put = (x: number, y: number, body: string, size: number, attributes = "") =>
    parts.push(`<text x="${n(x)}" y="${n(y)}" font-size="${size}"${attributes && ` ${attributes}`}>${escapeXml(body)}</text>`);
  put(48, 62, "Tokens per second and the machine's limits", 30, 'font-weight="700"');
  const plural = rounds === 1 ? "one round" : `medians of ${rounds} rounds, lines from minimum to maximum`;
  put(48, 95, excerpt(`${machine.cpu}, ${machine.cores} cores  ·  ${plural}`, 120), 16, muted());
  models.forEach((m, i) => {
    parts.push(`<rect x="48" y="${110 + i * 26}" width="16" height="16" rx="2" fill="${COLOURS[i]}"/>`);
    put(74, 124 + i * 26, excerpt(describeSetting(m), 100), 16);
  });

  let y = 130 + models.length * 26;
  const panel = (title: string, of: (m: Measured) => readonly Rate[], label: (r: Rate) => string, limit: (m: Measured) => string) => {
    const rows = models.map(of);
    const most = Math.max(...rows.flat().flatMap((r) => [r.limit_tokens_per_second, r.tokens_per_second.most]));
    put(48, y + 24, title, 18, 'font-weight="600"');
    y += 42;
    rows[0].forEach((first, length) => {
      put(LEFT - 14, y + (rows.length * THICK) / 2 + 5, label(first), 15, 'text-anchor="end"');
      for (const [i, rates] of rows.entries()) {
        parts.push(...bar(rates[length], most, y, COLOURS[i], limit(models[i])));
        y += THICK;
      }
      y += 12;
    });
    y += 16;
  };
  panel(
    "Prompts",
    (m) => m.prompt,
    (r) => counted(r.tokens, "token"),
    promptLimitName,
  );
  panel(
    "Generation",
    (m) => m.generation,
    (r) => `after ${counted(r.tokens, "token")}`,
    () => "reading",
  );
  parts.push(`<rect x="${LEFT}" y="${n(y)}" width="22" height="14" rx="2" fill="${LIMIT}"/>`);
  put(LEFT + 32, y + 12, "the limit: for prompts the arithmetic peak, for generation the speed of reading memory", 14, muted());
  const height = y + 46;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${n(height)}" width="${WIDTH}" height="${n(height)}" role="img" aria-label="Tokens per second" font-family="${FONTS}" fill="${INK}">`,
    `<rect width="${WIDTH}" height="${n(height)}" fill="#ffffff"/>`,
    ...parts,
    "</svg>\n",
  ].join("\n");
}

function bar({ tokens_per_second: of, limit_tokens_per_second: limit, share }: Rate, most: number, y: number, fill: string, name: string) {
  const wide = (value: number) => (BAR * value) / most;
  const middle = n(y + THICK / 2 - 1);
  const rect = (value: number, colour: string) =>
    `<rect x="${LEFT}" y="${n(y)}" width="${n(wide(value))}" height="${THICK - 3}" rx="2" fill="${colour}">`;
  return [
    `${rect(limit, LIMIT)}<title>limit: ${speed(limit)} tokens/s</title></rect>`,
    `${rect(of.median, fill)}<title>${speed(of.least)} to ${speed(of.most)} tokens/s</title></rect>`,
    `<path d="M${n(LEFT + wide(of.least))} ${middle}H${n(LEFT + wide(of.most))}" stroke="${INK}" stroke-width="1.5"/>`,
    `<text x="${LEFT + BAR + 14}" y="${n(y + THICK / 2 + 4)}" font-size="15">${escapeXml(`${speed(of.median)}/s`)}` +
      `<tspan ${muted('dx="10"')}>${escapeXml(`${percent(share)} of ${name}`)}</tspan></text>`,
  ];
}

function muted(attributes = ""): string {
  return `fill="${MUTED}"${attributes && ` ${attributes}`}`;
}

/** A coordinate with at most two decimals. */
function n(value: number): string {
  return String(Math.round(value * 100) / 100);
}
